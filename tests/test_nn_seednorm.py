"""SeeDNorm: its formula written out, its gauges, and the norms that become it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nn_laws import (
    SIZE,
    becomes,
    compiles,
    distance,
    laws_hold,
    norms,
    round_trips,
    survives_bfloat16,
    tokens,
)
from regauge.errors import Refused
from regauge.nn.entry import generic
from regauge.nn.seednorm import ENTRIES, SeeDNorm


def made(seed: int = 0, **options: object) -> SeeDNorm:
    return generic(SeeDNorm(SIZE, **options), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["rms", "layer"])
@pytest.mark.parametrize(("heads", "scale"), [(1, 1.0), (3, 0.25)])
def test_formula(form: str, heads: int, scale: float) -> None:
    layer, x = made(heads=heads, scale=scale, form=form, bias=True, eps=1e-3), tokens()
    g, b, alpha, beta = (p.detach() for p in (layer.weight, layer.bias, layer.alpha, layer.beta))
    z = x - x.mean(-1, keepdim=True) if form == "layer" else x
    expected, n = torch.empty_like(x), SIZE // heads
    for c in range(SIZE):
        head = range(c // n * n, c // n * n + n)
        t = torch.tanh(scale * sum(x[..., j] * beta[j] for j in head))
        unit = z[..., c] / ((z**2).mean(-1) + 1e-3).sqrt()
        expected[..., c] = (g[c] + alpha[c] * t) * unit + b[c]
    assert distance(layer(x), expected) < 1e-12


def test_laws() -> None:
    laws_hold(ENTRIES[0])
    assert distance(ENTRIES[0].bare(SIZE, torch.Generator()).weight, torch.ones(SIZE).double()) == 0


@pytest.mark.parametrize("form", ["rms", "layer"])
@pytest.mark.parametrize("heads", [1, 4])
def test_norms_become_it(form: str, heads: int) -> None:
    """α has no gradient at β = 0, and has one behind the first step."""
    for norm in norms(form):
        layer = becomes(SeeDNorm, norm, ("alpha",), heads=heads)
        torch.optim.SGD(layer.parameters(), lr=1e-4).step()
        layer(tokens()).square().sum().backward()
        assert float(layer.alpha.grad.abs().max()) > 0


def test_folds_while_it_is_a_norm() -> None:
    x = tokens()
    layer = made(heads=3, bias=True, eps=1e-3)
    with torch.no_grad():
        layer.beta[:4] = 0
        layer.alpha[4:] = 0
    assert distance(layer.fold()(x), layer(x)) < 1e-12
    with torch.no_grad():
        layer.alpha[5] = 1e-3
    with pytest.raises(Refused, match="1 of 3 heads"):
        layer.fold()
    with pytest.raises(Refused, match="training"):
        layer.train().fold()


def test_dropout_takes_the_dynamic_term_only() -> None:
    layer, x = made(dropout=0.5), tokens()
    dry = copy.deepcopy(layer)
    with torch.no_grad():
        dry.alpha.zero_()
    assert distance(layer(x), made()(x)) == 0
    still = dry(x)
    torch.manual_seed(0)
    y = layer.train()(x)
    twice = 2 * layer.eval()(x) - still  # 1 / (1 − p) times the dynamic term
    dropped, kept = (y - still).abs() < 1e-12, (y - twice).abs() < 1e-11
    assert bool((dropped | kept).all())
    assert 0.2 < float(dropped.double().mean()) < 0.8


def test_compiles_casts_and_round_trips() -> None:
    compiles(made(heads=3), tokens())
    survives_bfloat16(made(heads=3), tokens())
    round_trips(made(heads=3, bias=True), SeeDNorm(SIZE, heads=3, bias=True).double(), tokens())


def test_refuses() -> None:
    with pytest.raises(ValueError, match="5 heads"):
        SeeDNorm(SIZE, heads=5)
    with pytest.raises(ValueError, match="dropout"):
        SeeDNorm(SIZE, dropout=1.0)
    with pytest.raises(ValueError, match="form"):
        SeeDNorm(SIZE, form="batch")
    with pytest.raises(Refused, match="cannot become a SeeDNorm"):
        SeeDNorm.upgrade_from(nn.BatchNorm1d(SIZE))
