"""One of the two models that are aligned, in its normal form: its atlas, and its values when asked for."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from regauge.atlas import Action, Atlas
from regauge.checkpoint import Checkpoint
from regauge.discover import Gauge, traced_only
from regauge.matching.normal import normal_recipe, null_actions, without_null
from regauge.model import CheckpointModel
from regauge.module_model import ModuleModel
from regauge.moves import State
from regauge.plan import Rewrite
from regauge.planner import plan_or_nothing
from regauge.trace import Trace
from regauge.vocabulary import Vocabulary, token_axes

Rows = tuple[int, int] | None
"""A range of the first axis, or all of it."""

CHUNK = 1 << 22
"""Entries that are read at once: 32 MiB in float64."""


def evenly(total: int, run: int, count: int) -> list[tuple[int, int]]:
    """``count`` ranges of ``run`` rows each, evenly over ``total`` rows, ends included."""
    return [(start, start + run) for start in (i * (total - run) // (count - 1) for i in range(count))]


class Reader(Protocol):
    def __call__(self, name: str, rows: Rows = None, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Side:
    """A model in its normal form.

    Attributes:
        name: for messages.
        trace: its traced graph, untied if the normal form is.
        atlas: its gauge.
        shapes: canonical parameter name -> shape.
        plan: how the normal form comes from the model.
        values: parameter name and range of rows -> values of the plan, any dtype.
        null: parameter -> null directions on it.
        state: how far the moves of the plan have come.
        gauge: atlases of the model in its normal form.
        common: whether it holds only the tokens that the other side has, in the order of the first.
    """

    name: str
    trace: Trace
    atlas: Atlas
    shapes: Mapping[str, tuple[int, ...]]
    plan: Rewrite
    values: Reader = field(repr=False)
    null: Mapping[str, tuple[Action, ...]] = field(repr=False)
    state: State = field(repr=False)
    gauge: Gauge = field(repr=False)
    common: bool = False

    def read(self, name: str, rows: Rows = None) -> torch.Tensor:
        """A parameter, or rows of it, in float64; null directions are zero. A new contiguous tensor."""
        value = self.values(name, rows)
        found = value.to(torch.float64).clone(memory_format=torch.contiguous_format)
        return without_null(found, self.null.get(name, ()), self.shapes[name])

    def plain(self) -> frozenset[str]:
        """Vectors that do nothing: all zeros, or all ones that no generator changes."""
        charts = {a.parameter: a.chart for g in self.atlas.generators for a in g.actions}
        found: list[str] = []
        for name, shape in self.shapes.items():
            if len(shape) < 2:
                value = self.read(name)
                if name not in charts:
                    nothing = bool((value == value.reshape(-1)[:1]).all()) and float(
                        value.reshape(-1)[0]
                    ) in (0, 1)
                else:
                    nothing = not charts[name] and not bool(value.any())
                if nothing:
                    found.append(name)
        return frozenset(found)

    def with_null(self, more: Mapping[str, Sequence[Action]]) -> Side:
        """The same with further null directions, which the other encoding of the function shows."""
        null = {name: (*self.null.get(name, ()), *more.get(name, ())) for name in (*self.null, *more)}
        return replace(self, null=null)

    def chunks(self, name: str) -> Iterator[Rows]:
        """Ranges of rows that together are the parameter, each of a bounded size."""
        shape = self.shapes[name]
        width = 1
        for size in shape[1:]:
            width *= size
        whole = not shape or shape[0] * width <= CHUNK
        if whole or any(action.axis == 0 for action in self.null.get(name, ())):
            yield None
            return
        step = max(1, CHUNK // width)
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])


def side_of_module(model: ModuleModel, *, structure: bool = True, name: str = "module") -> Side:
    """The normal form of a module in memory."""
    model = replace(model, gauge=traced_only(model.gauge))
    recipe = normal_recipe(structure=structure)
    plan, state, gauge = plan_or_nothing(lambda: model.plan(recipe, 0), model.gauge)

    def values(parameter: str, rows: Rows = None) -> torch.Tensor:
        whole = model.read(plan, parameter)
        return whole if rows is None else whole[rows[0] : rows[1]]

    return _side(name, plan, state, gauge, values)


def side_of_model(
    model: CheckpointModel, *, structure: bool = True, untie: bool = True, name: str = "checkpoint"
) -> Side:
    """The normal form of an open checkpoint; weights are streamed when they are read."""
    model = replace(model, gauge=traced_only(model.gauge)) if structure else model
    recipe = normal_recipe(structure=structure, untie=untie)
    plan, state, gauge = plan_or_nothing(lambda: model.plan(recipe, 0), model.gauge)
    view = model.view(plan)

    def values(parameter: str, rows: Rows = None) -> torch.Tensor:
        return view.read(parameter) if rows is None else view.read_rows(parameter, *rows)

    return _side(name, plan, state, gauge, values)


@contextmanager
def open_sides(a: Path, b: Path, *, vocabulary: Vocabulary | None = None) -> Generator[tuple[Side, Side]]:
    """Both directories in their normal forms; the files are closed at the end.

    Args:
        a, b: the directories.
        vocabulary: the tokens both have; where these are numbered otherwise, or tables have another
            length, both sides hold the common tokens only, as a numbers them.
    """
    with open_models(a, b) as models:
        yield sides_compared(*models, (a.name, b.name), vocabulary)


def sides_compared(
    a: CheckpointModel, b: CheckpointModel, names: tuple[str, str], vocabulary: Vocabulary | None
) -> tuple[Side, Side]:
    """Both models in their normal forms; see :func:`open_sides`."""
    from regauge.matching.tokens import taken

    first, second = sides_of(a, b, names)
    axes = token_axes(first.trace, second.trace, vocabulary)
    if vocabulary is not None and axes is not None:
        held = zip((first, second), (a, b), axes, (vocabulary.ids_a, vocabulary.ids_b), strict=True)
        first, second = (
            replace(taken(side, model.view(side.plan).rows, where.parameters, ids), common=True)
            for side, model, where, ids in held
        )
    return first, second


@contextmanager
def open_models(a: Path, b: Path) -> Generator[tuple[CheckpointModel, CheckpointModel]]:
    """Both directories, open and traced."""
    with Checkpoint.open(a) as files_a, Checkpoint.open(b) as files_b:
        yield CheckpointModel.of(a, files_a), CheckpointModel.of(b, files_b)


def sides_of(
    a: CheckpointModel, b: CheckpointModel, names: tuple[str, str], *, structure: bool = True
) -> tuple[Side, Side]:
    """The normal forms of two models. What both tie alike stays tied."""
    tied = [sorted(len(group) for group in model.gauge.tied) for model in (a, b)]
    untie = tied[0] != tied[1]
    return (
        side_of_model(a, structure=structure, untie=untie, name=names[0]),
        side_of_model(b, structure=structure, untie=untie, name=names[1]),
    )


def _side(name: str, plan: Rewrite, state: State, gauge: Gauge, values: Reader) -> Side:
    atlas = gauge.atlas(untied=state.untied, folded=state.folded)
    traced = gauge.untied if state.untied else gauge.trace
    return Side(name, traced, atlas, dict(traced.shapes), plan, values, null_actions(atlas), state, gauge)
