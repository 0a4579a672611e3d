"""Self-normalising networks: SELU and alpha dropout for any fixed point of mean and variance.

Source: Klambauer et al., Self-Normalizing Neural Networks (arXiv 1706.02515).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput


def selu_constants(mean: float = 0.0, variance: float = 1.0) -> tuple[float, float]:
    """(λ, α) with E selu(z) = ν and Var selu(z) = τ for z ~ N(ν, τ).

    With A = E[z; z > 0], B = E[eᶻ − 1; z ≤ 0], C = E[z²; z > 0], D = E[(eᶻ − 1)²; z ≤ 0] these are
    λA + λαB = ν and λ²C + (λα)²D = τ + ν²: for ν = 0 α = −A / B and λ = sqrt(τ / (C + α²D)), in general the
    root λ of a quadratic equation.

    Args:
        mean: ν.
        variance: τ, above zero.

    Raises:
        BadInput: τ is not above zero, or there are no λ > 0 and α > 0 or more than one pair of them.
    """
    if not (variance > 0 and math.isfinite(variance) and math.isfinite(mean)):
        raise BadInput("the variance must be above zero", found=f"mean {mean}, variance {variance}")
    a, b, c, d = _parts(mean, variance)
    second = variance + mean**2
    # λα = (ν − λA) / B in the second equation.
    p, q, r = c + a**2 * d / b**2, -2 * mean * a * d / b**2, mean**2 * d / b**2 - second
    inside = q**2 - 4 * p * r
    roots = [(-q + sign * math.sqrt(inside)) / (2 * p) for sign in (1, -1)] if inside >= 0 else []
    found = [(scale, (mean - scale * a) / (b * scale)) for scale in roots if scale > 0]
    found = [(scale, alpha) for scale, alpha in found if alpha > 0]
    if len(found) != 1:
        raise BadInput(
            "no unique SELU has this fixed point",
            expected="one pair of λ > 0 and α > 0",
            found=f"{len(found)} for mean {mean} and variance {variance}",
        )
    return found[0]


def _parts(mean: float, variance: float) -> tuple[float, float, float, float]:
    """A, B, C and D of :func:`selu_constants`, by E[e^(kz); z ≤ 0] = e^(kν + k²τ/2) Φ(−(ν + kτ) / √τ)."""
    s = math.sqrt(variance)
    t = mean / s
    density = math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)

    def below(u: float) -> float:
        return math.erfc(-u / math.sqrt(2)) / 2

    def powers(k: int) -> float:
        return math.exp(k * mean + k**2 * variance / 2) * below(-t - k * s)

    a = mean * below(t) + s * density
    c = (mean**2 + variance) * below(t) + mean * s * density
    return a, powers(1) - below(-t), c, powers(2) - 2 * powers(1) + below(-t)


class SELU(nn.Module):
    """y = λx for x > 0 and λα(eˣ − 1) otherwise, entry by entry; any shape and floating dtype.

    With weights of mean zero and variance 1 / inputs it keeps activations near the fixed point 0, 1; see
    :func:`lecun_normal_`.

    Args:
        mean, variance: fixed point (ν, τ), see :func:`selu_constants`.
    """

    def __init__(self, mean: float = 0.0, variance: float = 1.0) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance
        self.scale, self.alpha = selu_constants(mean, variance)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        below = self.scale * self.alpha * torch.expm1(input.clamp(max=0))
        return torch.where(input > 0, self.scale * input, below)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, variance={self.variance}"


class AlphaDropout(nn.Module):
    """y = a · (x · d + α' (1 − d)) + b in training with d ~ Bernoulli(1 − p); y = x in evaluation.

    With q = 1 − p, α' = −λα, a = sqrt(τ / (q ((1 − q)(α' − ν)² + τ))) and b = ν − a (qν + (1 − q) α'), y has
    the mean ν and the variance τ that x has.

    Args:
        p: probability with which an entry is dropped, 0 ≤ p < 1.
        mean, variance: (ν, τ), see :func:`selu_constants`.

    Raises:
        BadInput: p is out of range, or see :func:`selu_constants`.
    """

    def __init__(self, p: float = 0.5, mean: float = 0.0, variance: float = 1.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise BadInput("a probability of dropout", expected="0 ≤ p < 1", found=str(p))
        scale, alpha = selu_constants(mean, variance)
        self.p, self.mean, self.variance = p, mean, variance
        keep, self.low = 1 - p, -scale * alpha
        self.gain = math.sqrt(variance / (keep * (p * (self.low - mean) ** 2 + variance)))
        self.shift = mean - self.gain * (keep * mean + p * self.low)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return input
        kept = torch.empty_like(input).bernoulli_(1 - self.p) > 0
        return self.gain * torch.where(kept, input, self.low) + self.shift

    def extra_repr(self) -> str:
        return f"p={self.p}, mean={self.mean}, variance={self.variance}"


def lecun_normal_(weight: torch.Tensor, generator: Any = None) -> torch.Tensor:
    """W ~ N(0, 1 / inputs) in place; W: [outputs, inputs, …], inputs counted over all axes but the first.

    Raises:
        BadInput: W has fewer than two axes.
    """
    if weight.dim() < 2:
        raise BadInput("a weight of one axis has no inputs", found=str(list(weight.shape)))
    with torch.no_grad():
        return weight.normal_(0, (weight[0].numel()) ** -0.5, generator=generator)
