"""What is left of a norm whose statistics are constants."""

from __future__ import annotations

import torch
from torch import nn


class Affine(nn.Module):
    """y[…, c, …] = g[c] · x[…, c, …] + b[c] along one axis; g or b may be absent.

    Args:
        weight: g, [size], or None.
        bias: b, [size], or None.
        axis: of x that c counts; -1 for tokens [batch, positions, c], 1 for images [batch, c, height, width].
    """

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.weight = None if weight is None else nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        behind = 0 if self.axis == -1 else input.dim() - 1 - self.axis
        shape = (-1, *(1,) * behind)
        y = input if self.weight is None else input * self.weight.reshape(shape)
        return y if self.bias is None else y + self.bias.reshape(shape)

    def extra_repr(self) -> str:
        has = [name for name in ("weight", "bias") if getattr(self, name) is not None]
        return f"axis={self.axis}" + "".join(f", {name}" for name in has)
