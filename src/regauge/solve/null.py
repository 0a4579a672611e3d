"""Null directions: changes of a parameter that no reader sees, so that nobody compensates.

Meaning of the generators, kind ``null``:

- exponent 1: to the block of each action, independently, ``c[rest]`` repeated along the acting factor
  may be added;
- exponent 0: anything may be added to the block.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from regauge.atlas import Action, Factor, Generator, Kind, Part
from regauge.facts import Value
from regauge.solve.blind import Blind
from regauge.solve.family import ALL, NOTHING, Family, meet
from regauge.solve.layout import Block, unread_blocks

NOWHERE = "whole tensors"


def null_generators(solver: Any, spaces: Any, blind: Blind) -> list[Generator]:
    """One generator for each factor along which parameters may change by a constant, with an action
    for each block; and one for each block to which anything may be added."""
    found: dict[str, list[Action]] = {}
    space: dict[str, str] = {}
    size: dict[str, int] = {}
    free: list[Generator] = []
    whole: dict[tuple[str, ...], str] = {}
    values = stand_ins(solver)
    partners = {
        block: (partner, {axis for axis, _ in shared})
        for block, partner, shared in unread_blocks(solver.layout, solver.walk.result, solver.groups.read)
    }
    for value in parameters(solver):
        taken: set[tuple[int, tuple[int, ...]]] = set()
        for block in solver.layout.blocks(value):
            # What the trace does not read moves like the read block it resembles, on the axes they share.
            partner, axes = partners.get(block, (block, set(range(value.rank))))
            family = _family(solver, blind, values[str(value.parameter)], partner)
            if block in partners and family != ALL:
                family = frozenset(s for s in family if s <= axes)
            if family == ALL:
                where = next((_space(solver, spaces, block, o[0]) for o in block.order), None) or NOWHERE
                action = replace(solver.action(block, None, Fraction(0)), chart=0.0)
                free.append(Generator("", Kind.NULL, "unit", 1, (), (action,), where))
                continue
            for axis in sorted({min(s) for s in family if len(s) == 1}):
                slab = (axis, tuple(n for i, n in enumerate(block.offsets) if i != axis))
                if slab in taken:
                    continue
                taken.add(slab)
                action = _constant_along(solver, block, axis, whole)
                found.setdefault(action.acting, []).append(action)
                space.setdefault(action.acting, _space(solver, spaces, block, axis) or NOWHERE)
                size[action.acting] = value.shape[axis]
    along = [
        Generator("", Kind.NULL, name, size[name], (), tuple(actions), space[name])
        for name, actions in found.items()
    ]
    return [*along, *free]


def parameters(solver: Any) -> list[Value]:
    """One value for each parameter that some fact reads and that is not folded away."""
    return [values[0] for values in stand_ins(solver).values() if values[0].id not in solver.folded]


def stand_ins(solver: Any) -> dict[str, list[Value]]:
    """Parameter -> the values that stand for it and are read, one for each chart; folded ones first."""
    out: dict[str, list[Value]] = {}
    used: frozenset[int] = solver.used
    for value in solver.walk.result.parameters.values():
        if value.id in solver.folded:
            out.setdefault(value.parameter, []).insert(0, value)
        elif value.id in used:
            out.setdefault(value.parameter, []).append(value)
    return out


def _family(solver: Any, blind: Blind, values: list[Value], block: Block) -> Family:
    """Meet over all values that stand for the same parameter."""
    family = ALL
    for value in values:
        partner = solver.layout.pick(value, list(block.offsets))
        family = meet(family, NOTHING if partner is None else blind.of(partner))
    return family


def _space(solver: Any, spaces: Any, block: Block, axis: int) -> str | None:
    for occurrence in block.order:
        key = solver.groups.permutations.keys.get((block, occurrence))
        if occurrence[0] == axis and key is not None:
            return spaces.of(key)
    return None


def _constant_along(solver: Any, block: Block, axis: int, whole: dict[tuple[str, ...], str]) -> Action:
    """The action whose acting factor is the axis: its only factor, or one made up for all of it."""
    value = block.value
    parts: list[Part] = list(solver.parts(block))
    pieces = solver.layout.pieces(value, axis)
    if len(pieces) == 1 and len(parts[axis].factors) == 1:
        name = parts[axis].factors[0].name
    else:
        line = [b for b in solver.layout.blocks(value) if _differs_only(block, b, axis)]
        key = tuple(f.name for b in line for f in solver.parts(b)[axis].factors)
        name = whole.setdefault(key, f"w{len(whole)}")
        parts[axis] = Part(0, (Factor(name, value.shape[axis], 1),))
    assert value.parameter is not None
    return Action(value.parameter, tuple(parts), axis, name, Fraction(1))


def _differs_only(first: Block, second: Block, axis: int) -> bool:
    return all(
        a == b or i == axis for i, (a, b) in enumerate(zip(first.offsets, second.offsets, strict=True))
    )
