"""What is not there is refused: with the operation that limits it, in the module it is in, and a way out."""

from __future__ import annotations

import pytest

from regauge.errors import EXIT_REFUSED, Refused
from regauge.trace import module_path
from zoo import move, specimen


def refused(name: str, *moves: object) -> Refused:
    with pytest.raises(Refused) as caught:
        move(name, *moves)
    assert caught.value.exit_code == EXIT_REFUSED
    return caught.value


def where(name: str, error: Refused) -> str:
    """The module of the operation named, which must be the one the message says."""
    assert error.node is not None
    operation, _, module = error.node.partition(" in ")
    (node,) = [n for n in specimen(name).trace.graph.nodes if n.name == operation]
    assert module == (module_path(node) or "the model")
    return module


def test_norm_on_a_sublayer_output_stops_rotation() -> None:
    """Folding does not help, so the message names the norm that stays, not one that folds."""
    for before in ([], ["fold-scales"], ["untie", "fold-scales"]):
        error = refused("gemma3", *before, "rotate")
        assert where("gemma3", error) == "model.layers.0.post_attention_layernorm"
        assert "multiplied entry by entry" in str(error.found)
        assert error.way_out is None


def test_a_gain_in_the_way_can_be_folded() -> None:
    error = refused("llama", "rotate")
    assert where("llama", error) == "model.layers.0.input_layernorm"
    assert error.way_out is not None
    assert error.way_out.startswith("put fold-scales before it")
    assert "untie" not in error.way_out
    move("llama", "fold-scales", "rotate")


def test_a_tied_head_must_be_untied_first() -> None:
    for name in ("llama-tied", "gpt2"):
        assert "untie" in str(refused(name, "rotate").way_out)
        assert "untie" in str(refused(name, "fold-scales", "rotate").way_out)
        move(name, "untie", "fold-scales", "rotate")


def test_post_norm_residual() -> None:
    error = refused("bert", "untie", "fold-scales", "rotate")
    assert "LayerNorm" in where("bert", error)


def test_rms_norms_see_the_mean() -> None:
    error = refused("llama", "center")
    assert "mean" in error.message
    assert "RMS" in str(error.found)


def test_nothing_to_untie() -> None:
    assert "tied" in refused("llama", "untie").message
    refused("llama-tied", "untie", "untie")


def test_nothing_to_fold() -> None:
    refused("rectified", "fold-scales")
    refused("llama", "fold-scales", "fold-scales")


@pytest.mark.parametrize("name", ["qwen2", "turned_and_shared", "unit_queries", "with_sink"])
def test_key_biases_that_matter(name: str) -> None:
    assert "rotary" in str(refused(name, "drop-key-bias").found)


def test_value_bias_needs_weights_that_sum_to_one() -> None:
    refused("with_sink", "fold-value-bias")
    move("biased_keys", "fold-value-bias")


def test_value_bias_needs_a_bias_to_go_to() -> None:
    error = refused("qwen2", "fold-value-bias")
    assert "bias slot" in str(error.found) or "o_proj" in str(error.found)


def test_no_rotation_of_two_parallel_rms_and_mean_readers() -> None:
    """Pooled features fix the ones vector only."""
    moved = move("pooled_features", "rotate")
    assert {item["kind"] for item in moved.plan.used} == {"orthogonal-fixing-ones"}


@pytest.mark.parametrize("name", ["bell", "clamped", "odd_curve", "even_curve", "sorted_features"])
def test_functions_without_a_scale(name: str) -> None:
    error = refused(name, "rescale")
    assert error.node is not None
    where(name, error)


def test_mixed_positions_and_features() -> None:
    refused("rolled_features", "permute")


def test_hadamard_of_an_order_that_has_none() -> None:
    """Heads of width six: no Hadamard matrix exists, and the refusal says so."""
    error = refused("llama", "fold-scales", {"name": "rotate", "style": "hadamard", "space": "heads"})
    assert "6" in str(error)
    move("llama", "fold-scales", {"name": "rotate", "style": "hadamard"})


def test_an_error_survives_a_process_boundary() -> None:
    import pickle

    error = refused("gemma3", "rotate")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.to_dict() == error.to_dict()
