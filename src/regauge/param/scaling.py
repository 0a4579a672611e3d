"""Constants that act on a value, on its gradient, or on both, each on its own."""

from __future__ import annotations

from typing import Any

import torch


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, forward: float | torch.Tensor, backward: float) -> torch.Tensor:
        return x * forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] * ctx.factor, None, None


def scale(x: torch.Tensor, *, forward: float | torch.Tensor = 1.0, backward: float = 1.0) -> torch.Tensor:
    """y = s · x with ∂L/∂x = r · ∂L/∂y: s acts on the value only, r on the gradient only.

    The result is no gradient of a function of x unless s = r. Dtype and shape stay.

    Args:
        x: floating, any shape.
        forward: s, a number or a tensor without axes, taken as constant.
        backward: r.
    """
    result: Any = _Scale.apply(x, forward, backward)
    return result
