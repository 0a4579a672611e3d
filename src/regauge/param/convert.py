"""Weights of existing checkpoints in unit-scaled form, and back."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from regauge.errors import BadInput, Refused
from regauge.nn.init.weights import fans, is_linear, normal
from regauge.param import unit_scaling

Role = Literal["linear", "readout", "embedding"]


def unit_factor(shape: torch.Size | tuple[int, ...], role: Role = "linear") -> float:
    """W_u / W: √fan_in for a linear map or convolution [out, in, *kernel], fan_in for a readout, else 1.

    Biases inside the scaled operation take the same factor.

    Raises:
        BadInput: another role; Refused: fewer than two axes.
    """
    if role not in ("linear", "readout", "embedding"):
        raise BadInput("no such role", expected="linear, readout or embedding", found=repr(role))
    if role == "embedding":
        return 1.0
    fan_in, _ = fans(torch.empty(shape, device="meta"))
    return math.sqrt(fan_in) if role == "linear" else float(fan_in)


class UnitLinear(nn.Module):
    """y = i^{−1/2} (W x + b), or i^{−1} (W x + b) as readout, W ~ N(0, 1), b = 0.

    Gradients are scaled as in :func:`regauge.param.unit_scaling.linear`.

    Args:
        in_features, out_features: i, o: W is [o, i].
        bias: whether there is b [o].
        readout: the last layer of a model.
        generator: of W.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        readout: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.readout = readout
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        if not weight.is_meta:
            weight.copy_(normal((out_features, in_features), generator))
        self.weight = nn.Parameter(weight)
        zero = torch.zeros(out_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(zero) if bias else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        operation = unit_scaling.readout if self.readout else unit_scaling.linear
        return operation(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        out, inputs = self.weight.shape
        return f"{inputs}, {out}, bias={self.bias is not None}, readout={self.readout}"

    @classmethod
    def from_linear(cls, linear: nn.Module, *, readout: bool = False) -> UnitLinear:
        """The same function as a plain linear map, W_u = W √i, or W i as readout; in its dtype and mode.

        The scaled weight is rounded once to that dtype: where √i is no power of two the round trip is exact
        to rounding only.

        Raises:
            Refused: the module does not run the forward function of nn.Linear.
        """
        if not is_linear(linear):
            raise Refused("this is no plain linear map", expected="nn.Linear", found=type(linear).__name__)
        held = dict(linear.named_parameters(recurse=False))
        weight, bias = held["weight"], held.get("bias")
        out, inputs = weight.shape
        made = cls(inputs, out, bias is not None, readout=readout, device="meta")
        factor = unit_factor(weight.shape, "readout" if readout else "linear")
        made.weight = _scaled(weight, factor)
        made.bias = None if bias is None else _scaled(bias, factor)
        return made.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The plain linear map of the same function: W = W_u i^{−1/2}, or i^{−1}."""
        out, inputs = self.weight.shape
        made = nn.Linear(inputs, out, self.bias is not None, device="meta")
        factor = 1 / unit_factor(self.weight.shape, "readout" if self.readout else "linear")
        made.weight = _scaled(self.weight, factor)
        if self.bias is not None:
            made.bias = _scaled(self.bias, factor)
        return made.train(self.training)


def _scaled(parameter: nn.Parameter, factor: float) -> nn.Parameter:
    exact = parameter.detach().to(torch.float64) * factor
    return nn.Parameter(exact.to(parameter.dtype), requires_grad=parameter.requires_grad)
