"""LayerNorm, RMSNorm and CRMSNorm against the authors' values and torch's layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from nn_laws import (
    SIZE,
    becomes,
    compiles,
    distance,
    golden,
    laws_hold,
    norms,
    round_trips,
    survives_bfloat16,
    tokens,
)
from regauge.atlas import Action, Factor, Part
from regauge.errors import Refused
from regauge.nn.entry import generic
from regauge.nn.plain import ENTRIES, CRMSNorm, LayerNorm, RMSNorm
from regauge.steps import CenterStep

RMS = ("full", "bias", "partial_0.25", "eps0.1")


@pytest.mark.parametrize("key", RMS)
def test_rms_is_that_of_the_authors(key: str) -> None:
    case = golden("rmsnorm")[key]
    config, params = case["config"], case["params"]
    fraction = config["p"] if config["p"] > 0 else 1.0
    layer = RMSNorm(config["d"], config["eps"], outside=True, fraction=fraction, bias=config["bias"]).double()
    with torch.no_grad():
        layer.weight.copy_(params["scale"])
        if config["bias"]:
            layer.bias.copy_(params["offset"])
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(case["grad_out"])
    assert distance(y, case["y"]) < 1e-12
    assert distance(x.grad, case["grad_x"]) < 1e-12
    assert distance(layer.weight.grad, case["grad_scale"]) < 1e-12
    if "grad_offset" in case:
        assert distance(layer.bias.grad, case["grad_offset"]) < 1e-12
    if key == "eps0.1":
        layer.outside = False
        assert distance(layer(x), case["y"]) > 1e-3


KINDS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm, "crms_norm": CRMSNorm}


@pytest.mark.parametrize("key", KINDS)
def test_functions_are_those_of_the_authors(key: str) -> None:
    case = golden("crmsnorm")["functions"][key]
    x = case["x"].clone().requires_grad_()
    y = KINDS[key](7, case["eps"], dtype=torch.float64)(x)
    y.backward(case["grad_out"])
    assert distance(y, case["y"]) < 1e-12
    assert distance(x.grad, case["grad_x"]) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", ["CustomizedLayerNorm", "RMSNorm", "CRMSNorm"])
def test_modules_are_those_of_the_authors(key: str, dtype: str) -> None:
    case = golden("crmsnorm")["modules"][f"{key}/{dtype}"]
    kind = {"CustomizedLayerNorm": LayerNorm, "RMSNorm": RMSNorm, "CRMSNorm": CRMSNorm}[key]
    y = kind(7, case["eps"])(case["x"])
    assert distance(y, case["y"]) <= (1e-6 if dtype == "float32" else 2**-7)


def test_three_norms_of_one_centred_stream() -> None:
    case = golden("crmsnorm")["functions"]["zero_mean"]
    x, eps = case["x"], case["eps"]
    found = LayerNorm(7, eps).double()(x), RMSNorm(7, eps).double()(x), CRMSNorm(6, eps)(x[..., :-1])
    for y, key in zip(found, ("ln", "rms", "crms_of_first"), strict=True):
        assert distance(y, case[key]) < 1e-12


def _centred_linear(case: dict[str, torch.Tensor], weight: str, x: str) -> torch.Tensor:
    """The authors' linear map of mean zero, as the centring of a writer makes it."""
    rows = Action("w", (Part(0, (Factor("c", len(case[weight]), 1),)),), 0, "c")
    plane = replace(rows, parts=(*rows.parts, Part(0, (Factor("i", case[weight].shape[1], 1),))))
    bias = case["bias" if "bias" in case else "b"]
    return nn.functional.linear(case[x], CenterStep(plane).apply(case[weight]), CenterStep(rows).apply(bias))


def test_linear_maps_of_mean_zero_are_those_of_the_authors() -> None:
    first, second = golden("crmsnorm")["LinearZeroMeanOutput"], golden("crmsnorm_2")["outputs"]["lin"]
    assert distance(_centred_linear(first, "weight", "x"), first["y"]) < 1e-12
    assert distance(_centred_linear(second, "W", "z"), second["y"]) < 1e-12
    assert float(second["y"].mean(-1).abs().max()) < 1e-12


def test_three_norms_of_the_second_case() -> None:
    case = golden("crmsnorm_2")
    x, eps = case["inputs"]["x"], case["config"]["eps"]
    centred = x - x.mean(-1, keepdim=True)
    found = {
        "layer_norm": LayerNorm(16, eps).double()(x),
        "rms_of_centred": RMSNorm(16, eps).double()(centred),
        "crms": CRMSNorm(15, eps)(centred[..., :-1]),
    }
    for key, y in found.items():
        assert distance(y, case["outputs"][key]) < 1e-12, key
    assert distance(RMSNorm(16, eps).double()(x), case["outputs"]["layer_norm"]) > 1e-3


def test_rms_of_a_part_divides_all() -> None:
    x = tokens()
    y = RMSNorm(SIZE, 0.0, fraction=0.25).double()(x)
    assert distance(y, x / x[..., :3].square().mean(-1, keepdim=True).sqrt()) < 1e-12
    with pytest.raises(ValueError, match="0 of 12"):
        RMSNorm(SIZE, fraction=0.05)


@pytest.mark.parametrize("outside", [False, True])
def test_zero_has_a_gradient(outside: bool) -> None:
    x = torch.zeros(1, SIZE, requires_grad=True)
    RMSNorm(SIZE, outside=outside)(x).sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_laws(entry: object) -> None:
    laws_hold(entry)


MADE = [
    generic(LayerNorm(SIZE), torch.Generator().manual_seed(0)),
    generic(RMSNorm(SIZE, 1e-3, bias=True), torch.Generator().manual_seed(1)),
    generic(RMSNorm(SIZE, 1e-3, outside=True), torch.Generator().manual_seed(2)),
    generic(RMSNorm(SIZE, 1e-3, fraction=0.5), torch.Generator().manual_seed(3)),
    CRMSNorm(SIZE).eval(),
]


@pytest.mark.parametrize("layer", MADE, ids=lambda layer: layer.extra_repr())
def test_folds(layer: nn.Module) -> None:
    folded = layer.fold()
    assert distance(folded(tokens()), layer(tokens())) < 1e-12
    if isinstance(layer, CRMSNorm):
        assert folded is not layer
    else:
        bare, affine = folded
        assert not list(bare.parameters())
        assert affine.weight is not layer.weight
    layer.train()
    with pytest.raises(Refused, match="training"):
        layer.fold()
    layer.eval()


@pytest.mark.parametrize("layer", MADE, ids=lambda layer: layer.extra_repr())
def test_compiles_and_casts(layer: nn.Module) -> None:
    compiles(layer, tokens())
    survives_bfloat16(layer)


def test_states_round_trip() -> None:
    round_trips(MADE[0], LayerNorm(SIZE).double(), tokens())
    round_trips(MADE[1], RMSNorm(SIZE, 1e-3, bias=True).double(), tokens())


def test_upgrades() -> None:
    for norm in norms("layer"):
        becomes(LayerNorm, norm)
    for norm in norms("rms"):
        becomes(RMSNorm, norm.eval())
    bare = nn.RMSNorm(SIZE, eps=1e-6, elementwise_affine=False)
    assert distance(RMSNorm.upgrade_from(bare, size=SIZE)(tokens()), bare(tokens())) < 1e-14


def test_refuses() -> None:
    with pytest.raises(Refused, match="cannot become a LayerNorm"):
        LayerNorm.upgrade_from(nn.RMSNorm(SIZE, eps=1e-6))
    with pytest.raises(Refused, match="cannot become a RMSNorm"):
        RMSNorm.upgrade_from(nn.LayerNorm(SIZE))
    with pytest.raises(Refused, match="usual one"):
        RMSNorm.upgrade_from(nn.RMSNorm(SIZE, eps=1e-6), outside=True)
    with pytest.raises(Refused, match="one coordinate less"):
        CRMSNorm.upgrade_from(nn.RMSNorm(SIZE, eps=1e-6))
    with pytest.raises(Refused, match="not a plain norm"):
        RMSNorm.upgrade_from(nn.Linear(SIZE, SIZE))
