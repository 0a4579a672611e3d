"""Tensors under names that say nothing are found again by what they hold."""

from __future__ import annotations

import random
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regauge.checkpoint import Checkpoint
from regauge.comparing import Relation, compare
from regauge.errors import CheckpointError, Refused
from regauge.model import CheckpointModel
from regauge.recipe import parse_recipe
from regauge.renaming import Renamed, named_again
from regauge.renaming.anchors import matrix_features
from regauge.renaming.assign import Assignment
from regauge.rewriting import rewrite
from test_compare import DISGUISE


def renamed(source: Path, out: Path, *, parts: bool) -> dict[str, str]:
    """A copy under random names: a word for each part of a path, or another word for each tensor."""
    draw = random.Random(1)
    words: dict[str, str] = {}

    def word(part: str) -> str:
        return part if part.isdigit() else words.setdefault(part, f"w{draw.getrandbits(40):x}")

    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, out)
    names = {n: ".".join(word(p) for p in n.split(".")) if parts else word(n + " ") for n in tensors}
    save_file({names[n]: v for n, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return names


@contextmanager
def again(a: Path, b: Path) -> Generator[tuple[Path, Renamed | None]]:
    """Where the copy of b lies, and what was named again."""
    with (
        Checkpoint.open(a) as files_a,
        Checkpoint.open(b) as files_b,
        named_again(CheckpointModel.of(a, files_a), b, files_b) as (model, found),
    ):
        yield model.files.path, found


SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def built(name: str) -> Any:
    """Vectors of a head have 16 entries here: fewer say too little."""
    import transformers as tf

    models = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=16)),
        "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8)),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=211, n_embd=64, n_layer=2, n_head=8, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        ),
        "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=112, word_embed_proj_dim=64)),
    }
    return models[name]()


def disguised(name: str, tmp_path: Path) -> tuple[Path, Path]:
    model = built(name)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = parameter.mean() if parameter.dim() < 2 else 0.0
            wide = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(centre + wide * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(tmp_path / "a")
    recipe = parse_recipe({"moves": [{**move, "optional": True} for move in DISGUISE]})
    rewrite(tmp_path / "a", tmp_path / "b", recipe, dtype=torch.bfloat16, seed=3)
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize(
    ("name", "parts"),
    [("qwen3", True), ("opt", True), ("gemma3", True), ("llama", False), ("gpt2", False)],
)
def test_every_tensor_gets_its_name_back(name: str, parts: bool, tmp_path: Path) -> None:
    """Where names have no structure, vectors of few entries may be exchanged, and are said to be unsure."""
    a, b = disguised(name, tmp_path)
    names = renamed(b, tmp_path / "c", parts=parts)
    before = load_file(b / "model.safetensors")
    with again(a, tmp_path / "c") as (place, found):
        assert found is not None
        assert found.count == len(names)
        after = load_file(place / "model.safetensors")
        assert after.keys() == before.keys()
        wrong = {key for key in before if not torch.equal(after[key], before[key])}
        assert wrong <= (set() if parts else set(found.unsure))
        assert len(wrong) <= 6
        assert sorted(p.name for p in place.iterdir()) == sorted(p.name for p in b.iterdir())
    assert not place.exists()


def test_names_that_are_known_are_left_alone(tmp_path: Path) -> None:
    a, b = disguised("llama", tmp_path)
    with again(a, b) as (place, found):
        assert place == b
        assert found is None


def test_a_copy_under_other_names_is_equivalent_and_another_model_is_not(tmp_path: Path) -> None:
    a, b = disguised("llama", tmp_path)
    renamed(b, tmp_path / "c", parts=True)
    found = compare(a, tmp_path / "c")
    assert found.relation is Relation.WITHIN_ROUNDING
    assert found.b == "c"
    assert found.renamed == len(load_file(b / "model.safetensors"))
    assert found.certificate is not None
    assert found.certificate.b.name == "c"
    draw = torch.Generator().manual_seed(5)
    strange = {n: torch.randn(t.shape, generator=draw) for n, t in load_file(b / "model.safetensors").items()}
    save_file(strange, b / "model.safetensors", metadata={"format": "pt"})
    renamed(b, tmp_path / "d", parts=False)
    with pytest.raises(Refused, match="do not tell them apart"):
        compare(a, tmp_path / "d")


def test_other_shapes_are_missing_tensors(tmp_path: Path) -> None:
    a, b = disguised("llama", tmp_path)
    renamed(b, tmp_path / "c", parts=True)
    path = tmp_path / "c" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name, value in tensors.items() if value.dim() == 2))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((Refused, CheckpointError)), again(a, tmp_path / "c"):
        pass


def test_features_do_not_move_with_the_gauge() -> None:
    draw = torch.Generator().manual_seed(0)
    e, w = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((40, 12), (12, 30)))
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0] for n in (12, 30))
    before = matrix_features(w, [e])
    after = matrix_features(q.mT @ w @ r, [e @ q])
    cosines = [float(x @ y) for x, y in zip(before, after, strict=True)]
    assert cosines[1] > 1 - 1e-12
    other = matrix_features(torch.randn(12, 30, generator=draw, dtype=torch.float64), [e])
    assert abs(float(before[1] @ other[1])) < 0.3


class Nobody:
    """A model that has none of the parameters."""

    def forms(self, name: str) -> list[torch.Tensor]:
        return []

    def scaled(self, name: str) -> None:
        return None

    def chart(self, name: str) -> float:
        return 0.0


def test_without_a_counterpart_the_order_of_names_decides_and_nothing_is_sure() -> None:
    held = {"x": torch.arange(6.0).double().reshape(2, 3), "y": torch.ones(2, 3).double()}
    shapes = {"p": (2, 3), "q": (2, 3)}
    found = Assignment(shapes, {"x": (2, 3), "y": (2, 3)}, Nobody(), held.__getitem__).run()
    assert found.names == {"p": "x", "q": "y"}
    assert found.unsure == ("p", "q")
