"""VI3NR: the variance of pre-activations is the same in every layer, for any activation function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from regauge.errors import BadInput
from regauge.nn.init import gaussian
from regauge.nn.init.gaussian import Function
from regauge.nn.init.weights import fans, fill, normal


def gain(function: Function, sigma: float = 1.0) -> float:
    """σ / √(E f(z)²), z ~ N(0, σ²): √2 for ReLU and any σ, 1.593 for tanh and σ = 1.

    It is the second moment of f(z), not its variance, that a layer with weights of mean zero sums.

    Source: Koneputugodage et al., VI3NR (Chumbyte/vi3nr), who sample the mean; here it is a quadrature in
    float64.

    Raises:
        BadInput: as of :func:`regauge.nn.init.gaussian.mean`, or f vanishes.
    """
    square = gaussian.mean(lambda z: function(z).square(), sigma)
    if square <= 0:
        raise BadInput("this activation function is zero", expected="E f(z)² > 0", found=str(square))
    return sigma / math.sqrt(square)


def vi3nr_(
    tensor: torch.Tensor,
    function: Function | None,
    sigma: float = 1.0,
    *,
    square: float | None = None,
    distribution: Literal["normal", "uniform"] = "normal",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Var W = σ² / (fan_in · E f(z)²), z ~ N(0, σ²), of the weight W [out, in, *kernel] that reads f(z).

    The first layer reads data x instead of f(z): give ``square`` = E x² = mean² + std² of the data, and
    function None. Biases are zero.

    Source: as of :func:`gain`.

    Args:
        tensor: a weight [out, in, *kernel], of any floating dtype.
        function: f, entry by entry, before this layer.
        sigma: σ, the standard deviation of pre-activations aimed at, in all layers the same.
        square: E x² of what the layer reads, instead of ``function``.
        distribution: ``uniform`` is on ±√(3 Var W).
        generator: of the draws.

    Raises:
        Refused: fewer than two axes.
        BadInput: both or neither of ``function`` and ``square``, another distribution; as of :func:`gain`.
    """
    if (function is None) == (square is None):
        raise BadInput(
            "say what the layer reads",
            expected="function, or square=E x² for the first layer",
            found="neither" if square is None else "both",
        )
    if square is not None and not (math.isfinite(square) and square > 0):
        raise BadInput("the data have no second moment", expected="E x² > 0", found=str(square))
    factor = sigma / math.sqrt(square) if square is not None else 0.0
    if function is not None:
        factor = gain(function, sigma)
    std = factor / math.sqrt(fans(tensor)[0])
    if distribution == "normal":
        return fill(tensor, std * normal(tensor.shape, generator))
    if distribution == "uniform":
        device = "cpu" if generator is None else generator.device
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device=device)
        return fill(tensor, std * math.sqrt(3) * (2 * values - 1))
    raise BadInput("there is no such distribution", expected="normal or uniform", found=repr(distribution))


@dataclass(frozen=True)
class Backward:
    """A standard deviation of pre-activations, and by what each layer multiplies the variance of gradients.

    Attributes:
        sigma: σ.
        ratio: σ² E f'(z)² / E f(z)²; 1 keeps the variance of gradients too, for layers of equal widths.
    """

    sigma: float
    ratio: float


def backward_ratio(function: Function, sigma: float) -> float:
    """σ² · E f'(z)² / E f(z)², z ~ N(0, σ²)."""
    return gain(function, sigma) ** 2 * gaussian.derivative_square(function, sigma)


def backward_sigma(function: Function, low: float = 1e-3, high: float = 10.0, steps: int = 121) -> Backward:
    """σ in [low, high] with |σ² E f'(z)² / E f(z)² − 1| smallest: forward and backward variance both kept.

    Points at equal ratios are tried, then the zero nearest σ = 1 is found by bisection, if there is one.
    Where several are equally good to 1e-9, as for ReLU all are, it is that nearest 1.

    Source: as of :func:`gain`, who search a grid from 0.001 to 10.
    """
    grid = [low * (high / low) ** (k / (steps - 1)) for k in range(steps)]
    error = [backward_ratio(function, s) - 1 for s in grid]
    order = sorted(range(steps), key=lambda k: abs(math.log(grid[k])))
    flat = [k for k in order if abs(error[k]) < 1e-9]
    crossing = [k for k in order if k + 1 < steps and error[k] * error[k + 1] < 0 and abs(error[k]) > 1e-9]
    if crossing and not flat:
        a, b = grid[crossing[0]], grid[crossing[0] + 1]
        sign = error[crossing[0]]
        for _ in range(50):
            middle = math.sqrt(a * b)
            a, b = (middle, b) if (backward_ratio(function, middle) - 1) * sign > 0 else (a, middle)
        return Backward(a, backward_ratio(function, a))
    best = flat[0] if flat else min(order, key=lambda k: abs(error[k]))
    return Backward(grid[best], error[best] + 1)
