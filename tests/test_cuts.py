"""Cuts are made only where they are allowed, do what they say, and are never called equivalent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from regauge.api import rewrite, rewrite_module
from regauge.certify.certificate import Certificate
from regauge.checkpoint import Checkpoint
from regauge.cli import app
from regauge.cuts import CUTS
from regauge.cuts.select import indices, selected
from regauge.errors import BadInput, Refused
from regauge.moves import MOVES
from regauge.recipe import parse_move
from test_end_to_end import build, loaded, logits

DATA = Path(__file__).parent / "data"


def saved(name: str, path: Path) -> tuple[Any, Path]:
    model = build(name)
    model.save_pretrained(path / "source")
    return model, path / "source"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def test_no_name_is_a_move_and_a_cut() -> None:
    assert not MOVES.keys() & CUTS.keys()
    for cut in CUTS.values():
        assert cut.plan.__doc__
        assert "arXiv" in cut.plan.__doc__


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_refused_unless_it_is_allowed(name: str, tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path)
    with pytest.raises(Refused, match=f"{name} is a cut"):
        rewrite(source, tmp_path / "out", {"moves": ["permute", name]})
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match=f"{name} is a cut"):
        rewrite_module(nn.Linear(2, 2), (torch.ones(1, 2),), {"moves": [name]})


def test_the_command_line_asks_for_it_and_prints_the_error(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path)
    args = ["rewrite", str(source), str(tmp_path / "out"), "--move", "stack:times=2"]
    refused = CliRunner().invoke(app, args)
    assert refused.exit_code == 3
    assert "--allow-cuts" in refused.stderr
    done = CliRunner().invoke(app, [*args, "--allow-cuts"])
    assert done.exit_code == 0
    manifest = json.loads((tmp_path / "out" / "regauge.json").read_text())
    assert manifest["cuts"] == ["stack"]
    certificate = Certificate.from_json(json.dumps(manifest["certificate"]))
    assert str(certificate.verdict) == "different"
    exact = certificate.evidence.exact
    assert exact is not None
    assert f"{exact.relative:.3g}" in certificate.reason
    assert done.stdout.startswith("different: cut by stack")
    listed = CliRunner().invoke(app, ["moves"])
    assert all(cut.identity.split()[0] in listed.stdout for cut in CUTS.values())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_stack_is_repeated_and_measured(name: str, tmp_path: Path) -> None:
    model, source = saved(name, tmp_path)
    recipe = {"moves": [{"name": "stack", "times": "3"}]}
    result = rewrite(source, tmp_path / "out", recipe, cut=True)
    assert not result.certificate.passed
    old, new = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    path = "transformer.h" if name == "gpt2" else "model.layers"
    count = len(model.get_submodule(path))
    for key in old.names:
        if not key.startswith(f"{path}."):
            assert torch.equal(new.read(key), old.read(key))
            continue
        number, _, leaf = key.removeprefix(f"{path}.").partition(".")
        for copy in range(3):
            value = new.read(f"{path}.{int(number) + copy * count}.{leaf}")
            assert torch.equal(value, old.read(key))
    bigger = loaded(tmp_path / "out", model)
    exact = result.certificate.evidence.exact
    assert exact is not None
    assert exact.relative > 1e-3
    model.get_submodule(path).extend(list(model.get_submodule(path)) * 2)
    model.config.num_hidden_layers = 3 * count
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = model.config.layer_types * 3
    with torch.no_grad():
        found = bigger(input_ids=torch.arange(4, 12)[None], use_cache=False).logits
        wanted = model(input_ids=torch.arange(4, 12)[None], use_cache=False).logits
    assert distance(wanted, found) < 1e-6


def test_a_cut_that_changes_nothing_is_still_not_called_equivalent(tmp_path: Path) -> None:
    """Layers that do nothing, repeated, do nothing."""
    model = build("gpt2")
    with torch.no_grad():
        for part in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
    model.save_pretrained(tmp_path / "source")
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["stack"]}, cut=True)
    assert result.certificate.evidence.bits
    assert str(result.certificate.verdict) == "different"
    assert "relative error 0 in float64" in result.certificate.reason


# --- select -----------------------------------------------------------------------------------------


def test_entries_are_those_of_the_authors() -> None:
    first = torch.load(DATA / "weight_selection_golden.pt", weights_only=True)
    for case in first["cases"]:
        assert torch.equal(selected(case["big"], tuple(case["small_shape"])), case["out"])
    second = torch.load(DATA / "weight_selection_2_golden.pt", weights_only=True)
    for key, tensor in second["inputs"].items():
        assert torch.equal(selected(tensor, tuple(second["config"][key])), second["outputs"][key])


def test_indices_start_at_the_first_and_grow() -> None:
    for large in range(1, 40):
        for small in range(1, large + 1):
            found = indices(large, small)
            assert len(found) == small
            assert found[0] == 0
            assert bool((found.diff() > 0).all())
            assert int(found[-1]) < large


def test_the_first_layers_are_kept(tmp_path: Path) -> None:
    model, source = saved("llama", tmp_path)
    result = rewrite(source, tmp_path / "out", {"moves": [{"name": "select", "layers": "1"}]}, cut=True)
    assert str(result.certificate.verdict) == "different"
    smaller = loaded(tmp_path / "out", model)
    assert len(smaller.model.layers) == 1
    model.model.layers = model.model.layers[:1]
    assert torch.equal(logits(smaller), logits(model))


def test_a_smaller_configuration_takes_evenly_spaced_entries(tmp_path: Path) -> None:
    """Also after a move: what is selected is what the move left."""
    from zoo import CONFIGS

    model, source = saved("llama", tmp_path)
    config = CONFIGS["llama"]()
    config.update({"hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1})
    config.head_dim = 6
    config.save_pretrained(tmp_path / "small")
    path = str(tmp_path / "small" / "config.json")
    for before in ([], ["permute"]):
        out = tmp_path / f"out{len(before)}"
        select = {"name": "select", "config": path}
        rewrite(source, out, {"moves": [*before, select]}, seed=2, cut=True)
        origin = source
        if before:
            origin = tmp_path / "moved"
            rewrite(source, origin, {"moves": before}, seed=2)
        smaller = loaded(out, model)
        old = Checkpoint.open(origin)
        assert {name for name in old.names if ".layers.1." not in name} == set(smaller.state_dict())
        for name, tensor in smaller.state_dict().items():
            assert torch.equal(tensor, selected(old.read(name), tuple(tensor.shape)))
        up = smaller.model.layers[0].mlp.up_proj.weight
        assert torch.equal(up, old.read("model.layers.0.mlp.up_proj.weight")[::2][:, indices(24, 16)])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, BadInput, "say once"),
        ({"layers": "1", "config": "x"}, BadInput, "say once"),
        ({"layers": "2"}, BadInput, "only be left out"),
        ({"config": "nowhere.json"}, BadInput, "cannot read"),
    ],
)
def test_what_select_refuses(options: dict[str, str], error: Any, says: str, tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path)
    with pytest.raises(error, match=says):
        rewrite(source, tmp_path / "out", {"moves": [{"name": "select", **options}]}, cut=True)


def test_a_larger_or_other_configuration_is_refused(tmp_path: Path) -> None:
    from zoo import CONFIGS

    _, source = saved("llama", tmp_path)
    larger = CONFIGS["llama"]()
    larger.intermediate_size = 30
    larger.save_pretrained(tmp_path / "larger")
    CONFIGS["qwen2"]().save_pretrained(tmp_path / "other")
    for name, says in (("larger", "no part of"), ("other", "same type")):
        move = {"name": "select", "config": str(tmp_path / name / "config.json")}
        with pytest.raises(Refused, match=says):
            rewrite(source, tmp_path / "out", {"moves": [move]}, cut=True)


def test_a_cut_is_written_as_a_move_is() -> None:
    assert parse_move("stack:times=4").options == {"times": "4"}
