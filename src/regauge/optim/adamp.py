"""AdamP: Adam without the part of a step that only lengthens scale-invariant weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from regauge.optim.base import Group, check
from regauge.optim.moments import adam_direction, adam_directions, moved
from regauge.optim.views import Projected, Views, project_


class AdamP(Projected):
    """p ← p (1 − lr · wd · c) − lr / (1 − β₁ᵗ) · Π u, with u = m / (sqrt(v / (1 − β₂ᵗ)) + eps) of Adam.

    For a scale-invariant unit of p, Π takes out the part of u along p, and c = ``wd_ratio``; for all else Π
    is the identity and c = 1. Weight decay is decoupled.

    Args:
        params: parameters, named parameters or groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        views: which units are scale-invariant: what :func:`regauge.optim.scale_invariant` finds, by name
            (then give named parameters) or by parameter; or ``"cosine"``, the test of the authors: a tensor
            of two or more axes is taken for invariant, by rows or as a whole, while its gradient is nearly
            orthogonal to it.
        delta: of that test: |cos(g, p)| < delta / sqrt(length).
        wd_ratio: factor of the weight decay of invariant parameters.
        nesterov: take β₁ m + (1 − β₁) g in place of m.
        maximize, foreach: see :class:`regauge.optim.base.GroupedOptimizer`.

    Raises:
        BadInput: a number out of range, views that do not fit; in ``step`` a sparse gradient.

    Source: Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights,
    arXiv 2006.08217, algorithm 2. That ``views`` may come from the operations of the model is new here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        views: Views = "cosine",
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        infinite = float("inf")
        check(lr=(lr, 0, infinite), eps=(eps, 0, infinite), weight_decay=(weight_decay, 0, infinite))
        check(beta1=(betas[0], 0, 1), beta2=(betas[1], 0, 1))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "views": views,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _single(self, group: Group, param: Tensor, grad: Tensor) -> None:
        step, size = adam_direction(group, self.state, param, grad)
        (cut,) = self._cuts(group, [param], [grad])
        if cut is not None:
            project_(step, param, cut, group["eps"])
        if group["weight_decay"] > 0:
            param.mul_(_kept(group, cut is not None))
        param.add_(step.mul_(-size))

    def _together(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        steps, sizes = adam_directions(group, self.state, params, grads)
        cuts = self._cuts(group, params, grads)
        for step, param, cut in zip(steps, params, cuts, strict=True):
            if cut is not None:
                project_(step, param, cut, group["eps"])
        kept = [_kept(group, cut is not None) for cut in cuts] if group["weight_decay"] > 0 else None
        moved(params, steps, sizes, kept)


def _kept(group: Group, invariant: bool) -> float:
    return 1 - float(group["lr"]) * group["weight_decay"] * (group["wd_ratio"] if invariant else 1)
