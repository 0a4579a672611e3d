"""The normal form of a model: whatever was folded, tied or encoded in another way is brought to one form.

Nothing is written. A plan of optional moves takes out what needs another structure (batch norms, layer
scales); then every tied parameter has a copy for each role, and every gain that folds is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regauge.apply import RewrittenView
from regauge.atlas import Atlas
from regauge.checkpoint import Checkpoint
from regauge.discover import Gauge, traced_only
from regauge.errors import Refused
from regauge.hf import HFModel, checkpoint_names, load_meta, patched_config, read_config
from regauge.jobs import with_new_names
from regauge.moves.base import Scene, State
from regauge.moves.fold import plan_fold_scales
from regauge.patches import restructured
from regauge.plan import Rewrite, Step
from regauge.planner import make_plan
from regauge.recipe import parse_recipe
from regauge.trace import Trace, trace

STRUCTURAL = ("collapse", "fold-batchnorm", "fold-layer-scale")
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
    _rows: Rows

    def read(self, name: str, axis: int = 0, stop: int | None = None) -> torch.Tensor:
        """The parameter in float64; with ``stop`` only its first entries along ``axis``.

        Raises:
            CheckpointError: the tensor is not finite, or not stored in a floating dtype.
        """
        size = self.shapes[name][axis] if self.shapes[name] else 1
        steps = self._steps.get(name, ())
        cut = stop is not None and stop < size and all(axis not in step.axes for step in steps)
        value = self._rows(name, axis, 0, stop if cut and stop is not None else size).to(torch.float64)
        for step in steps:
            value = step.apply(value)
        if stop is not None and not cut and self.shapes[name]:
            value = value.narrow(axis, 0, min(stop, size))
        return value


def normal_form(path: Path, files: Checkpoint, given: tuple[HFModel, Trace] | None = None) -> NormalForm:
    """The normal form of a directory. ``files`` must stay open while it is read.

    Args:
        given: the model without weights and its trace, if there are any already.

    Raises:
        BadInput, CheckpointError, TraceError: the directory cannot be used.
    """
    held, traced = given or opened(path)
    source = read_config(path)
    names = checkpoint_names(held, files.names)
    gauge = Gauge(traced)

    def config(plan: Rewrite) -> dict[str, Any]:
        now = {**source, **plan.config}
        return {**now, **patched_config(now, plan.patches)} if plan.patches else now

    def plain(plan: Rewrite) -> dict[str, Any]:
        return {**source, **plan.config}

    def rebuilt(plan: Rewrite) -> HFModel:
        return load_meta(config(plan))

    def retrace(plan: Rewrite) -> Gauge:
        changed = rebuilt(plan)
        return Gauge(trace(changed.model, (), changed.inputs))

    plan, gauge = _planned(
        gauge,
        lambda so_far: RewrittenView(files, so_far, names).read,
        retrace,
        config=plain,
    )
    view = RewrittenView(files, plan, with_new_names(names, plan))
    canonical = gauge.trace.canonical

    def rows(name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        known = name if name in view else canonical.get(name, name)
        if not view.shape(known):
            return view.read(known)
        return view.read_rows(known, start, stop, axis)

    return folded_form(traced_only(gauge), rows)


def opened(path: Path) -> tuple[HFModel, Trace]:
    """A directory's model without weights, and its trace."""
    held = load_meta(path)
    return held, trace(held.model, (), held.inputs)


def normal_form_of_module(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], *, outputs: Sequence[str] | None = None
) -> NormalForm:
    """The normal form of a module; inputs as for :func:`regauge.inspect`. The module is left as it is."""
    from regauge.api import given_inputs

    args, kwargs = given_inputs(inputs)
    state = {name: value.detach().cpu() for name, value in model.state_dict(keep_vars=True).items()}

    def retrace(plan: Rewrite) -> Gauge:
        return Gauge(trace(restructured(model, plan.copies, plan.patches), args, kwargs, outputs=outputs))

    def view(plan: Rewrite) -> Callable[[str], torch.Tensor]:
        return lambda name: plan.value(name, state.__getitem__)

    plan, gauge = _planned(Gauge(trace(model, args, kwargs, outputs=outputs)), view, retrace)
    canonical = gauge.trace.canonical

    def rows(name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        known = name if name in state or name in plan.made or name in plan.copies else canonical[name]
        value = plan.value(known, state.__getitem__)
        return value.narrow(axis, start, stop - start) if value.dim() else value

    return folded_form(traced_only(gauge), rows)


def _planned(
    gauge: Gauge,
    view: Callable[[Rewrite], Callable[[str], torch.Tensor]],
    retrace: Callable[[Rewrite], Gauge],
    **config: Any,
) -> tuple[Rewrite, Gauge]:
    gauge = traced_only(gauge)
    recipe = parse_recipe({"moves": [{"name": name, "optional": True} for name in STRUCTURAL]})
    try:
        plan, _, gauge = make_plan(gauge, recipe, 0, view, retrace=retrace, **config)
    except Refused:
        return Rewrite(), gauge
    return plan, gauge


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
    return NormalForm(atlas, multipliers, shapes, order, gauge.trace, steps, rows)
