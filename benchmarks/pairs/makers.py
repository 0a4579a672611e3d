"""Every model of the calibration set, trained or changed when first asked for, then kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import regauge
from pairs import changes
from pairs.disguise import disguised
from pairs.families import FAMILIES, Family
from pairs.recipes import Made, Source
from pairs.training import held_out, train


class Store:
    """Models in a directory, made when first asked for, with a note of how well each source has learnt.

    Args:
        directory: made where it does not exist.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.held: dict[Source, nn.Module] = {}

    def source(self, source: Source) -> nn.Module:
        """A model from scratch, in evaluation mode. Not to be changed."""
        if source not in self.held:
            model = source.build()
            if source.part != "new":
                family = FAMILIES[source.family]
                path = self.directory / f"{source.name}.safetensors"
                if not path.exists():
                    _learn(family, model, source, path)
                _fill(model, path)
            self.held[source] = model
        return self.held[source]

    def note(self, source: Source) -> dict[str, Any]:
        """``loss_start``, ``loss_end`` (held out, nats) and ``cosine_with_start`` of the weights."""
        return json.loads((self.directory / f"{source.name}.json").read_text())

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under a name, or what is measured now."""
        path = self.directory / "scores" / f"{name.replace(': ', '/').replace(' ', '-')}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measure()))
        return json.loads(path.read_text())

    def model(self, made: Made) -> nn.Module:
        """Any model, in evaluation mode."""
        if not made.steps:
            return self.source(made.source)
        family, path = FAMILIES[made.source.family], self._path(made)
        if family.stored:
            if not path.exists():
                self._make(made, path)
            return regauge.load(path).eval()
        if not path.exists():
            model = self._make(made, None)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model, path)
        return torch.load(path, weights_only=False)

    def stored(self, made: Made) -> Path:
        """The directory of a model of a stored family."""
        path = self._path(made)
        if not path.exists():
            if made.steps:
                self._make(made, path)
            else:
                self.source(made.source).save_pretrained(path)
        return path

    def _path(self, made: Made) -> Path:
        return self.directory / made.source.family / "made" / made.digest

    def _make(self, made: Made, path: Path | None) -> nn.Module:
        family = FAMILIES[made.source.family]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        before, (name, value) = Made(made.source, made.steps[:-1]), made.steps[-1]
        model = self.model(before)
        if name == "disguised":
            return disguised(family, model, value, path)
        if name == "tuned":
            model = changes.in_place(model, changes.tuned(family, value))
        elif name == "adapted":
            model = changes.in_place(model, changes.adapted(family, value))
        elif name == "averaged":
            model = changes.averaged(model, self.model(value))
        elif name == "first":
            model = changes.first(model, family, Source(made.source.family, 0, "new").build())
        elif name in ("silenced", "removed"):
            model = getattr(changes, name)(model, family)
        else:
            model = getattr(changes, name)(model)
        if path is not None:
            model.save_pretrained(path)
        return model.eval()


def weights(model: nn.Module) -> torch.Tensor:
    """All parameters of two and more axes, flat."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])


def _learn(family: Family, model: nn.Module, source: Source, path: Path) -> None:
    first, start = weights(model).clone(), held_out(family, model, source.part)
    train(family, model, source.part, source.seed, family.steps, family.rate, family.decay)
    note = {
        "loss_start": start,
        "loss_end": held_out(family, model, source.part),
        "cosine_with_start": torch.cosine_similarity(first, weights(model), dim=0).item(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name.removesuffix('.safetensors')}.json").write_text(json.dumps(note))
    _write(model, path)


def _write(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, path)


def _fill(model: nn.Module, path: Path) -> None:
    model.load_state_dict(load_file(path))
