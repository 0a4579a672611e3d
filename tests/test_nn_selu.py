"""SELU and alpha dropout: the fixed point by quadrature, and torch's layers at (0, 1)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nn_laws import compiles, distance
from regauge.errors import BadInput
from regauge.nn.selu import SELU, AlphaDropout, lecun_normal_, selu_constants

POINTS = [(0.0, 1.0), (0.0, 0.3), (0.1, 1.0), (-0.2, 0.8), (0.3, 1.5)]


def gauss(mean: float, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for N(mean, variance), half by half: SELU has a kink at zero."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    reach = abs(mean) + 12 * math.sqrt(variance)
    z = np.concatenate([(nodes - 1) / 2, (nodes + 1) / 2]) * reach
    density = np.exp(-((z - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    return z, np.concatenate([weights, weights]) / 2 * reach * density


def test_constants_of_the_paper() -> None:
    scale, alpha = selu_constants()
    assert abs(scale - 1.0507009873554805) < 1e-14
    assert abs(alpha - 1.6732632423543772) < 1e-14
    closed = -math.sqrt(2 / math.pi) / (math.exp(0.5) * math.erfc(1 / math.sqrt(2)) - 1)
    assert abs(alpha - closed) < 1e-14


@pytest.mark.parametrize(("mean", "variance"), POINTS)
def test_mean_and_variance_are_a_fixed_point(mean: float, variance: float) -> None:
    z, weight = gauss(mean, variance)
    assert abs(weight.sum() - 1) < 1e-12
    y = SELU(mean, variance)(torch.from_numpy(z)).numpy()
    assert abs((weight * y).sum() - mean) < 1e-12
    assert abs((weight * (y - mean) ** 2).sum() - variance) < 1e-12


@pytest.mark.parametrize(("mean", "variance"), POINTS)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_keeps_mean_and_variance(mean: float, variance: float, p: float) -> None:
    """Over the Bernoulli variable in closed form, with x of mean ν and variance τ."""
    layer = AlphaDropout(p, mean, variance)
    assert abs(layer.low - float(SELU(mean, variance)(torch.tensor(-50.0).double()))) < 1e-12
    first = (1 - p) * mean + p * layer.low
    second = (1 - p) * (variance + mean**2) + p * layer.low**2
    assert abs(layer.gain * first + layer.shift - mean) < 1e-12
    assert abs(layer.gain**2 * (second - first**2) - variance) < 1e-12


def test_agree_with_torch() -> None:
    x = 3 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    SELU()(a).sum().backward()
    nn.SELU()(b).sum().backward()
    assert distance(SELU()(x), nn.SELU()(x)) < 1e-14
    assert distance(a.grad, b.grad) < 1e-14
    found = []
    for layer in (AlphaDropout(0.3), nn.AlphaDropout(0.3)):
        torch.manual_seed(0)
        found.append(layer(x))
    # torch keeps the constant in single precision.
    assert distance(*found) < 1e-6
    assert distance(AlphaDropout(0.3).eval()(x), x) == 0
    assert distance(AlphaDropout(0.0)(x), x) == 0


def test_a_deep_network_stays_at_the_fixed_point() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(500, 256, generator=random)
    for _ in range(20):
        x = SELU()(x @ lecun_normal_(torch.empty(256, 256), random).T)
    assert abs(float(x.mean())) < 0.1
    assert abs(float(x.var()) - 1) < 0.2
    weight = lecun_normal_(torch.empty(64, 32, 3, 3), random)
    assert abs(float(weight.std()) * math.sqrt(32 * 9) - 1) < 0.03


def test_compiles_and_casts() -> None:
    x = torch.randn(20, dtype=torch.float64)
    compiles(SELU(0.1, 0.9), x)
    compiles(AlphaDropout(0.3).eval(), x)
    torch.compile(AlphaDropout(0.3), fullgraph=True, backend="aot_eager")(x)
    for dtype in (torch.bfloat16, torch.float16):
        assert SELU()(x.to(dtype)).dtype == dtype
        assert AlphaDropout()(x.to(dtype)).dtype == dtype
    assert bool(SELU()(torch.tensor([1e4, -1e4])).isfinite().all())
    large = torch.tensor([1e3], requires_grad=True)
    SELU()(large).backward()
    assert bool(large.grad.isfinite())


def test_refuses() -> None:
    with pytest.raises(BadInput, match="variance"):
        selu_constants(0.0, 0.0)
    with pytest.raises(BadInput, match="no unique"):
        selu_constants(5.0, 0.1)
    with pytest.raises(BadInput, match="dropout"):
        AlphaDropout(1.0)
    with pytest.raises(BadInput, match="no inputs"):
        lecun_normal_(torch.zeros(3))
