"""What the optimizers here share: which gradients take part in a step, and how they are taken together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from regauge.errors import BadInput

Group = dict[str, Any]


class GroupedOptimizer(Optimizer):
    """An optimizer that changes each parameter by itself, one by one or all of a group together.

    Groups have ``maximize`` (go up, default False) and ``foreach``: True takes the tensors of a group
    together, False one by one, None together where all of them lie on one device. Both give the same
    numbers. Parameters without a gradient are left as they are.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns what ``closure`` returns, which computes loss and gradients if it is given.

        Raises:
            BadInput: a gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                params, grads = with_gradients(group)
                if params:
                    self._group(group, params, grads)
        return loss

    def _group(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """A step of what has gradients in a group."""
        if together(group, params):
            self._together(group, params, grads)
        else:
            for param, grad in zip(params, grads, strict=True):
                self._single(group, param, grad)

    def _single(self, group: Group, param: Tensor, grad: Tensor) -> None:
        """A step of one parameter."""
        raise NotImplementedError

    def _together(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """The same for several."""
        raise NotImplementedError


def with_gradients(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of a group that have a gradient, and the gradients, negated if the group maximizes.

    Raises:
        BadInput: a gradient is sparse or complex.
    """
    params = [param for param in group["params"] if param.grad is not None]
    grads = [param.grad for param in params]
    for param, grad in zip(params, grads, strict=True):
        if grad.layout is not torch.strided or param.is_complex():
            raise BadInput(
                "this optimizer needs dense real gradients",
                expected="a dense real gradient",
                found=f"{'complex' if param.is_complex() else grad.layout}, shape {tuple(param.shape)}",
                way_out="build the embedding with sparse=False, or use torch.optim.SparseAdam for it",
            )
    return params, [-grad for grad in grads] if group["maximize"] else grads


def together(group: Group, params: list[Tensor]) -> bool:
    """Whether the tensors of a group are taken together."""
    if group["foreach"] is not None:
        return bool(group["foreach"])
    return len({param.device for param in params}) == 1


def check(**ranges: tuple[float, float, float]) -> None:
    """Each number lies in its range: name=(value, at least, below).

    Raises:
        BadInput: one does not.
    """
    for name, (value, low, high) in ranges.items():
        if not low <= value < high:
            raise BadInput(f"{name} is out of range", expected=f"{low} ≤ {name} < {high}", found=str(value))


def norm_dtype(x: Tensor) -> torch.dtype:
    """Lengths are taken in float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
