"""RepBN, PRepBN and the merging of what they fold to, against the authors' runs and by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from norm_steps import check_steps, golden, load, near, randn, same_state
from regauge.errors import BadInput, Refused
from regauge.nn import Affine
from regauge.nn.absorb import merge_into_next, merge_into_previous
from regauge.nn.repbn import PRepBN, RepBN, merge_patch_embedding

GOLDEN = golden("prepbn")
PROGRESSIVE = ("linearnorm_warm2_step5", "linearnorm_warm0_step4_r05")


def names(name: str) -> str | None:
    renamed = {"iter": "left", "num_step": "calls", "total_step": None}
    return renamed.get(name, name.replace("bn.", ""))


def repbn(state: dict[str, torch.Tensor]) -> RepBN:
    layer = RepBN(6, dtype=torch.float64)
    load(layer, state, names)
    return layer


def same_as(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        near(value, state[name], name)


def test_repbn_steps_are_those_of_the_authors() -> None:
    case = GOLDEN["repbn"]
    layer = repbn(case["init"])
    check_steps(layer, case, names, lambda step, x: layer(x))
    same_state(layer, case["eval"]["state"], names, "at the end")
    near(layer(case["eval"]["x"]), case["eval"]["y"], "evaluation")
    near(layer.fold()(case["eval"]["x"]), case["eval"]["y"], "folded")


@pytest.mark.parametrize("name", PROGRESSIVE)
def test_progressive_steps_are_those_of_the_authors(name: str) -> None:
    case = GOLDEN[name]
    config = case["config"]
    layer = PRepBN(
        6, "layer", config["ln_eps"], config["warm"], config["step"], config["r0"], dtype=torch.float64
    )
    load(layer, {**case["init"], "num_step": torch.zeros((), dtype=torch.long)}, names)

    def evaluate(number: int) -> None:
        layer.eval()
        near(layer(case["eval_each"][number]["x"]), case["eval_each"][number]["y"], f"evaluation {number}")
        layer.train()

    check_steps(layer, case, names, lambda step, x: layer(x), evaluate)
    same_state(layer, case["final_state"], names, "at the end")
    last = case["eval_each"][-1]
    near(layer.fold()(last["x"]), last["y"], "folded")


def test_language_model_steps_are_those_of_the_authors() -> None:
    case = GOLDEN["llama_linearnorm"]
    config = case["config"]
    layer = PRepBN(
        6,
        "rms",
        config["eps"],
        config["warm"],
        config["step"],
        config["r0"],
        every=16,
        zero_gain=True,
        pass_padding=True,
        dtype=torch.float64,
    )
    same_state(layer, case["init"], names, "at the start")
    for step in case["steps"]:
        what = f"call {step['call']}"
        load(layer, step["state_before"], names)
        # The authors' RMSNorm works in float32; what comes from norm2 alone is exact.
        ended = int(step["state_before"]["iter"]) == 0
        near(layer(step["x"], step["pad_mask"] == 0), step["y"], what, 1e-12 if ended else 1e-6)
        same_state(layer, step["state_after"], names, f"after {what}")
    load(layer.eval(), case["eval"]["state"], names)
    near(layer(case["eval"]["x"]), case["eval"]["y"], "evaluation")
    near(layer.fold()(case["eval"]["x"]), case["eval"]["y"], "folded")


def test_a_block_is_merged_as_by_the_authors() -> None:
    case = GOLDEN["merge_block"]
    for norm, linear in (("norm1", "qkv"), ("norm2", "fc1")):
        state = case["before"][linear]
        old = nn.Linear(6, len(state["weight"]), dtype=torch.float64)
        old.load_state_dict(state)
        new = merge_into_next(repbn(case["before"][norm]).eval().fold(), old)
        same_as(new, case[f"{linear}_merged"])
        near(new(case["x"]), case[f"{linear}_out"], linear)


def test_a_patch_embedding_is_merged_and_the_published_way_is_wrong() -> None:
    case = GOLDEN["merge_patch_embed_BUGGY"]
    conv = nn.Conv2d(3, 6, 2, 2, dtype=torch.float64)
    conv.load_state_dict(case["before"]["proj"])
    norm = repbn(case["before"]["norm"]).eval()
    y = merge_patch_embedding(conv, norm)(case["img"]).flatten(2).transpose(1, 2)
    near(y, case["y"], "merged")
    published = merge_patch_embedding(conv, norm, published=True)
    same_as(published, case["proj_merged_by_authors"])
    wrong = published(case["img"]).flatten(2).transpose(1, 2)
    near(wrong, case["y_from_merged"], "published")
    error = (wrong - case["y"]).abs().max().item()
    assert error == pytest.approx(case["max_err"], rel=1e-10)
    assert error > 0.2


@pytest.mark.parametrize("form", ["layer", "rms"])
def test_a_norm_becomes_one_while_it_has_all_the_share(form: str) -> None:
    norm = (nn.LayerNorm if form == "layer" else nn.RMSNorm)(6, 1e-4, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(norm.parameters()):
            parameter.copy_(randn(6, seed=number))
    x = randn(4, 5, 6, seed=3)
    layer = PRepBN.upgrade_from(norm, warm=1, steps=4)
    assert layer.training
    for _ in range(2):  # the warm step and the first one behind it
        assert torch.allclose(layer(x), norm(x), rtol=0, atol=1e-14)
    assert not torch.allclose(layer(x), norm(x), rtol=0, atol=1e-3)
    now = PRepBN.upgrade_from(norm.eval(), evaluate="now")
    assert not now.training
    assert torch.allclose(now(x), norm(x), rtol=0, atol=1e-14)


def test_evaluation_now_is_what_is_trained() -> None:
    layer = PRepBN(6, steps=4, evaluate="now", momentum=1.0, dtype=torch.float64)
    x = randn(50, 6)
    layer(x)
    with torch.no_grad():
        layer.norm2.running_var.mul_(49 / 50)  # biased, as in training
    found = layer.eval()(x)
    assert torch.allclose(found, layer.train()(x), rtol=0, atol=1e-13)
    assert float(layer.share()) == 0.5


def test_padding_does_not_count() -> None:
    """Whatever padding holds, the other positions and the statistics are those of the batch without it."""
    x, pad = randn(3, 4, 6), torch.zeros(3, 4, dtype=torch.bool)
    pad[1, 2:] = True
    one, two = RepBN(6, dtype=torch.float64), RepBN(6, dtype=torch.float64)
    y = one(torch.where(pad[..., None], 100 * x, x), pad)
    assert torch.allclose(y[~pad], two(x[~pad]), rtol=0, atol=1e-14)
    assert torch.allclose(one.running_var, two.running_var, rtol=1e-14)
    passing = RepBN(6, pass_padding=True, dtype=torch.float64)
    assert torch.equal(passing(x, pad)[pad], x[pad] + passing.alpha * x[pad])


def test_what_is_refused() -> None:
    norm = nn.LayerNorm(6)
    with pytest.raises(Refused, match="batch norm alone"):
        PRepBN.upgrade_from(norm.eval())
    with pytest.raises(Refused, match="does not start"):
        PRepBN.upgrade_from(norm.train(), start=0.5)
    with pytest.raises(Refused, match="does not start"):
        PRepBN.upgrade_from(norm, first="rms")
    with pytest.raises(Refused, match="cannot become"):
        PRepBN.upgrade_from(nn.BatchNorm1d(6))
    layer = PRepBN(6, steps=2)
    with pytest.raises(Refused, match="training mode"):
        layer.fold()
    for _ in range(2):
        with pytest.raises(Refused, match="middle of its schedule"):
            layer.eval().fold()
        layer.train()(torch.randn(4, 6))
    assert isinstance(layer.eval().fold(), Affine)
    with pytest.raises(BadInput, match="no such kind"):
        PRepBN(6, "batch")
    with pytest.raises(BadInput, match="schedule"):
        PRepBN(6, steps=0)


# --- merging ----------------------------------------------------------------------------------------------


def affine(size: int, axis: int, weight: bool = True, bias: bool = True) -> Affine:
    return Affine(randn(size, seed=7) if weight else None, randn(size, seed=8) if bias else None, axis)


CONVS = {
    "plain": nn.Conv2d(6, 4, 3, dtype=torch.float64),
    "strided without bias": nn.Conv2d(6, 4, 3, 2, bias=False, dtype=torch.float64),
    "grouped": nn.Conv2d(6, 4, 3, groups=2, dtype=torch.float64),
    "depthwise": nn.Conv2d(6, 12, 3, groups=6, dtype=torch.float64),
    "reflecting": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", dtype=torch.float64),
    "point-wise, same": nn.Conv2d(6, 4, 1, padding="same", dtype=torch.float64),
    "one axis": nn.Conv1d(6, 4, 3, dtype=torch.float64),
    "three axes": nn.Conv3d(6, 4, 2, padding="valid", dtype=torch.float64),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("has", [(True, True), (True, False), (False, True)])
def test_convolutions_take_in_an_affine_map(name: str, has: tuple[bool, bool]) -> None:
    conv = CONVS[name]
    x = randn(2, 6, *(5,) * (conv.weight.dim() - 2))
    before = affine(6, 1, *has)
    near(merge_into_next(before, conv)(x), conv(before(x)), name)
    behind = affine(conv.out_channels, 1, *has)
    near(merge_into_previous(conv, behind)(x), behind(conv(x)), name)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_take_in_an_affine_map(bias: bool) -> None:
    linear, x = nn.Linear(6, 4, bias, dtype=torch.float64), randn(2, 3, 6)
    near(merge_into_next(affine(6, -1), linear)(x), linear(affine(6, -1)(x)), "next")
    near(merge_into_previous(linear, affine(4, -1))(x), affine(4, -1)(linear(x)), "previous")
    assert merge_into_next(affine(6, -1, bias=False), nn.Linear(6, 4, False)).bias is None


@pytest.mark.parametrize("padding", [1, "same", (0, 1)])
def test_a_shift_before_zero_padding_is_refused(padding: int | str | tuple[int, int]) -> None:
    conv, x = nn.Conv2d(6, 4, 3, padding=padding, dtype=torch.float64), randn(2, 6, 5, 5)
    with pytest.raises(Refused, match="pads by zeros"):
        merge_into_next(affine(6, 1), conv)
    scale = affine(6, 1, bias=False)
    near(merge_into_next(scale, conv)(x), conv(scale(x)), "a gain alone")
    near(merge_into_previous(conv, affine(4, 1))(x), affine(4, 1)(conv(x)), "behind it")


def test_what_is_not_merged() -> None:
    linear = nn.Linear(6, 4)
    with pytest.raises(Refused, match="another axis"):
        merge_into_next(affine(6, 1), linear)
    with pytest.raises(Refused, match="another axis"):
        merge_into_previous(nn.Conv2d(6, 4, 3), affine(4, -1))
    with pytest.raises(Refused, match="another size"):
        merge_into_next(affine(5, -1), linear)
    with pytest.raises(Refused, match="only a linear map"):
        merge_into_next(affine(6, 1), nn.ConvTranspose2d(6, 6, 3))

    class Other(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    with pytest.raises(Refused, match="only a linear map"):
        merge_into_previous(Other(6, 4), affine(4, -1))
    linear.register_forward_hook(lambda module, args, y: y.relu())
    with pytest.raises(Refused, match="hooks"):
        merge_into_previous(linear, affine(4, -1))
