"""DyT and BHyT against the authors' values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nn_laws import (
    SIZE,
    compiles,
    distance,
    golden,
    laws_hold,
    norms,
    reference,
    round_trips,
    survives_bfloat16,
    tokens,
)
from regauge.errors import BadInput, Refused
from regauge.nn.entry import generic
from regauge.nn.tanh import ENTRIES, AttentionVariance, BHyT, DyT, attention_gain


def load(layer: nn.Module, params: dict[str, torch.Tensor]) -> nn.Module:
    layer = layer.to(params["weight"].dtype)
    layer.load_state_dict(params, strict=True)
    return layer


def agrees(layer: nn.Module, case: dict[str, torch.Tensor], bound: float) -> None:
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(case["grad_out"])
    assert distance(y, case["y"]) < bound
    assert distance(x.grad, case["grad_x"]) < bound
    for name, grad in case["grads"].items():
        assert distance(layer.get_parameter(name).grad, grad) < bound


@pytest.mark.parametrize(("key", "axis"), [("channels_last", -1), ("channels_first", 1)])
def test_dyt_is_that_of_the_authors(key: str, axis: int) -> None:
    case = golden("dyt")[key]
    agrees(load(DyT(len(case["params"]["weight"]), axis=axis), case["params"]), case, 1e-12)


def test_starts_as_the_authors_do() -> None:
    for layer, start in ((DyT(6), golden("dyt")["init"]), (BHyT(6), golden("bhyt")["star_init"])):
        assert layer.state_dict().keys() == start.keys()
        for name, value in layer.state_dict().items():
            assert distance(value.double(), start[name]) == 0


def test_bhyt_is_that_of_the_authors() -> None:
    case = golden("bhyt")["star"]
    agrees(load(BHyT(6), case["params"]), case, 1e-6)


def test_attention_gain_is_that_of_the_authors() -> None:
    case = golden("bhyt")["c_attn"]
    config = case["config"]
    found = attention_gain(case["v_proj"], case["o_proj"], config["seq_len"], config["head_dim"])
    assert distance(found, case["c_attn"]) < 1e-6
    v = case["v_proj"].double().unflatten(0, (2, 2))
    o = case["o_proj"].double().unflatten(1, (4, 2))
    whole = torch.einsum("dhj,hji->di", o, v[[0, 0, 1, 1]])
    assert abs(float(found) - float(whole.square().sum() / (5 * 8))) < 1e-6


@pytest.mark.parametrize("stale", [False, True])
def test_estimated_variance_is_that_of_the_authors(stale: bool) -> None:
    data = golden("bhyt")
    case, attention, out = data["var_approx"], data["c_attn"], data["bhyt_out"]
    x = case["x"]
    m1 = x.square().mean(-1, keepdim=True)
    variance = AttentionVariance(5, 2, stale=stale)
    m2 = variance(m1, case["lam"], attention["v_proj"], attention["o_proj"])
    assert distance(case["inv_kappa"] * (m1 + 1e-6).rsqrt(), case["rstd1"]) < 1e-6
    assert distance(case["inv_kappa"] * (m2 + 1e-6).rsqrt(), case["rstd2"]) < 1e-6
    layer = load(BHyT(8), out["params"])
    assert distance(layer(x), out["y1"]) < 1e-6
    assert distance(layer(x, m1), out["y1"]) < 1e-6
    assert distance(layer(x, m2), out["y2"]) < 1e-6


def test_only_the_stale_estimate_forgets_training_and_lengths() -> None:
    data = golden("bhyt")["c_attn"]
    value, output, lam = data["v_proj"], data["o_proj"], torch.tensor([2.0])
    m1 = golden("bhyt")["var_approx"]["x"].square().mean(-1, keepdim=True)
    fresh, stale = AttentionVariance(5, 2), AttentionVariance(5, 2, stale=True)
    first = stale(m1, lam, value, output)
    assert distance(fresh(m1, lam, value, output), first) < 1e-6
    # A token on its own, as in decoding.
    assert distance(fresh(m1[:, -1:], lam, value, output), first[:, -1:]) < 1e-6
    late = AttentionVariance(5, 2, stale=True)
    assert distance(late(m1[:, -1:], lam, value, output), first[:, -1:]) > 1e-3
    # Other weights.
    assert distance(stale(m1, lam, 2 * value, output), first) == 0
    assert distance(fresh(m1, lam, 2 * value, output) - m1, 4 * (first - m1)) < 1e-6
    # Nothing of the stale number is in the state; a layer that is loaded starts anew.
    assert not stale.state_dict()
    assert not fresh.state_dict()
    compiles(fresh, m1.double(), lam.double(), value.double(), output.double())
    compiled = torch.compile(late, fullgraph=True, backend="aot_eager")
    assert distance(compiled(m1, lam, value, output), late(m1, lam, value, output)) == 0
    with pytest.raises(BadInput, match="attention layer"):
        attention_gain(value[:3], output, 5, 2)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_laws(entry: object) -> None:
    laws_hold(entry)


MADE = [
    generic(DyT(SIZE), torch.Generator().manual_seed(0), 0.1),
    generic(BHyT(SIZE), torch.Generator().manual_seed(1), 0.1),
]


@pytest.mark.parametrize("layer", MADE, ids=lambda layer: type(layer).__name__)
def test_folds(layer: nn.Module) -> None:
    bare, _ = layer.fold()
    assert bare.weight is None
    assert distance(layer.fold()(tokens()), layer(tokens())) < 1e-12
    with pytest.raises(Refused, match="training"):
        layer.train().fold()
    layer.eval()


def test_folds_along_channels() -> None:
    layer = generic(DyT(3, axis=1), torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert distance(layer.fold()(x), layer(x)) < 1e-12


@pytest.mark.parametrize("layer", MADE, ids=lambda layer: type(layer).__name__)
def test_compiles_casts_and_round_trips(layer: nn.Module) -> None:
    compiles(layer, tokens())
    round_trips(layer, type(layer)(SIZE).double(), tokens())
    survives_bfloat16(layer)


@pytest.mark.parametrize("small", [0.2, 0.05, 0.01])
def test_an_approximation_is_called_one(small: float) -> None:
    """|tanh(u) − u| ≤ |u|³ / 3, and the error has that size."""
    for norm in norms("rms"):
        x = tokens()
        layer, y = BHyT.approximate(norm, small), reference(norm, x)
        unit = x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        bound = (small * unit).square() / 3 * y.abs()
        error = (layer(x) - y).detach().abs()
        assert bool((error <= bound * 1.0001 + 1e-13).all())
        assert float(error.max()) > 0.3 * float(bound.detach().max())
        assert layer.training == norm.training


def test_refuses() -> None:
    norm = nn.RMSNorm(SIZE, eps=1e-6)
    for kind in (DyT, BHyT):
        with pytest.raises(Refused, match="without another function"):
            kind.upgrade_from(norm)
    with pytest.raises(Refused, match="cannot become"):
        BHyT.approximate(nn.LayerNorm(SIZE))
    with pytest.raises(BadInput, match="above zero"):
        BHyT.approximate(norm, 0.0)
    with pytest.raises(ValueError, match="axis"):
        DyT(3, axis=2)
    with pytest.raises(ValueError, match="kappa"):
        BHyT(3, kappa=0.0)
