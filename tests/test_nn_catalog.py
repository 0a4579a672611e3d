"""The table of norms: what it says, and that each cell can be otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from regauge.cli import app
from regauge.errors import Refused
from regauge.nn.base import Normalisation
from regauge.nn.catalog import ENTRIES, fold_of, row, upgrade_of
from regauge.nn.entry import Entry
from regauge.nn.symmetry import SYMMETRIES, Effect, effects, law_error

KNOWN = {entry.name: entry for entry in ENTRIES}
SAME, ALONG = Effect.NONE, Effect.ALONG
TURNS = {"signs", "permutation", "rotation", "rotation of differences"}

# name -> (ignored, passed on) in evaluation, the same in training where it differs, fold, upgrades.
# From the algebra of each layer: see the papers named in its entry.
TABLE: dict[str, tuple[set[str], set[str], tuple[set[str], set[str]] | None, str | None, dict[str, str]]] = {
    "layernorm": ({"shift", "scale"}, {"permutation", "rotation of differences"}, None,
                  "LayerNorm + affine", {"layer": "exact"}),
    "rmsnorm": ({"scale"}, TURNS, None, "RMSNorm + affine", {"rms": "exact"}),
    "crmsnorm": ({"scale"}, {"permutation", "rotation of differences"}, None, "CRMSNorm", {}),
    "seednorm": (set(), {"permutation"}, None, None, {"layer": "exact", "rms": "exact"}),
    "gatednorm": ({"scale"}, {"permutation"}, None, "GatedNorm + affine", {"layer": "exact", "rms": "exact"}),
    "preaffine": ({"scale"}, {"permutation", "signs"}, None, None, {"layer": "exact", "rms": "exact"}),
    "lns": ({"scale"}, TURNS, None, "RMSNorm + affine", {"layer": "exact", "rms": "exact"}),
    "magnitude": ({"scale"}, TURNS, None, "RMSNorm + affine", {"layer": "exact", "rms": "exact"}),
    "dyt": (set(), {"signs", "permutation"}, None, "DyT + affine", {}),
    "bhyt": ({"scale"}, {"signs", "permutation"}, None, "BHyT + affine", {}),
    "powernorm": ({"scale"}, {"signs"}, None, "GroupScaling + affine", {"rms": "evaluation"}),
    "unified": (set(), {"scale", "channel scale", "signs", "permutation"},
                ({"channel scale"}, {"scale", "signs", "permutation"}), "affine", {}),
    "repbn": (set(), {"permutation"}, (set(), {"channel shift", "signs", "permutation"}), "affine", {}),
    "prepbn": (set(), {"permutation"}, (set(), {"channel shift", "signs", "permutation"}), "affine",
               {"layer": "training", "rms": "training"}),
    "adab2n": (set(), {"permutation"}, ({"channel shift", "channel scale"}, {"signs", "permutation"}),
               "affine", {"batch": "exact"}),
    "evonorm-b0": (set(), {"permutation"}, ({"channel scale"}, {"permutation"}), None, {}),
    "evonorm-s0": (set(), set(), None, None, {}),
    "region-b": ({"channel shift", "channel scale"}, {"signs", "permutation"}, None, None, {}),
    "region-l": (set(), {"permutation"}, None, None, {}),
    "adain": ({"channel shift", "channel scale"}, {"signs", "permutation"}, None,
              "InstanceNorm2d + affine", {}),
    "gdwct": (set(), set(), None, None, {}),
}  # fmt: skip


def named(found: Any, wanted: Effect) -> set[str]:
    return {name for name, effect in found.items() if effect is wanted}


def test_every_layer_is_in_the_table() -> None:
    assert len(KNOWN) == len(ENTRIES)
    assert set(KNOWN) == set(TABLE)
    assert all(entry.source for entry in ENTRIES)


@pytest.mark.parametrize("name", TABLE)
def test_row(name: str) -> None:
    same, along, training, fold, upgrades = TABLE[name]
    found = row(KNOWN[name])
    assert (named(found.evaluation, SAME), named(found.evaluation, ALONG)) == (same, along)
    # UN passes a common scale of a token on in evaluation only, where it is linear.
    expected = training or (same, along)
    if name == "unified":
        expected = ({"channel scale"}, {"signs", "permutation"})
    assert (named(found.training, SAME), named(found.training, ALONG)) == expected
    assert found.fold == fold
    assert {form: mode for form, mode in found.upgrades.items() if mode} == upgrades
    assert len(found.gauges) == len(KNOWN[name].laws)


class Bent(nn.Module):
    """A layer plus a little of what has no symmetry at all; still its statistics and parameters."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        bend = torch.arange(1.0, x.shape[self.axis] + 1, dtype=x.dtype).sin()
        shape = [-1 if axis == self.axis % x.dim() else 1 for axis in range(x.dim())]
        return y + 1e-3 * (x * bend.reshape(shape)).cos() * (1 + bend.reshape(shape))


class Through(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("name", TABLE)
def test_no_cell_is_always_filled(name: str) -> None:
    """A thousandth of another function empties all cells of symmetries, and of the further laws."""
    entry = KNOWN[name]
    axis = -1 if entry.kind == "tokens" else 1
    bent = replace(entry, bare=lambda size, random: Bent(entry.bare(size, random), axis))
    for training in (False, True):
        assert not any(effects(bent, training=training).values())
    other: Any = replace(entry, make=lambda size, random: Bent(entry.make(size, random), axis))
    for law in entry.laws:
        assert law_error(entry, law) < 1e-11
        with pytest.raises((AssertionError, AttributeError, KeyError)):
            assert law_error(other, law) < 1e-6


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_no_cell_is_always_empty(kind: Any) -> None:
    entry = Entry("identity", "", "", lambda *_: Through(), lambda *_: Through(), kind)
    assert set(effects(entry).values()) == {ALONG}
    zero = replace(entry, bare=lambda *_: _Zero())
    assert len(effects(zero)) == len(SYMMETRIES)


class _Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


class Wrong(Normalisation):
    """Folds to, and upgrades to, something a little different."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def fold(self) -> nn.Module:
        return nn.LayerNorm(12, eps=1.1e-5, dtype=torch.float64)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Wrong:
        if not isinstance(norm, nn.LayerNorm):
            raise Refused("not this one")
        made = cls().train(norm.training)
        made.norm.load_state_dict(norm.state_dict())
        made.norm.eps *= 1.1
        return made


def test_a_wrong_fold_and_a_wrong_upgrade_are_seen() -> None:
    wrong = Entry("wrong", "", "", lambda *_: Wrong().eval(), lambda *_: Wrong().eval())
    with pytest.raises(AssertionError, match="another function"):
        fold_of(wrong)
    assert upgrade_of(wrong, "layer") == ""


def test_command() -> None:
    for columns in ("200", "80"):
        shown = CliRunner().invoke(app, ["norms", "rmsnorm", "unified"], env={"COLUMNS": columns})
        assert shown.exit_code == 0
        assert "RMSNorm + affine" in shown.stdout
    data = json.loads(CliRunner().invoke(app, ["norms", "prepbn", "--json"]).stdout)
    assert data[0]["upgrades"] == {"layer": "training", "rms": "training", "batch": ""}
    bad = CliRunner().invoke(app, ["norms", "nothing"])
    assert bad.exit_code == 2
