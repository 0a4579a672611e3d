"""The weight of a linear layer, and how many inputs and outputs one of its entries connects."""

from __future__ import annotations

import math

import torch
from torch import nn

from regauge.errors import Refused

Layer = nn.Module | torch.Tensor


def fans(weight: torch.Tensor) -> tuple[int, int]:
    """(in · ∏ kernel, out · ∏ kernel) of a weight [out, in, *kernel]; of a grouped convolution, in is that of
    one group and out that of all, as PyTorch counts.

    Raises:
        Refused: fewer than two axes.
    """
    if weight.dim() < 2:
        raise Refused(
            "this tensor has no fan",
            expected="a weight [out, in, *kernel]",
            found=f"shape {tuple(weight.shape)}",
        )
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps


def linear_weight(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in, *kernel] and bias [out] of a layer; a tensor is its own weight, without a bias.

    Raises:
        Refused: a module that computes something else than PyTorch's linear map or convolution.
    """
    if isinstance(layer, torch.Tensor):
        return layer, None
    if not is_linear(layer) and not is_convolution(layer):
        raise Refused(
            "this module is not known to be linear in one weight",
            expected="a module with the forward function of nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d",
            found=type(layer).__name__,
            way_out="give the weight instead, as a tensor [out, in, *kernel]",
        )
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    return weight, bias if isinstance(bias, torch.Tensor) else None


def is_linear(module: nn.Module) -> bool:
    """Whether it runs the forward function of nn.Linear."""
    return type(module).forward is nn.Linear.forward


def is_convolution(module: nn.Module) -> bool:
    """Whether it runs the forward function of nn.Conv1d, nn.Conv2d or nn.Conv3d."""
    return type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def normal(shape: torch.Size | tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    """N(0, 1) in float64 on the device of the generator: rounding to another dtype comes last."""
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)


def orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> torch.Tensor:
    """Q [rows, columns] in float64 with Q Qᵀ = I (rows ≤ columns) or Qᵀ Q = I, uniformly distributed."""
    tall = normal((max(rows, columns), min(rows, columns)), generator)
    q, r = torch.linalg.qr(tall)
    # R with a positive diagonal makes the factor unique, and Q uniform.
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q if rows >= columns else q.T


def fill(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Copies the values into the tensor, rounded once to its dtype; returns it."""
    with torch.no_grad():
        return tensor.copy_(values)
