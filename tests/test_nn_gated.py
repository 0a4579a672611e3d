"""GatedNorm and PreAffine: formulas written out, gauges, folds, and the norms that become them."""

from __future__ import annotations

import pytest
import torch

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
from regauge.nn.gated import ENTRIES, GatedNorm, PreAffine

KINDS = (GatedNorm, PreAffine)


def made(kind: type = GatedNorm, **options: object) -> torch.nn.Module:
    return generic(kind(SIZE, **options), torch.Generator().manual_seed(0))


def unit(z: torch.Tensor, form: str, eps: float) -> torch.Tensor:
    z = z - z.mean(-1, keepdim=True) if form == "layer" else z
    return z / ((z**2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("form", ["rms", "layer"])
def test_formulas(form: str) -> None:
    x = tokens()
    layer = made(form=form, bias=True, rank=3, eps=1e-3)
    z = layer.weight * unit(x, form, 1e-3) + layer.bias
    h = torch.einsum("rc,btc->btr", layer.down, z)
    gate = 1 / (1 + torch.exp(-torch.einsum("cr,btr->btc", layer.up, h / (1 + torch.exp(-h)))))
    assert distance(layer(x), gate * z) < 1e-12
    layer = made(PreAffine, form=form, bias=True, eps=1e-3)
    assert distance(layer(x), layer.weight * unit(layer.scale * x, form, 1e-3) + layer.bias) < 1e-12


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_laws(entry: object) -> None:
    laws_hold(entry)
    assert distance(entry.bare(SIZE, torch.Generator()).weight, torch.ones(SIZE).double()) == 0


@pytest.mark.parametrize("form", ["rms", "layer"])
def test_norms_become_them(form: str) -> None:
    """D has no gradient at U = 0, and has one behind the first step."""
    for norm in norms(form):
        layer = becomes(GatedNorm, norm, ("down",), rank=4)
        torch.optim.SGD(layer.parameters(), lr=1e-3).step()
        layer(tokens()).square().sum().backward()
        assert float(layer.down.grad.abs().max()) > 0
        becomes(PreAffine, norm)


def test_the_gain_of_a_gated_norm_folds_through_the_gate() -> None:
    x, layer = tokens(), made(rank=3)
    bare, affine = layer.fold()
    assert bare.weight is None
    assert affine.bias is None
    assert distance(affine.weight, layer.weight.detach()) == 0
    assert distance(layer.fold()(x), layer(x)) < 1e-12
    with pytest.raises(Refused, match="shift"):
        made(rank=3, bias=True).fold()
    with pytest.raises(Refused, match="training"):
        layer.train().fold()


def test_a_closed_gate_is_a_half() -> None:
    x, layer = tokens(), made(bias=True, form="layer")
    with torch.no_grad():
        layer.up.zero_()
    bare, _ = layer.fold()
    assert isinstance(bare, torch.nn.LayerNorm)
    assert distance(layer.fold()(x), layer(x)) < 1e-12


@pytest.mark.parametrize("form", ["rms", "layer"])
def test_a_diagonal_of_one_size_folds(form: str) -> None:
    x, layer = 0.1 * tokens(), made(PreAffine, form=form, bias=True, eps=1e-2)
    with pytest.raises(Refused, match="does not fold"):
        layer.fold()
    with torch.no_grad():
        layer.scale.fill_(-0.3)
    assert distance(layer.fold()(x), layer(x)) < 1e-12
    with torch.no_grad():
        layer.scale[3] = 0.3
    if form == "rms":
        assert distance(layer.fold()(x), layer(x)) < 1e-12
    else:
        with pytest.raises(Refused, match="does not fold"):
            layer.fold()
    with torch.no_grad():
        layer.scale.zero_()
    with pytest.raises(Refused, match="does not fold"):
        layer.fold()


def test_a_sink_moves_into_the_diagonal() -> None:
    """The largest channel of the stream, made small by its writers, is large again in λ."""
    x, layer = tokens(), made(PreAffine)
    x[..., 2] *= 1000
    size = torch.ones(SIZE, dtype=torch.float64)
    size[2] = 1000
    before = layer(x)
    with torch.no_grad():
        layer.scale *= size
    assert distance(layer(x / size), before) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_casts_and_round_trips(kind: type) -> None:
    compiles(made(kind), tokens())
    survives_bfloat16(made(kind))
    round_trips(made(kind, bias=True), kind(SIZE, bias=True).double(), tokens())


def test_refuses() -> None:
    with pytest.raises(ValueError, match="rank"):
        GatedNorm(SIZE, rank=0)
    for kind in KINDS:
        with pytest.raises(Refused, match="cannot become"):
            kind.upgrade_from(torch.nn.BatchNorm2d(SIZE))
