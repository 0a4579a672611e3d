"""Comparing directories: copies in another gauge, changed copies, and models that have nothing in common."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from regauge.cli import app
from regauge.comparing import Relation, compare
from regauge.comparing.align import align
from regauge.comparing.kinds import Kind
from regauge.errors import Refused
from regauge.recipe import parse_recipe
from regauge.rewriting import rewrite

DISGUISE = (
    {"name": "untie"},
    {"name": "fold-shifts"},
    {"name": "fold-scales"},
    {"name": "fold-value-bias"},
    {"name": "drop-key-bias"},
    {"name": "center"},
    {"name": "rotate", "space": "all"},
    {"name": "rescale", "mode": "random"},
    {"name": "permute", "signs": True},
)
RMS = tuple({**move, "norm": "rms"} if move["name"] == "center" else move for move in DISGUISE)


def _saved(model: Any, path: Path, seed: int) -> Path:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            centre = 1.0 if parameter.dim() < 2 else 0.0
            parameter.copy_(centre + wide * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(path)
    return path


def _llama(path: Path, seed: int = 0) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _saved(transformers.LlamaForCausalLM(config), path, seed)


def _gpt2(path: Path, seed: int = 0) -> Path:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _saved(transformers.GPT2LMHeadModel(config), path, seed)


def _disguised(
    source: Path, out: Path, moves: tuple[Mapping[str, Any], ...] = DISGUISE, dtype: torch.dtype | None = None
) -> Path:
    recipe = parse_recipe({"moves": [{**move, "optional": True} for move in moves]})
    rewrite(source, out, recipe, seed=11, dtype=dtype)
    return out


def _changed(source: Path, out: Path, change: Any) -> Path:
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: change(name, tensor).contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _llama(tmp_path_factory.mktemp("llama") / "a")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _gpt2(tmp_path_factory.mktemp("gpt2") / "a")


def test_a_copy_in_another_gauge_is_seen_through_its_rounding_shards_and_class(
    llama: Path, tmp_path: Path
) -> None:
    """Every generator drawn, bfloat16, several shards, and another model type: Mistral is Llama here."""
    import transformers

    moved = _disguised(llama, tmp_path / "moved", dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(moved, dtype=torch.bfloat16)
    config = json.loads((moved / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    out = tmp_path / "b"
    model.save_pretrained(out, max_shard_size="20KB")
    (out / "config.json").write_text(json.dumps(config))
    assert len(list(out.glob("*.safetensors"))) > 2
    found = compare(llama, out)
    assert found.relation is Relation.WITHIN_ROUNDING
    assert found.relative is not None
    assert found.relative < 4e-3
    assert {row.kind for row in found.gauge} >= {
        "permutation",
        "scale",
        "complex",
        "orthogonal",
        "general-linear",
    }
    assert all(row.moved > 0 for row in found.gauge)
    assert found.only_a == found.only_b == ()


def test_layernorm_and_rmsnorm_are_two_encodings_of_one_function(gpt2: Path, tmp_path: Path) -> None:
    found = compare(gpt2, _disguised(gpt2, tmp_path / "b", RMS))
    assert found.equivalent
    assert found.relative is not None
    assert found.relative < 1e-5


def test_another_seed_is_unrelated_and_the_exit_code_says_so(llama: Path, tmp_path: Path) -> None:
    other = _llama(tmp_path / "b", seed=1)
    result = CliRunner().invoke(app, ["compare", str(llama), str(other), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["relation"] == "unrelated"
    assert found["similarity"] < found["threshold"]


def _four_bits(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor
    step = tensor.abs().amax(1, keepdim=True) / 7
    return (tensor / step).round() * step


def _no_neurons(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Every fifth hidden unit without weights."""
    axis = next((axis for axis, size in enumerate(tensor.shape) if size == 48), None)
    if axis is None:
        return tensor
    kept = (torch.arange(48) % 5 != 0).to(tensor.dtype)
    return tensor * (kept[:, None] if axis == 0 else kept)


@pytest.mark.parametrize(("change", "named"), [(_four_bits, Kind.QUANTISED), (_no_neurons, Kind.ZEROED)])
def test_a_changed_copy_is_derived_and_the_change_is_named(
    llama: Path, tmp_path: Path, change: Any, named: Kind
) -> None:
    moved = _disguised(_changed(llama, tmp_path / "changed", change), tmp_path / "b")
    found = compare(llama, moved)
    assert found.relation is Relation.DERIVED
    assert [item.kind for item in found.changes] == [str(named)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_aligned_copy_has_the_weights_of_the_original(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Rotated, permuted, rescaled, folded and back: up to the rounding of float32, tensor by tensor."""
    source: Path = request.getfixturevalue(family)
    moved = _disguised(source, tmp_path / "moved")
    before, after = load_file(source / "model.safetensors"), load_file(moved / "model.safetensors")
    found = align(source, moved, tmp_path / "b")
    assert found.result.certificate.passed
    aligned = load_file(tmp_path / "b" / "model.safetensors")
    assert aligned.keys() >= before.keys()
    for name, tensor in before.items():
        error = float((aligned[name] - tensor).norm() / tensor.norm())
        assert error < 2e-5, name
    assert any(float((after[n] - t).norm() / t.norm()) > 0.5 for n, t in before.items())


def test_other_sizes_cannot_be_aligned_into_a_directory(llama: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(llama)
    config.intermediate_size = 40
    other = _saved(transformers.LlamaForCausalLM(config), tmp_path / "b", 0)
    with pytest.raises(Refused, match="sizes"):
        align(llama, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert math.isfinite(compare(llama, other).similarity or math.nan)
