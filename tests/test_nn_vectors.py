"""Scale vectors in other forms: the same functions, with their gauges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nn_laws import (
    SIZE,
    becomes,
    compiles,
    distance,
    gradients,
    laws_hold,
    norms,
    reference,
    round_trips,
    survives_bfloat16,
    tokens,
)
from regauge.errors import Refused
from regauge.nn.entry import generic
from regauge.nn.vectors import ENTRIES, BranchedNorm, MagnitudeNorm, ScaledLinear, ScaledNorm


def made(kind: type, *sizes: int, **options: object) -> nn.Module:
    return generic(kind(*(sizes or (SIZE,)), **options), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_laws(entry: object) -> None:
    laws_hold(entry)


@pytest.mark.parametrize("form", ["rms", "layer"])
def test_norms_become_them(form: str) -> None:
    for norm in norms(form):
        for layer in range(1, 5):
            scaled = becomes(ScaledNorm, norm, scale=layer**-0.5)
            held = scaled.weight.detach() / layer**0.5
            assert torch.allclose(held, becomes(ScaledNorm, norm).weight.detach())
        magnitude = becomes(MagnitudeNorm, norm)
        assert torch.allclose(magnitude.magnitude, magnitude.direction.norm())
        branched = becomes(BranchedNorm, norm, branches=2)
        with torch.no_grad():
            branched.weight[1] *= 2
            branched.bias is None or branched.bias[1].mul_(2)
        x = tokens()
        assert distance(branched(x)[1], 2 * reference(norm, x)) < 1e-13


def test_a_gain_of_zero_has_a_magnitude_of_zero() -> None:
    norm = nn.RMSNorm(SIZE, eps=1e-6).double()
    nn.init.zeros_(norm.weight)
    layer = MagnitudeNorm.upgrade_from(norm)
    assert distance(layer(tokens()), torch.zeros_like(tokens())) == 0
    found = gradients(layer, tokens())
    assert found["magnitude"] > 0
    assert found["direction"] == 0


def test_the_gradient_of_a_direction_is_orthogonal_to_it() -> None:
    layer = made(MagnitudeNorm)
    layer(tokens()).square().sum().backward()
    v = layer.direction
    assert abs(float((v.grad @ v).detach())) < 1e-12 * float(v.grad.norm() * v.detach().norm())


@pytest.mark.parametrize("form", ["rms", "layer"])
@pytest.mark.parametrize("kind", [ScaledNorm, MagnitudeNorm])
def test_folds(kind: type, form: str) -> None:
    options = {"scale": -0.7} if kind is ScaledNorm else {}
    layer, x = made(kind, form=form, bias=True, eps=1e-2, **options), tokens()
    bare, _ = layer.fold()
    assert isinstance(bare, nn.LayerNorm if form == "layer" else nn.RMSNorm)
    assert distance(layer.fold()(x), layer(x)) < 1e-12
    with pytest.raises(Refused, match="training"):
        layer.train().fold()


def test_branches_fold_one_by_one() -> None:
    layer, x = made(BranchedNorm, branches=2, bias=True), tokens()
    for index, y in enumerate(layer(x)):
        assert distance(layer.branch(index)(x), y) < 1e-12
    with pytest.raises(Refused, match="2 branches"):
        layer.fold()


def test_linear_between_two_vectors() -> None:
    linear = nn.Linear(5, 7, dtype=torch.float64)
    layer = ScaledLinear.from_weight(linear.weight, linear.bias)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert distance(layer(x), linear(x)) < 1e-14
    assert all(size > 0 for size in gradients(layer, x).values())
    for bias in (True, False):
        layer = made(ScaledLinear, 5, 7, bias=bias)
        expected = torch.einsum("o,oi,i,ni->no", layer.outside, layer.weight, layer.inside, x)
        assert distance(layer(x), expected + (layer.bias if bias else 0)) < 1e-12
        assert distance(layer.fold()(x), layer(x)) < 1e-12
        assert (layer.fold().bias is not None) == bias
    compiles(layer, x)
    y = layer.float()(x.bfloat16())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [ScaledNorm, MagnitudeNorm])
def test_compiles_casts_and_round_trips(kind: type) -> None:
    compiles(made(kind), tokens())
    survives_bfloat16(made(kind))
    round_trips(made(kind, bias=True), kind(SIZE, bias=True).double(), tokens())


def test_branches_compile_and_cast() -> None:
    layer = made(BranchedNorm, branches=2)
    compiles(layer, tokens())
    assert [y.dtype for y in layer(tokens().bfloat16())] == [torch.bfloat16] * 2


def test_refuses() -> None:
    with pytest.raises(ValueError, match="scale"):
        ScaledNorm(SIZE, scale=0.0)
    with pytest.raises(ValueError, match="branches"):
        BranchedNorm(SIZE, branches=0)
    for kind in (ScaledNorm, MagnitudeNorm, BranchedNorm):
        with pytest.raises(Refused, match="cannot become"):
            kind.upgrade_from(nn.BatchNorm1d(SIZE))
