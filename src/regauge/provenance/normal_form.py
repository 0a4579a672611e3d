"""The normal form of a model: whatever was folded, tied or encoded in another way is brought to one form.

Nothing is written. A plan of optional moves takes out what needs another structure (batch norms, layer
scales); then every tied parameter has a copy for each role, every gain that folds is one, and what nothing
reads is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from regauge.atlas import Action, Atlas
from regauge.discover import Gauge, traced_only
from regauge.errors import Refused
from regauge.matching.normal import null_actions, without_null
from regauge.model import CheckpointModel
from regauge.moves.base import Scene, State
from regauge.moves.fold import plan_fold_scales
from regauge.plan import Step
from regauge.planner import plan_or_nothing
from regauge.recipe import MoveSpec, Recipe
from regauge.trace import Trace

_RECIPE = Recipe(
    moves=tuple(
        MoveSpec(name=name, options={}, optional=True)
        for name in ("collapse", "fold-batchnorm", "fold-layer-scale")
    )
)
"""Moves that bring one function stored in several ways to one, before ties and gains are looked at."""

Rows = Callable[[str, int, int, int], torch.Tensor]


@dataclass(frozen=True)
class NormalForm:
    """A model in normal form, its values computed when they are read.

    Attributes:
        atlas: its spaces and generators.
        multipliers: parameters that multiply an activation entry by entry.
        shapes: name -> shape, a name for every role of a tied parameter.
        order: names in order of first use.
        trace: the traced model before gains are folded.
    """

    atlas: Atlas
    multipliers: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    order: tuple[str, ...]
    trace: Trace
    _steps: Mapping[str, tuple[Step, ...]]
    _null: Mapping[str, tuple[Action, ...]]
    _rows: Rows

    def read(self, name: str, axis: int = 0, stop: int | None = None) -> torch.Tensor:
        """The parameter in float64, null directions zero; with ``stop`` its first entries along ``axis``.

        Raises:
            CheckpointError: the tensor is not finite, or not stored in a floating dtype.
        """
        size = self.shapes[name][axis] if self.shapes[name] else 1
        steps, null = self._steps.get(name, ()), self._null.get(name, ())
        free = all(axis not in step.axes for step in steps) and all(act.axis != axis for act in null)
        cut = stop is not None and stop < size and free
        value = self._rows(name, axis, 0, stop if cut and stop is not None else size).to(torch.float64)
        for step in steps:
            value = step.apply(value)
        if null:
            value = without_null(value.clone(memory_format=torch.contiguous_format), null, self.shapes[name])
        if stop is not None and not cut and self.shapes[name]:
            value = value.narrow(axis, 0, min(stop, size))
        return value


def normal_form(model: CheckpointModel) -> NormalForm:
    """The normal form of an open checkpoint, whose files must stay open while it is read."""
    traced = replace(model, gauge=traced_only(model.gauge))
    plan, _, gauge = plan_or_nothing(lambda: traced.plan(_RECIPE, 0), traced.gauge)
    view = model.view(plan)
    canonical = gauge.trace.canonical

    def rows(name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        known = name if name in view else canonical.get(name, name)
        if not view.shape(known):
            return view.read(known)
        return view.read_rows(known, start, stop, axis)

    return folded_form(traced_only(gauge), rows)


def folded_form(gauge: Gauge, rows: Rows) -> NormalForm:
    """Every tied parameter in its roles, every gain that folds one; ``rows``: (name, axis, start, stop) ->
    part of the value.
    """
    untied = bool(gauge.tied)
    state = State(untied)
    shapes = {
        alias: tuple(shape)
        for name, shape in gauge.trace.shapes.items()
        for alias in gauge.trace.aliases[name]
    }

    def read(name: str) -> torch.Tensor:
        return rows(name, 0, 0, shapes[name][0] if shapes[name] else 1)

    scene = Scene(gauge, state, read, torch.Generator())
    steps: Mapping[str, tuple[Step, ...]] = {}
    multipliers = frozenset(gauge.multipliers(untied=untied))
    try:
        change = plan_fold_scales(scene, {})
        steps, state = change.steps, change.state or state
    except Refused:
        pass
    atlas = gauge.atlas(untied=untied, folded=state.folded)
    used = gauge.walk(untied=untied)[0].result.parameters.values()
    order = tuple(dict.fromkeys(str(value.parameter) for value in used))
    return NormalForm(atlas, multipliers, shapes, order, gauge.trace, steps, null_actions(atlas), rows)
