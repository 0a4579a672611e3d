"""Means of functions of normal variables, by quadrature in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from regauge.errors import BadInput

Function = Callable[[torch.Tensor], torch.Tensor]

_REACH, _PANELS, _ORDER = 12.0, 960, 12


@cache
def nodes() -> tuple[torch.Tensor, torch.Tensor]:
    """t and weights w with Σ w f(t) = E f(t), t ~ N(0, 1): Gauss–Legendre on equal panels of [−12, 12].

    Zero is an end of two panels, so functions that have a corner there lose no accuracy; the spacing (about
    0.002) resolves narrow and fast functions, which Gauss–Hermite nodes do not. Beyond 12 lies 4e-33.
    """
    x, w = np.polynomial.legendre.leggauss(_ORDER)
    half = _REACH / _PANELS
    centres = -_REACH + half * (2 * np.arange(_PANELS) + 1)
    t = torch.from_numpy((centres[:, None] + half * x).reshape(-1))
    weights = torch.from_numpy(np.tile(half * w, _PANELS))
    return t, weights * torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def mean(function: Function, sigma: float = 1.0) -> float:
    """E f(z), z ~ N(0, σ²); f acts entry by entry on a float64 tensor [n].

    Raises:
        BadInput: σ is not positive, or f gives another shape or numbers that are not finite.
    """
    t, weights = nodes()
    return float((weights * _applied(function, _sigma(sigma) * t)).sum())


def derivative_square(function: Function, sigma: float = 1.0) -> float:
    """E f'(z)², z ~ N(0, σ²), with f' by automatic differentiation.

    Raises:
        BadInput: as of :func:`mean`.
    """
    t, weights = nodes()
    with torch.enable_grad():
        z = (_sigma(sigma) * t).requires_grad_()
        (slope,) = torch.autograd.grad(_applied(function, z).sum(), z)
    return float((weights * slope.square()).sum())


def product(function: Function, correlation: float, sigma: float = 1.0) -> float:
    """E f(z₁) f(z₂) for normals of variance σ² and correlation ρ ≥ 0.

    With z_k = σ(√ρ u + √(1−ρ) v_k) it is E_u (E_v f)². The corner of a function is no longer at the end of a
    panel, and costs a little (1e-6 for ReLU).

    Raises:
        BadInput: ρ outside [0, 1]; otherwise as of :func:`mean`.
    """
    if not 0 <= correlation <= 1:
        raise BadInput("no such correlation", expected="0 ≤ ρ ≤ 1", found=str(correlation))
    if correlation == 1:
        return mean(lambda z: function(z).square(), sigma)
    t, weights = nodes()
    x, w = np.polynomial.hermite_e.hermegauss(64)
    total = 0.0
    for u, share in zip(x, w / math.sqrt(2 * math.pi), strict=True):
        z = _sigma(sigma) * (math.sqrt(correlation) * float(u) + math.sqrt(1 - correlation) * t)
        total += float(share) * float((weights * _applied(function, z)).sum()) ** 2
    return total


def _sigma(sigma: float) -> float:
    if not (math.isfinite(sigma) and sigma > 0):
        raise BadInput("a standard deviation must be positive", found=str(sigma))
    return sigma


def _applied(function: Function, z: torch.Tensor) -> torch.Tensor:
    y = function(z)
    if y.shape != z.shape or not bool(y.isfinite().all()):
        raise BadInput(
            "this is no function of one number",
            expected=f"finite values of shape {tuple(z.shape)}",
            found=f"shape {tuple(y.shape)}" if y.shape != z.shape else "infinite or undefined values",
        )
    return y
