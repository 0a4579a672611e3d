"""What must come out for well-known architectures: groups, sizes, dependence, and the limits named.

Names of modules occur here because a test has to point at something; the library never sees one.
"""

from __future__ import annotations

import pytest

from regauge.atlas import Atlas, Generator, Kind, Space
from zoo import CONFIGS, HOSTILE, atlas, specimen

GROUPS = (Kind.PERMUTATION, Kind.COMPLEX, Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)
RMS = ("llama", "llama-tied", "qwen2", "qwen3", "phi3", "mixtral", "t5")
MEAN = ("gpt2", "gptj", "neox", "opt", "vit", "falcon")
POST = ("bert", "bloom")


def after(name: str) -> Atlas:
    found = atlas(name).folded
    assert found is not None
    return found


def residual(found: Atlas) -> Space:
    return max(found.spaces, key=lambda space: (len(space.parameters), space.size))


def on(found: Atlas, suffix: str, axis: int, offset: int = 0) -> list[Generator]:
    """Generators that act along an axis of the parameter whose name ends so, on the part at an offset."""
    return [
        generator
        for generator in found.generators
        if any(
            action.parameter.endswith(suffix) and action.axis == axis and action.parts[axis].offset == offset
            for action in generator.actions
        )
    ]


def shape(generator: Generator) -> tuple[Kind, int, tuple[int, ...]]:
    return generator.kind, generator.size, tuple(size for _, size in generator.copies)


def shapes(found: Atlas, suffix: str, axis: int, offset: int = 0) -> set[tuple[Kind, int, tuple[int, ...]]]:
    return {shape(generator) for generator in on(found, suffix, axis, offset)}


def limit(space: Space, kind: Kind) -> str:
    found = next(x for x in space.limits if x.kind is kind)
    return f"{found.reason} / {found.module} / {found.node}"


# --- the residual stream ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RMS)
def test_residual_behind_rms_norms(name: str) -> None:
    space = residual(atlas(name))
    assert space.size == 24
    assert Kind.ORTHOGONAL not in space.admits
    assert {Kind.PERMUTATION, Kind.SIGN} <= set(space.admits)
    assert "multiplied entry by entry" in limit(space, Kind.ORTHOGONAL)
    assert "norm" in limit(space, Kind.ORTHOGONAL)
    assert Kind.ORTHOGONAL in space.admits_folded
    assert Kind.NULL not in space.admits_folded
    whole = residual(after(name))
    assert Kind.ORTHOGONAL in whole.admits
    assert not whole.copies
    assert "itself" in limit(whole, Kind.GENERAL_LINEAR)


@pytest.mark.parametrize("name", MEAN)
def test_residual_behind_layer_norms(name: str) -> None:
    space = residual(atlas(name))
    assert {Kind.PERMUTATION, Kind.NULL} <= set(space.admits)
    assert not {Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES} & set(space.admits)
    whole = residual(after(name))
    assert {Kind.ORTHOGONAL_ONES, Kind.NULL} <= set(whole.admits)
    assert "mean" in limit(whole, Kind.ORTHOGONAL)


@pytest.mark.parametrize("name", POST)
def test_a_gain_that_also_feeds_the_sum_stays(name: str) -> None:
    for found in (atlas(name), after(name)):
        space = residual(found)
        kinds = {g.kind for g in found.generators if g.space == space.id and g.kind in GROUPS}
        assert kinds == {Kind.PERMUTATION}
        assert "LayerNorm" in limit(space, Kind.ORTHOGONAL) or "layernorm" in limit(space, Kind.ORTHOGONAL)


def test_norms_on_both_sides_leave_signed_permutations() -> None:
    """The limit that stays after folding is the norm on what a sublayer returns."""
    space = residual(after("gemma3"))
    kinds = {g.kind for g in after("gemma3").generators if g.space == space.id}
    assert kinds == {Kind.PERMUTATION, Kind.SIGN}
    assert "post_attention_layernorm" in limit(space, Kind.ORTHOGONAL)
    assert all("post_" not in gain for gain in atlas("gemma3").folds)
    assert len(atlas("gemma3").folds) == 5


def test_writers_and_readers_are_all_there() -> None:
    (turn,) = [g for g in after("llama").generators if g.kind is Kind.ORTHOGONAL]
    sides = {(a.parameter, a.axis): int(a.exponent) for a in turn.actions}
    expected = {("model.embed_tokens.weight", 1), ("lm_head.weight", 1)}
    for layer in range(2):
        path = f"model.layers.{layer}."
        expected |= {(f"{path}self_attn.{x}_proj.weight", 1) for x in "qkv"}
        expected |= {(f"{path}mlp.{x}_proj.weight", 1) for x in ("gate", "up")}
        expected |= {(f"{path}self_attn.o_proj.weight", 0), (f"{path}mlp.down_proj.weight", 0)}
    assert set(sides) == expected
    assert len(turn.actions) == len(expected)


def test_the_last_norm_of_a_tied_model_folds_only_after_untying() -> None:
    for name, last in (("gpt2", "transformer.ln_f.weight"), ("llama-tied", "model.norm.weight")):
        gauge = specimen(name).gauge
        assert last not in gauge.foldable(untied=False)
        assert last in gauge.foldable(untied=True)
        assert residual(atlas(name)).unties == ("lm_head.weight",)
    assert residual(atlas("llama")).unties == ()


def test_encoder_and_decoder_are_two_streams() -> None:
    turns = {name: [g for g in after(name).generators if g.kind in (Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES)]
             for name in ("t5", "whisper")}  # fmt: skip
    assert [g.kind for g in turns["t5"]] == [Kind.ORTHOGONAL] * 2
    # The encoder's first convolutions are GELU: their output is no more than a permutation.
    assert [g.kind for g in turns["whisper"]] == [Kind.ORTHOGONAL_ONES]
    assert any(
        "gelu" in x.reason for s in after("whisper").spaces for x in s.limits if x.kind is Kind.ORTHOGONAL
    )


# --- heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "offset", "size", "heads"),
    [
        ("llama", "0.self_attn.v_proj.weight", 0, 6, 2),
        ("qwen2", "0.self_attn.v_proj.weight", 0, 6, 2),
        ("qwen3", "0.self_attn.v_proj.weight", 0, 8, 2),
        ("phi3", "0.self_attn.qkv_proj.weight", 36, 6, 2),
        ("gemma3", "1.self_attn.v_proj.weight", 0, 8, 2),
        ("mixtral", "0.self_attn.v_proj.weight", 0, 6, 2),
        ("neox", "0.attention.query_key_value.weight", 12, 6, 4),
        ("bloom", "0.self_attention.query_key_value.weight", 12, 6, 4),
        ("opt", "0.self_attn.v_proj.weight", 0, 6, 4),
        ("bert", "value.weight", 0, 6, 4),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.v.weight", 0, 5, 4),
        ("whisper", "decoder.layers.0.encoder_attn.v_proj.weight", 0, 6, 4),
    ],
)
def test_values_are_general_linear_per_head(
    name: str, value: str, offset: int, size: int, heads: int
) -> None:
    assert (Kind.GENERAL_LINEAR, size, (heads,)) in shapes(atlas(name), value, 0, offset)


def test_values_of_transposed_storage() -> None:
    """The axis comes from the operation: here inputs come first."""
    assert (Kind.GENERAL_LINEAR, 6, (4,)) in shapes(atlas("gpt2"), "attn.c_attn.weight", 1, 48)
    assert (Kind.GENERAL_LINEAR, 6, (4,)) in shapes(atlas("gpt2"), "attn.c_attn.bias", 0, 48)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_turned_queries_and_keys_are_complex_per_pair(name: str) -> None:
    found = atlas(name)
    assert shapes(found, "0.self_attn.k_proj.weight", 0) == {
        (Kind.PERMUTATION, 2, ()),
        (Kind.COMPLEX, 2, (2, 3)),
    }
    assert shapes(found, "0.self_attn.q_proj.weight", 0) == {
        (Kind.PERMUTATION, 2, ()),  # groups
        (Kind.PERMUTATION, 2, (2,)),  # queries within a group
        (Kind.COMPLEX, 2, (2, 3)),  # one number for a pair, shared by the queries of a group
    }


def test_partly_turned_heads() -> None:
    found = atlas("gptj")
    assert (Kind.COMPLEX, 2, (4, 2)) in shapes(found, "q_proj.weight", 0, 0)
    assert (Kind.GENERAL_LINEAR, 2, (4,)) in shapes(found, "q_proj.weight", 0, 4)


def test_a_gain_on_queries_leaves_scales() -> None:
    """Shared over the heads: one number for a pair, taken from the keys' gain."""
    for name in ("qwen3", "gemma3"):
        assert not list(atlas(name).of_kind(Kind.COMPLEX))
        assert (Kind.SCALE, 4, ()) in shapes(atlas(name), "0.self_attn.q_norm.weight", 0)


def test_unturned_queries_and_keys_are_general_linear_with_their_biases() -> None:
    for name, place in (("gpt2", "c_attn.bias"), ("bloom", "query_key_value.bias"), ("opt", "q_proj.bias")):
        assert (Kind.GENERAL_LINEAR, 6, (4,)) in shapes(atlas(name), place, 0)


@pytest.mark.parametrize(
    ("name", "bias"),
    [("gpt2", "c_attn.bias"), ("opt", "k_proj.bias"), ("bert", "key.bias"), ("vit", "k_proj.bias")],
)
def test_key_bias_is_null_without_rotary(name: str, bias: str) -> None:
    nulls = [a for g in atlas(name).of_kind(Kind.NULL) for a in g.actions if a.exponent == 0]
    assert [a.parameter.endswith(bias) for a in nulls] == [True]


def test_key_bias_matters_with_rotary() -> None:
    assert not [a for g in atlas("qwen2").of_kind(Kind.NULL) for a in g.actions]


def test_only_the_unturned_part_of_a_key_bias_is_null() -> None:
    (part,) = [a for g in atlas("neox").of_kind(Kind.NULL) for a in g.actions if a.exponent == 0]
    assert part.parts[0].offset == 8  # three blocks of six for a head; the second is keys, two of it turned
    assert part.parts[0].size == 16


def test_fused_layouts_agree() -> None:
    """Three ways to store queries, keys and values: the same groups."""
    one, two, three = (
        sorted(map(shape, atlas(name).generators))
        for name in ("fused_in_blocks", "fused_by_head", "fused_interleaved")
    )
    assert one == two == three
    assert one.count((Kind.GENERAL_LINEAR, 4, (3,))) == 2


def test_sharing_keys_is_understood_however_it_is_written() -> None:
    one, two = (
        sorted(map(shape, atlas(name).generators)) for name in ("shared_by_expand", "shared_by_repeat")
    )
    assert one == two
    assert (Kind.PERMUTATION, 3, (2,)) in one
    assert (Kind.GENERAL_LINEAR, 5, (2,)) in one


def test_heads_told_apart_by_constants_do_not_permute() -> None:
    for name in ("sloped_heads", "bloom"):
        assert (Kind.PERMUTATION, 4, ()) not in {shape(g) for g in atlas(name).generators}
    assert (Kind.PERMUTATION, 4, ()) in {shape(g) for g in atlas("with_sink").generators}


# --- hidden units ----------------------------------------------------------------------------------------


def hidden(name: str, parameter: str, axis: int = 0) -> set[tuple[Kind, int, tuple[int, ...]]]:
    return shapes(atlas(name), parameter, axis)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_gelu_units_only_permute(name: str) -> None:
    place = {"gpt2": ("c_fc.bias", 0), "bert": ("intermediate.dense.bias", 0), "vit": ("mlp.fc1.bias", 0)}[
        name
    ]
    linear = {x for x in hidden(name, *place) if x[0] is not Kind.TRANSLATION}
    assert linear == {(Kind.PERMUTATION, 20, ())}


@pytest.mark.parametrize(
    ("name", "first"),
    [("opt", "fc1.weight"), ("t5", "encoder.block.0.layer.1.DenseReluDense.wi.weight")],
)
def test_relu_units_permute_and_scale(name: str, first: str) -> None:
    own = {x for x in hidden(name, first) if x[1] > 1}  # without the sign of everything
    assert own == {(Kind.PERMUTATION, 20, ()), (Kind.POSITIVE, 20, ())}


def test_gated_units_scale_up_but_not_gate() -> None:
    assert hidden("llama", "0.mlp.up_proj.weight") == {(Kind.PERMUTATION, 20, ()), (Kind.SCALE, 20, ())}
    assert hidden("llama", "0.mlp.gate_proj.weight") == {(Kind.PERMUTATION, 20, ())}
    assert hidden("gate_rectified", "u.weight") == {(Kind.PERMUTATION, 9, ()), (Kind.POSITIVE, 9, ())}


def test_experts_permute_with_the_router_and_inside() -> None:
    found = atlas("mixtral")
    (experts,) = [g for g in on(found, "mlp.gate.weight", 0) if g.kind is Kind.PERMUTATION]
    assert shape(experts) == (Kind.PERMUTATION, 4, ())
    assert {a.parameter.rpartition(".")[2] for a in experts.actions} == {
        "weight",
        "gate_up_proj",
        "down_proj",
    }
    inside = shapes(found, "experts.down_proj", 2)
    assert inside == {(Kind.PERMUTATION, 20, (4,)), (Kind.SCALE, 20, (4,))}
    assert any(a.parameter.endswith("mlp.gate.weight") for g in found.of_kind(Kind.SCALE) for a in g.actions)


def test_channels_of_a_residual_network() -> None:
    kinds = hidden("resnet", "stages.0.layers.0.layer.0.convolution.weight")
    assert {(Kind.PERMUTATION, 8, ()), (Kind.POSITIVE, 8, ()), (Kind.SCALE, 8, ())} == kinds
    assert any("running_mean" in p for g in atlas("resnet").generators for p in g.parameters)


# --- and never more than there is --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spectrum_in_a_branch", "foreign_operation"])
def test_an_unknown_operation_is_named_and_rigid(name: str) -> None:
    found = atlas(name)
    assert len(found.refusals) == 1
    nodes = {node.name for node in specimen(name).trace.graph.nodes}
    assert found.refusals[0].node in nodes
    touched = {p for g in found.generators if g.kind in GROUPS for p in g.parameters}
    assert "c.weight" not in touched
    assert touched <= {"a.weight", "a.bias", "b.weight"}


@pytest.mark.parametrize("name", [*HOSTILE, *CONFIGS])
def test_every_limit_names_what_it_met(name: str) -> None:
    """Operations exist, reasons are words, and a space that admits nothing says why."""
    nodes = {node.name for node in specimen(name).trace.graph.nodes}
    found = atlas(name)
    for space in found.spaces:
        assert all(x.node in nodes and " " in x.reason for x in space.limits)
        stopped = {x.kind for x in space.limits} - {
            Kind.TRANSLATION
        }  # some biases may pass where others do not
        assert not set(space.admits) & stopped
        assert space.admits or space.limits
    generators = {g.id for g in found.generators}
    assert len(generators) == len(found.generators)
    held = {space.id for space in found.spaces}
    assert all(g.space in held or g.space == "whole tensors" for g in found.generators)
