"""Which classes an untrained classifier prefers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from regauge.errors import BadInput
from regauge.nn.init import gaussian
from regauge.nn.init.gaussian import Function


def guesses(model: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """G[c] = share of inputs whose largest logit is c: [classes], float64, of sum 1.

    Args:
        model: inputs [batch, …] -> logits [batch, classes]; run without gradients.
        inputs: samples. Of several largest logits, as of a model that gives zeros, the first counts.

    Raises:
        BadInput: the logits are not [batch, classes], or not finite.
    """
    with torch.no_grad():
        logits = model(inputs)
    if logits.dim() != 2 or len(logits) != len(inputs) or not bool(logits.isfinite().all()):
        raise BadInput(
            "these are no logits",
            expected=f"finite numbers [{len(inputs)}, classes]",
            found=f"shape {tuple(logits.shape)}",
        )
    return torch.bincount(logits.argmax(1), minlength=logits.shape[1]).to(torch.float64) / len(inputs)


def guessing_bias(
    make: Callable[[torch.Generator], nn.Module], inputs: torch.Tensor, seeds: Sequence[int]
) -> torch.Tensor:
    """G[seed, c], shares of inputs that models initialised with these seeds assign to each class.

    Even shares for every seed mean no bias; shares that differ from seed to seed, by more than the number of
    inputs explains, are initial guessing bias: it comes from the activation function, not from the data.

    Source: Francazi, Lucchi, Baity-Jesi, Initial Guessing Bias (arXiv 2306.00809).

    Args:
        make: an initialised model from a generator on the CPU with that seed.
        inputs: [batch, …].
        seeds: of the models.

    Raises:
        BadInput: as of :func:`guesses`, or no seeds.
    """
    if not seeds:
        raise BadInput("no seeds are given", expected="one or more", found="none")
    return torch.stack([guesses(make(torch.Generator().manual_seed(seed)), inputs) for seed in seeds])


def correlation(function: Function, rho: float = 0.0, sigma: float = 1.0) -> float:
    """c = E f(z₁) f(z₂) / E f(z)², normals of correlation ρ ≥ 0 and variance σ²: of the next pre-activations.

    For ReLU and ρ = 0 it is 1/π, for an odd function 0.

    Raises:
        BadInput: as of :func:`regauge.nn.init.gaussian.product`.
    """
    return gaussian.product(function, rho, sigma) / gaussian.product(function, 1.0, sigma)


def binary_spread(rho: float) -> float:
    """Standard deviation over seeds of G[0] for two classes: √(asin ρ / 2π), ρ the correlation of two inputs'
    logits.

    With logits √ρ u_c + √(1−ρ) v_{c,x}, G[0] = Φ(r u) for r² = ρ/(1−ρ), u ~ N(0, 1), in the limit of wide
    layers and many inputs.

    Raises:
        BadInput: ρ outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise BadInput("no such correlation", expected="0 ≤ ρ ≤ 1", found=str(rho))
    return math.sqrt(math.asin(rho) / (2 * math.pi))
