"""A copy whose tokenizer numbers the same tokens in another order is the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regauge.api import rewrite
from regauge.certify import certify
from regauge.comparing import Comparison, Relation, compare
from regauge.trace import trace
from regauge.vocabulary import read_tokens, shared_vocabulary, vocabulary_axes
from test_end_to_end import build
from zoo import CONFIGS

ROWS = 37
TOKENS = 31  # The other rows are padding.
SPECIAL = 3
DISGUISE: list[Any] = [
    {"name": "untie", "optional": True},
    "fold-scales",
    {"name": "rotate", "space": "all"},
    "permute",
    "rescale",
]


def words(count: int, prefix: str = "w") -> dict[str, int]:
    return {f"{prefix}{i}": i for i in range(count)}


def write_tokenizer(directory: Path, ids: dict[str, int]) -> None:
    """The last ones as added tokens."""
    names = sorted(ids, key=lambda token: ids[token])
    added = [{"id": ids[token], "content": token, "special": True} for token in names[-SPECIAL:]]
    model = {"type": "BPE", "vocab": {token: ids[token] for token in names[:-SPECIAL]}, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))


def table_names(weights: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in weights.items() if value.shape[0] == ROWS]


def renumbered(source: Path, out: Path, rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    """A copy in which tokens have other ids, and tables another number of rows. Returns old id -> new id."""
    out.mkdir()
    random = torch.Generator().manual_seed(seed)
    new = torch.randperm(TOKENS, generator=random)
    weights = load_file(source / "model.safetensors")
    for name in table_names(weights):
        old = weights[name]
        table = torch.randn((rows, *old.shape[1:]), generator=random).to(old.dtype)
        table[new] = old[:TOKENS]
        weights[name] = table
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["vocab_size"] = rows
    for key, value in config.items():
        if key.endswith("_token_id") and isinstance(value, int) and 0 <= value < TOKENS:
            config[key] = int(new[value])
    (out / "config.json").write_text(json.dumps(config))
    ids = read_tokens(source)
    assert ids is not None
    write_tokenizer(out, {token: int(new[place]) for token, place in ids.items()})
    return new


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    build(request.param).save_pretrained(directory)
    write_tokenizer(directory, words(TOKENS))
    return directory


def disguised(source: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    rewrite(source, out, {"moves": DISGUISE}, seed=3, dtype=dtype)
    write_tokenizer(out, words(TOKENS))
    return out


def check_seen(found: Comparison) -> None:
    assert found.vocabulary is not None
    assert found.vocabulary.common
    assert found.vocabulary.tokens == TOKENS
    assert found.vocabulary.renumbered > TOKENS // 2
    assert found.vocabulary.only_a == found.vocabulary.only_b == 0


@pytest.mark.parametrize("source", ["llama", "llama-tied", "gpt2", "bert"], indirect=True)
@pytest.mark.parametrize("rows", [ROWS, ROWS + 4, ROWS - 3])
def test_the_same_tokens_in_another_order(source: Path, rows: int, tmp_path: Path) -> None:
    renumbered(source, tmp_path / "other", rows)
    found = compare(source, tmp_path / "other")
    check_seen(found)
    assert found.relation is Relation.EQUIVALENT
    assert found.relative is not None
    assert found.relative < 1e-6
    assert found.certificate is not None
    assert found.certificate.evidence.float64.relative < 1e-12


@pytest.mark.parametrize("source", ["llama", "llama-tied", "gpt2"], indirect=True)
def test_disguised_rounded_and_renumbered(source: Path, tmp_path: Path) -> None:
    disguised(source, tmp_path / "moved", torch.bfloat16)
    renumbered(tmp_path / "moved", tmp_path / "other", ROWS + 4)
    found = compare(source, tmp_path / "other")
    check_seen(found)
    assert found.relation is Relation.WITHIN_ROUNDING
    assert found.relative is not None
    assert found.relative < 2e-2


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_without_the_numbering_it_is_another_function(source: Path, tmp_path: Path) -> None:
    renumbered(source, tmp_path / "other")
    assert not certify(source, tmp_path / "other").passed
    (tmp_path / "other" / "tokenizer.json").unlink()
    assert not compare(source, tmp_path / "other").equivalent


@pytest.mark.parametrize("source", ["llama", "gpt2"], indirect=True)
def test_a_tokenizer_that_does_not_belong_to_the_weights(source: Path, tmp_path: Path) -> None:
    new = renumbered(source, tmp_path / "other")
    ids = {f"w{i}": int(new[(i + 1) % TOKENS]) for i in range(TOKENS)}
    write_tokenizer(tmp_path / "other", ids)
    assert not compare(source, tmp_path / "other").equivalent


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_other_weights_under_the_same_tokens(source: Path, tmp_path: Path) -> None:
    renumbered(source, tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    weights = load_file(path)
    random = torch.Generator().manual_seed(5)
    changed = {n: torch.randn(v.shape, generator=random) * v.std() for n, v in weights.items()}
    save_file(changed, path, metadata={"format": "pt"})
    assert compare(source, tmp_path / "other").relation is Relation.UNRELATED


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_other_tokens_are_not_paired(source: Path, tmp_path: Path) -> None:
    renumbered(source, tmp_path / "other")
    write_tokenizer(tmp_path / "other", words(TOKENS, "other"))
    found = compare(source, tmp_path / "other")
    assert not found.equivalent
    assert found.vocabulary is not None
    assert not found.vocabulary.common
    assert found.vocabulary.tokens == 0
    assert found.vocabulary.only_a == TOKENS


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_tokens_that_one_of_them_lacks_make_it_derived(source: Path, tmp_path: Path) -> None:
    renumbered(source, tmp_path / "other")
    ids = read_tokens(tmp_path / "other")
    assert ids is not None
    del ids["w5"]
    write_tokenizer(tmp_path / "other", ids)
    for a, b, only in (("source", "other", (1, 0)), ("other", "source", (0, 1))):
        found = compare(tmp_path / a, tmp_path / b)
        assert found.relation is Relation.DERIVED
        assert found.vocabulary is not None
        assert (found.vocabulary.only_a, found.vocabulary.only_b) == only
        assert found.changes[0].kind == "tokens added or removed"
        assert found.certificate is not None
        assert found.certificate.passed


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_where_ids_agree_nothing_is_said_or_left_out(source: Path, tmp_path: Path) -> None:
    disguised(source, tmp_path / "moved")
    found = compare(source, tmp_path / "moved")
    assert found.equivalent
    assert found.vocabulary is None
    assert found.certificate is not None
    assert found.certificate.inputs.tokens is None


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "opt", "gptj", "gemma3"])
def test_the_axes_that_count_tokens_are_those_of_its_length(name: str) -> None:
    from regauge.hf import load_meta

    held = load_meta(CONFIGS[name]())
    traced = trace(held.model, (), held.inputs)
    expected = {(n, i) for n, shape in traced.shapes.items() for i, size in enumerate(shape) if size == ROWS}
    assert expected
    assert set(vocabulary_axes(traced, TOKENS).parameters.items()) == expected
    nothing = vocabulary_axes(traced, ROWS + 1)
    assert not nothing.parameters
    assert nothing.logits is None


def test_tokenizers_of_every_form(tmp_path: Path) -> None:
    assert read_tokens(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("[PAD]\nthe\nof\n", encoding="utf-8")
    assert read_tokens(tmp_path) == {"[PAD]": 0, "the": 1, "of": 2}
    (tmp_path / "vocab.json").write_text('{"a": 1, "b": 0}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2, "a": 7}')
    assert read_tokens(tmp_path) == {"a": 1, "b": 0, "<x>": 2}
    listed = {"model": {"vocab": [["<s>", 0.0], ["▁a", -1.5]]}, "added_tokens": [{"id": 2, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(listed))
    assert read_tokens(tmp_path) == {"<s>": 0, "▁a": 1, "<x>": 2}
    for damaged in ("{", '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": true}}}', "{}"):
        (tmp_path / "tokenizer.json").write_text(damaged)
        assert "a" not in (read_tokens(tmp_path) or {}) or damaged == "{"


def test_pairs_are_one_to_one(tmp_path: Path) -> None:
    for name, ids in (("a", {"x": 0, "y": 0, "z": 1}), ("b", {"z": 0, "y": 2, "x": 1, "u": 5})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(json.dumps(ids))
    found = shared_vocabulary(tmp_path / "a", tmp_path / "b")
    assert found is not None
    assert found.ids_a.tolist() == [0, 1]
    assert found.ids_b.tolist() == [1, 0]
    assert (found.only_a, found.only_b, found.renumbered) == (0, 1, 2)
    assert shared_vocabulary(tmp_path / "a", tmp_path) is None
