"""Two sides whose rows of tokens are brought to one order: the common tokens, as a numbers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from regauge.matching.padding import with_sizes
from regauge.matching.sides import Rows, Side

Gather = Callable[[str, torch.Tensor], torch.Tensor]
"""(parameter, int64 index) -> these rows of it, of a plan."""


def taken(side: Side, gather: Gather, axes: Mapping[str, int], index: torch.Tensor) -> Side:
    """The side with only these entries of the axes, in this order. Rows are read when they are asked for.

    Args:
        side: a side.
        gather: reads rows of its plan.
        axes: parameter -> axis that counts tokens.
        index: int64, the ids in the order wanted.
    """
    every = torch.arange(len(index))
    axes = {
        name: axis
        for name, axis in axes.items()
        if side.shapes[name][axis] != len(index) or not torch.equal(index, every)
    }
    if not axes:
        return side
    shapes = {name: _resized(shape, axes.get(name), len(index)) for name, shape in side.shapes.items()}

    def values(name: str, rows: Rows = None) -> torch.Tensor:
        axis = axes.get(name)
        if axis == 0:
            return gather(name, index if rows is None else index[rows[0] : rows[1]])
        value = side.values(name, rows)
        return value if axis is None else value.index_select(axis, index)

    sizes: dict[str, int] = {}
    actions = [act for generator in side.atlas.generators for act in generator.actions]
    for act in (*actions, *(act for acts in side.null.values() for act in acts)):
        if act.parameter in axes:
            part = act.parts[axes[act.parameter]]
            whole = side.shapes[act.parameter][axes[act.parameter]]
            sizes.update({factor.name: len(index) for factor in part.factors if factor.size == whole})
    trace = replace(side.trace, shapes={name: shapes.get(name, s) for name, s in side.trace.shapes.items()})
    return with_sizes(replace(side, trace=trace), sizes, shapes, values)


def _resized(shape: tuple[int, ...], axis: int | None, size: int) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], size, *shape[axis + 1 :])
