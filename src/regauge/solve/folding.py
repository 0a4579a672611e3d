"""Which gains can be set to one: those that a diagonal generator moves freely, every entry, alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from fractions import Fraction
from typing import TYPE_CHECKING

from regauge.facts import Fact, Law, Pointwise, Remap, Value
from regauge.solve.layout import Block, Occurrence
from regauge.solve.scales import in_null

if TYPE_CHECKING:
    from regauge.solve.solver import Solver


def foldable(solver: Solver) -> set[str]:
    """Gains that a diagonal generator moves freely, every entry, on their own."""
    gains = multipliers(solver.walk.result.facts, solver.folded)
    index = {(u.value.id, u.block.offsets, u.subset): i for i, u in enumerate(solver.positive.unknowns)}
    sign_index = {(u.value.id, u.block.offsets, u.subset): i for i, u in enumerate(solver.signs.unknowns)}
    pivots = solver.positive.system.pivots
    by_free = {next(u for u in vector if u not in pivots): vector for vector in solver.positive.basis()}
    out: set[str] = set()
    for value in gains.values():
        blocks = solver.layout.blocks(value)
        if all(_folds(solver, value, block, index, sign_index, by_free, gains) for block in blocks):
            out.add(str(value.parameter))
    return out


def multipliers(facts: Iterable[Fact], folded: Set[int] = frozenset()) -> dict[int, Value]:
    """Id -> parameters that multiply, entry by entry, something that is no parameter; ``folded`` are one."""
    facts = list(facts)
    remaps = {fact.out.id: fact for fact in facts if isinstance(fact, Remap)}
    gains: dict[int, Value] = {}
    for fact in facts:
        if isinstance(fact, Pointwise) and fact.law is Law.PRODUCT:
            operands = [v for v in fact.ins if v.id not in folded]
            for value in operands:
                root = _parameter_of(remaps, value)
                if root is not None and any(_parameter_of(remaps, v) is None for v in operands):
                    gains[root.id] = root
    return gains


def _parameter_of(remaps: Mapping[int, Remap], value: Value) -> Value | None:
    """The parameter a value is, seen through reshapes."""
    while value.parameter is None:
        if value.id not in remaps:
            return None
        value = remaps[value.id].inp
    return value


def _folds(
    solver: Solver,
    value: Value,
    block: Block,
    index: Mapping[tuple[int, tuple[int, ...], frozenset[Occurrence]], int],
    sign_index: Mapping[tuple[int, tuple[int, ...], frozenset[Occurrence]], int],
    by_free: Mapping[int, Mapping[int, Fraction]],
    gains: Mapping[int, Value],
) -> bool:
    if not block.order or len({a for _, a in block.order}) != len(block.order):
        return False
    number = index.get((value.id, block.offsets, frozenset(block.order)))
    vector = by_free.get(number) if number is not None else None
    if vector is None:
        return False
    signs: dict[int, Fraction] = {}
    for unknown, coefficient in vector.items():
        u = solver.positive.unknowns[unknown]
        if u.value.id in gains and u.value.id != value.id:
            return False
        if coefficient.denominator != 1:
            return False
        if coefficient % 2:
            signs[sign_index[(u.value.id, u.block.offsets, u.subset)]] = Fraction(1)
    return in_null(solver.signs, signs)
