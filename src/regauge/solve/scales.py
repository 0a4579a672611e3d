"""Generators of scales and signs from the null spaces of the two linear systems."""

from __future__ import annotations

from collections.abc import Mapping, Set
from fractions import Fraction
from typing import TYPE_CHECKING

from regauge.atlas import Action, Generator, Kind
from regauge.solve.diagonal import Diagonal, Unknown
from regauge.solve.forest import Key
from regauge.solve.layout import Block, Occurrence
from regauge.solve.quotient import Quotient, Vector

if TYPE_CHECKING:
    from regauge.solve.solver import Solver
    from regauge.solve.spaces import SpaceTable


def _vector(field: Diagonal, expr: Mapping[int, Fraction]) -> Vector | None:
    entries: dict[tuple[Block, frozenset[Occurrence]], Fraction] = {}
    atoms: frozenset[int] | None = None
    for number, coefficient in expr.items():
        unknown: Unknown = field.unknowns[number]
        mine = frozenset(atom for _, atom in unknown.subset)
        if atoms is None:
            atoms = mine
        elif atoms != mine:
            return None
        entries[(unknown.block, unknown.subset)] = coefficient
    return None if atoms is None else Vector(atoms, entries)


def diagonals(
    solver: Solver, dominating: list[tuple[Kind, list[Key], list[int]]], spaces: SpaceTable
) -> list[Generator]:
    used = solver.used
    positive = [_vector(solver.positive, v) for v in solver.positive.basis()]
    signs = [_vector(solver.signs, v) for v in solver.signs.basis()]
    for_positive, for_sign = Quotient(False), Quotient(True)
    for kind, members, copies in dominating:
        for quotient in (for_positive, for_sign):
            vector = _dominated(solver, kind, members, copies, quotient.binary)
            if vector is not None:
                quotient.cover(vector)
    out: list[Generator] = []
    index = {(u.block, u.subset): i for i, u in enumerate(solver.signs.unknowns)}
    for vector in for_positive.maximal(v for v in positive if v is not None and _live(v, used)):
        odd = all(c.denominator == 1 and c % 2 for c in vector.entries.values())
        flips = {index[key]: Fraction(1) for key in vector.entries}
        both = odd and in_null(solver.signs, flips)
        if both:
            for_sign.cover(Vector(vector.atoms, dict.fromkeys(vector.entries, Fraction(1))))
        out.append(_diagonal(solver, Kind.SCALE if both else Kind.POSITIVE, vector, spaces))
    for vector in for_sign.maximal(v for v in signs if v is not None and _live(v, used)):
        out.append(_diagonal(solver, Kind.SIGN, vector, spaces))
    return out


def _dominated(
    solver: Solver, kind: Kind, members: list[Key], copies: list[int], binary: bool
) -> Vector | None:
    """The diagonal elements contained in a larger group."""
    if kind is Kind.ORTHOGONAL_ONES or (kind is Kind.ORTHOGONAL and not binary):
        return None
    entries: dict[tuple[Block, frozenset[Occurrence]], Fraction] = {}
    own = set(copies) if kind is Kind.COMPLEX else {*copies, members[0].atom}
    for key in members:
        _, parity = solver.groups.linear.find(key)
        subset = frozenset(
            o for o in key.block.order if o[1] in own and (o == key.occurrence or o[1] != key.atom)
        )
        entries[(key.block, subset)] = Fraction(1) if binary else Fraction(1 - 2 * parity)
    return Vector(frozenset(own), entries)


def _diagonal(solver: Solver, kind: Kind, vector: Vector, spaces: SpaceTable) -> Generator:
    atoms = sorted(vector.atoms, key=lambda a: (solver.size_of(a), a))
    rank = solver.rank
    entries = sorted(vector.entries.items(), key=lambda e: (rank[e[0][0].value.id], e[0][0].offsets))
    flip = entries[0][1] < 0
    acting = atoms[-1] if atoms else None
    actions: list[Action] = []
    first: Key | None = None
    for (block, subset), coefficient in entries:
        occurrence = next((o for o in subset if o[1] == acting), None)
        actions.append(solver.action(block, occurrence, -coefficient if flip else coefficient, subset))
        if first is None and occurrence is not None:
            first = solver.groups.permutations.keys.get((block, occurrence))
    return Generator(
        "",
        kind,
        solver.name(acting) if acting is not None else "unit",
        solver.size_of(acting) if acting is not None else 1,
        solver.copies_of(sorted(set(atoms) - {acting})),
        tuple(actions),
        spaces.of(first) if first is not None else "whole tensors",
    )


def _live(vector: Vector, used: Set[int]) -> bool:
    return all(block.value.id in used for block, _ in vector.entries)


def in_null(solver: Diagonal, vector: Mapping[int, Fraction]) -> bool:
    """Does a vector solve every equation? Its pivots must follow from its free unknowns."""
    pivots = solver.system.pivots
    expected: dict[int, Fraction] = {}
    for unknown, coefficient in vector.items():
        if unknown in pivots:
            continue
        for user in solver.system.users.get(unknown, ()):
            expected[user] = expected.get(user, Fraction(0)) + coefficient * pivots[user][unknown]
    for unknown in {*expected, *(u for u in vector if u in pivots)}:
        difference = expected.get(unknown, Fraction(0)) - vector.get(unknown, Fraction(0))
        if solver.binary:
            difference = Fraction(difference.numerator % 2) if difference.denominator == 1 else difference
        if difference:
            return False
    return True
