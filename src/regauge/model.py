"""A checkpoint directory with the traced model it belongs to: what every plan starts from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regauge.apply import RewrittenView
from regauge.checkpoint import Checkpoint
from regauge.discover import Gauge
from regauge.embedding_scale import unscaled_config
from regauge.errors import CheckpointError, Refused
from regauge.growing.trial import Trial, trial_of
from regauge.hf import (
    HFModel,
    checkpoint_names,
    load_meta,
    patched_config,
    read_config,
    resolved_config,
)
from regauge.jobs import with_new_names
from regauge.moves import State
from regauge.plan import Rewrite
from regauge.planner import make_plan
from regauge.recipe import Recipe
from regauge.ties import tied_config, untied_config
from regauge.trace import Trace, trace


@dataclass(frozen=True)
class CheckpointModel:
    """An open checkpoint, traced. No weight has been read.

    Attributes:
        files: the open checkpoint; whoever opened it closes it.
        held: the model on the meta device.
        config: content of ``config.json``.
        names: state-dict name of the model -> tensor of the checkpoint.
        gauge: atlases of the model.
        untied: what is known of configurations that untie.
    """

    files: Checkpoint
    held: HFModel
    config: Mapping[str, Any]
    names: Mapping[str, str]
    gauge: Gauge
    untied: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(path: Path, files: Checkpoint) -> CheckpointModel:
        """Trace the model of a directory.

        Raises:
            BadInput, TraceError: it cannot be built or traced.
            CheckpointError, Refused: the tensors are not those of the model.
        """
        return CheckpointModel.built(load_meta(path), read_config(path), files)

    @staticmethod
    def built(
        held: HFModel, config: Mapping[str, Any], files: Checkpoint, traced: Trace | None = None
    ) -> CheckpointModel:
        """The same of a model that is built already, and perhaps traced."""
        names = checkpoint_names(held, files.names)
        gauge = Gauge(traced or trace(held.model, (), held.inputs))
        _check_shapes(files, names, gauge.trace)
        return CheckpointModel(files, held, config, names, gauge)

    def plan(
        self, recipe: Recipe, seed: int, progress: Callable[[str], None] | None = None
    ) -> tuple[Rewrite, State, Gauge]:
        """See :func:`regauge.planner.make_plan`."""
        return make_plan(
            self.gauge,
            recipe,
            seed,
            lambda so_far: self.view(so_far).read,
            self._untied_config,
            progress,
            self._retrace,
            lambda so_far: {**self.config, **self.changes(so_far)},
            self._trial,
            unscaled_config,
            tied_config,
        )

    def changes(self, plan: Rewrite) -> dict[str, Any]:
        """Changes to the top level of ``config.json`` that the plan needs."""
        changes = dict(plan.config)
        if plan.patches:
            changes |= patched_config({**self.config, **changes}, plan.patches)
        return changes

    def view(self, plan: Rewrite) -> RewrittenView:
        """Values by parameter name as the plan leaves them."""
        return RewrittenView(self.files, plan, _apart(self.names, plan))

    def names_after(self, plan: Rewrite) -> dict[str, str]:
        """State-dict name -> tensor of the checkpoint, with those that the plan adds."""
        return _apart(with_new_names(self.names, plan), plan)

    def rebuilt(self, plan: Rewrite) -> HFModel:
        """The model as the plan leaves it, on the meta device."""
        return load_meta({**self.config, **self.changes(plan)})

    def _untied_config(self, config: Mapping[str, Any], traced: Trace) -> Mapping[str, Any]:
        """As :func:`regauge.ties.untied_config`, which traces the model again, found once."""
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self.untied:
            self.untied[key] = untied_config(config, traced)
        return self.untied[key]

    def _retrace(self, plan: Rewrite) -> Gauge:
        changed = self.rebuilt(plan)
        return Gauge(trace(changed.model, (), changed.inputs))

    def _built(self, plan: Rewrite) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
        changed = self.rebuilt(plan)
        return changed.model, changed.buffers()

    def _trial(self, plan: Rewrite) -> Trial:
        config = {**self.config, **self.changes(plan)}
        return trial_of(plan, self._built, self._retrace, config, resolved_config(config))


def _apart(names: Mapping[str, str], plan: Rewrite) -> dict[str, str]:
    """Without names that no longer share a stored tensor: each is a new tensor of its own name."""
    first: dict[str, str] = {}
    for name, tensor in names.items():
        first.setdefault(tensor, name)
    made = {n for n, t in names.items() if n in plan.made and first[t] != n}
    held = {
        n: t
        for n, t in names.items()
        if n not in made and (n not in plan.copies or t != names[plan.copies[n]])
    }
    taken = (plan.copies.keys() - held.keys()) & set(held.values())
    if taken:
        name = min(taken)
        raise Refused(
            "a parameter that gets a tensor of its own has the name under which another one is stored",
            parameter=name,
            found=f"{plan.copies[name]} is stored as {name}",
            way_out="load the model and save it again with save_pretrained",
        )
    return held


def _check_shapes(files: Checkpoint, names: Mapping[str, str], traced: Trace) -> None:
    for name, shape in traced.shapes.items():
        if name in names and tuple(files.shape(names[name])) != tuple(shape):
            raise CheckpointError(
                "a tensor has another shape than the config says",
                parameter=names[name],
                expected=str(tuple(shape)),
                found=str(tuple(files.shape(names[name]))),
                way_out="use the config.json that belongs to these weights",
            )
