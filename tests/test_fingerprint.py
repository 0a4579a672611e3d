"""Fingerprints see the model, not its gauge and not how it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from regauge.act import apply_generator
from regauge.api import rewrite
from regauge.atlas import Kind
from regauge.cli import app
from regauge.elements import random_element
from regauge.errors import BadInput
from regauge.probe import random_state
from regauge.provenance import Fingerprint, distance, fingerprint, same_function
from regauge.provenance.behaviour import summary
from regauge.provenance.fingerprint import VERSION
from regauge.provenance.network import network
from regauge.provenance.normal_form import NormalForm, folded_form
from regauge.provenance.signs import signs
from regauge.provenance.sketch import HALF, LENGTH, Sketches, sketches
from test_end_to_end import build
from zoo.specimens import specimen

MODELS = ("llama", "llama-tied", "qwen3", "gpt2", "opt", "gemma3", "bert", "whisper", "vit", "resnet", "t5")
DISGUISE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("untie", {}),
    ("fold-shifts", {}),
    ("fold-scales", {}),
    ("fold-value-bias", {}),
    ("center", {"norm": "rms"}),
    ("center", {}),
    ("rotate", {"space": "all"}),
    ("permute", {"signs": True}),
    ("rescale", {"mode": "random"}),
)


def in_normal_form(name: str, seed: int = 0) -> NormalForm:
    held = specimen(name)
    state = random_state(held.trace, seed)
    canonical = held.trace.canonical

    def rows(parameter: str, axis: int, start: int, stop: int) -> Tensor:
        value = state[canonical.get(parameter, parameter)]
        return value.narrow(axis, start, stop - start) if value.dim() else value

    return folded_form(held.gauge, rows)


def with_values(form: NormalForm, state: Mapping[str, Tensor]) -> NormalForm:
    def rows(parameter: str, axis: int, start: int, stop: int) -> Tensor:
        value = state[parameter]
        return value.narrow(axis, start, stop - start) if value.dim() else value

    return replace(form, _steps={}, _rows=rows)


def apart(a: Sketches, b: Sketches) -> float:
    assert [sort for sort, _ in a.singles] == [sort for sort, _ in b.singles]
    pairs = zip(a.singles, b.singles, strict=True)
    return max(float(np.abs(x - y).max()) for (_, x), (_, y) in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_no_generator_changes_any_sketch(name: str) -> None:
    form = in_normal_form(name)
    state = {parameter: form.read(parameter) for parameter in form.order}
    before = sketches(network(form))
    random = torch.Generator().manual_seed(1)
    tried: set[Kind] = set()
    for generator in form.atlas.generators:
        if generator.kind in (Kind.TRANSLATION, Kind.NULL):
            continue
        element = random_element(generator.kind, generator.size, generator.count, random)
        moved = apply_generator(state, generator, element)
        assert any(not torch.equal(moved[p], state[p]) for p in generator.parameters) or generator.size <= 2
        after = sketches(network(with_values(form, moved)))
        assert apart(before, after) < 1e-8, (generator.kind, generator.parameters)
        tried.add(generator.kind)
    assert Kind.PERMUTATION in tried


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_seen(name: str) -> None:
    form = in_normal_form(name)
    assert sketches(network(form)).missing == ()
    state = {parameter: form.read(parameter) for parameter in form.order}
    before = sketches(network(form))
    random = torch.Generator().manual_seed(2)
    for parameter in dict.fromkeys(block.parameter for block in network(form).blocks):
        other = {**state, parameter: torch.randn(state[parameter].shape, generator=random).double()}
        assert apart(before, sketches(network(with_values(form, other)))) > 1e-2, parameter


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_are_far(name: str) -> None:
    a, b = (sketches(network(in_normal_form(name, seed))).vector for seed in (0, 1))
    assert float(a @ a) == pytest.approx(1)
    assert float(a @ b) < 0.5


def disguised(source: Path, out: Path) -> None:
    moves = [{"name": name, "optional": True, **options} for name, options in DISGUISE]
    rewrite(source, out, {"moves": moves}, dtype=torch.float32, seed=5)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2", "gemma3", "vit", "bert"])
def test_a_disguised_copy_is_the_same(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    disguised(tmp_path / "source", tmp_path / "copy")
    a, b = fingerprint(tmp_path / "source"), fingerprint(tmp_path / "copy")
    assert distance(a, b) < 1e-7
    assert same_function(a, b)
    assert a.details["missing"] == []


def test_what_nothing_reads_is_not_seen_on_an_axis_that_is_an_output(tmp_path: Path) -> None:
    """The stream of an encoder whose last states are the output is fixed, and its norms ignore the mean."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "copy", {"moves": ["center"]}, dtype=torch.float32)
    a, b = (fingerprint(tmp_path / place, run=False) for place in ("source", "copy"))
    assert distance(a, b) < 1e-9


def test_rounding_leaves_it_near_and_other_weights_do_not(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "source")
    model.bfloat16().save_pretrained(tmp_path / "rounded")
    for file in (tmp_path / "source").glob("*.safetensors"):
        held = load_file(file)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
        random = torch.Generator().manual_seed(9)
        new = {k: torch.randn(v.shape, generator=random) if v.dim() > 1 else v for k, v in held.items()}
        save_file(new, tmp_path / "other" / file.name, metadata={"format": "pt"})
    source, rounded, other = (fingerprint(tmp_path / n) for n in ("source", "rounded", "other"))
    assert 0 < distance(source, rounded) < 1e-3
    assert distance(source, other) > 0.5
    assert same_function(source, rounded) is False
    assert source.digest != other.digest


def test_exact_expansion_keeps_it(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "source")
    grown = {"moves": [{"name": "grow", "neurons": "+8"}, {"name": "insert-layers", "layers": "+1"}]}
    rewrite(tmp_path / "source", tmp_path / "grown", grown, seed=1)
    a, b = fingerprint(tmp_path / "source"), fingerprint(tmp_path / "grown")
    assert distance(a, b) < 1e-6
    assert same_function(a, b)


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path / "source")
    a, b = (replace(fingerprint(tmp_path / "source"), seconds=0.0) for _ in range(2))
    assert a.to_json() == b.to_json()
    again = Fingerprint.from_json(a.to_json())
    assert again.to_json() == a.to_json()
    assert len(a.to_json()) < 8192


@pytest.mark.parametrize(
    "change",
    [{"version": VERSION + 1}, {"vector": "AAAA"}, {"vector": 3}, {"behaviour": "%"}, {"parameters": None}],
)
def test_what_is_no_fingerprint_is_refused(change: dict[str, Any]) -> None:
    import json

    good = Fingerprint(np.eye(1, LENGTH, dtype=np.float32)[0], None, None, {}, "x", 1, 0.0)
    with pytest.raises(BadInput):
        Fingerprint.from_json(json.dumps({**json.loads(good.to_json()), **change}))
    assert distance(good, Fingerprint.from_json(good.to_json())) == 0


def test_signs_do_not_depend_on_how_many_are_drawn() -> None:
    many = signs(1000, HALF)
    assert torch.equal(many[17:300], signs(283, HALF, start=17))
    assert set(many.unique().tolist()) == {-1.0, 1.0}
    assert float((many.T @ many / 1000 - torch.eye(HALF)).abs().max()) < 0.15


def test_the_summary_is_that_of_all_outputs_in_a_row() -> None:
    y = torch.randn(3, 70_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = summary((y,))
    assert np.allclose(whole, summary((y[0], y[1:])), atol=1e-12)
    reference = (y.reshape(-1, 1) * signs(y.numel(), 64)).sum(0) / y.norm()
    assert np.allclose(whole, reference.numpy(), atol=1e-12)
    assert np.allclose(summary((2 * y,)), whole)


def test_on_the_command_line(tmp_path: Path) -> None:
    build("opt").save_pretrained(tmp_path / "source")
    run = CliRunner()
    shown = run.invoke(app, ["fingerprint", str(tmp_path / "source")])
    assert shown.exit_code == 0
    assert "OPTForCausalLM" in shown.stdout
    plain = run.invoke(app, ["fingerprint", str(tmp_path / "source"), "--json", "--no-run"])
    assert Fingerprint.from_json(plain.stdout).digest is None
    assert run.invoke(app, ["fingerprint", str(tmp_path / "none")]).exit_code == 2
