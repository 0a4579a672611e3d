"""SGDP: SGD with momentum without the part of a step that only lengthens scale-invariant weights."""

# PyTorch documents its functions on lists of tensors under names that begin with an underscore.
# pyright: reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regauge.errors import BadInput
from regauge.optim.base import Group, check
from regauge.optim.views import Projected, Views, project_


class SGDP(Projected):
    """b ← momentum · b + (1 − dampening) g; p ← p (1 − lr · wd · c / (1 − momentum)) − lr · Π d.

    d is b, or with ``nesterov`` g + momentum · b. Π and c as in :class:`regauge.optim.AdamP`. b starts at
    zero, so that dampening also acts in the first step, unlike in ``torch.optim.SGD``.

    Args:
        params: parameters, named parameters or groups.
        lr, momentum, dampening, weight_decay, nesterov: as in the formula.
        eps: added to the length of a unit before dividing by it.
        views, delta, wd_ratio: as in AdamP.
        alias: the authors' code projects b itself unless ``nesterov``, so that momentum is lost with every
            projection; True does the same, False keeps b as in the formula.
        maximize, foreach: see :class:`regauge.optim.base.GroupedOptimizer`.

    Raises:
        BadInput: a number out of range (momentum must be below one), views that do not fit; in ``step`` a
            sparse gradient.

    Source: Heo et al., arXiv 2006.08217, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        *,
        views: Views = "cosine",
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        alias: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        infinite = float("inf")
        check(lr=(lr, 0, infinite), momentum=(momentum, 0, 1), dampening=(dampening, -infinite, infinite))
        check(weight_decay=(weight_decay, 0, infinite), eps=(eps, 0, infinite))
        if alias and nesterov:
            raise BadInput("alias says what becomes of the buffer without nesterov", found="both")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "views": views,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "alias": alias,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state["momentum"]

    def _single(self, group: Group, param: Tensor, grad: Tensor) -> None:
        buffer = self._buffer(param).mul_(group["momentum"]).add_(grad, alpha=1 - group["dampening"])
        step = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        (cut,) = self._cuts(group, [param], [grad])
        if cut is not None:
            step = step if group["alias"] or group["nesterov"] else step.clone()
            project_(step, param, cut, group["eps"])
        if group["weight_decay"] > 0:
            param.mul_(_kept(group, cut is not None))
        param.add_(step, alpha=-float(group["lr"]))

    def _together(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        buffers = [self._buffer(param) for param in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        steps = buffers
        if group["nesterov"]:
            steps = list(torch._foreach_add(grads, buffers, alpha=group["momentum"]))
        cuts = self._cuts(group, params, grads)
        own = group["alias"] or group["nesterov"]
        steps = [step if cut is None or own else step.clone() for step, cut in zip(steps, cuts, strict=True)]
        for step, param, cut in zip(steps, params, cuts, strict=True):
            if cut is not None:
                project_(step, param, cut, group["eps"])
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, [_kept(group, cut is not None) for cut in cuts])
        torch._foreach_add_(params, steps, alpha=-float(group["lr"]))


def _kept(group: Group, invariant: bool) -> float:
    ratio = group["wd_ratio"] if invariant else 1
    return 1 - float(group["lr"]) * group["weight_decay"] * ratio / (1 - group["momentum"])
