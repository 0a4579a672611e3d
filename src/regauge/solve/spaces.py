"""Spaces: permutation classes of parameter axes, what they admit, and what limits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from regauge.atlas import Generator, Kind, Limit, Space
from regauge.facts import Fact
from regauge.solve.forest import Blame, Key
from regauge.solve.groups import Groups
from regauge.solve.layout import Block, Occurrence

if TYPE_CHECKING:
    from regauge.solve.solver import Solver

_DIAGONAL = {Kind.POSITIVE, Kind.SCALE, Kind.SIGN}
_AT_LEAST = {
    Kind.ORTHOGONAL_ONES: {Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR},
    Kind.ORTHOGONAL: {Kind.ORTHOGONAL, Kind.GENERAL_LINEAR},
    Kind.GENERAL_LINEAR: {Kind.GENERAL_LINEAR},
}


class SpaceTable:
    """Permutation classes of parameter axes, by id."""

    def __init__(self, groups: Groups, classes: Iterable[list[Key]]) -> None:
        self._groups = groups
        self._ids: dict[Key, str] = {}
        self._members: dict[str, list[Key]] = {}

        for members in classes:
            self._add(members)

    def _add(self, members: list[Key]) -> None:
        root, _ = self._groups.permutations.find(members[0])
        id_ = f"s{len(self._ids)}"
        self._ids[root] = id_
        self._members[id_] = members

    def of(self, key: Key) -> str:
        partner = self._groups.permutations.keys[(key.block, key.occurrence)]
        root, _ = self._groups.permutations.find(partner)
        return self._ids[root]

    def ids(self) -> Iterable[str]:
        return self._members

    def items(self) -> Iterable[tuple[str, list[Key]]]:
        return self._members.items()


def describe(solver: Solver, spaces: SpaceTable, generators: Sequence[Generator]) -> tuple[Space, ...]:
    by_space: dict[str, list[Generator]] = {}
    by_copy: dict[str, set[Kind]] = {}
    for generator in generators:
        by_space.setdefault(generator.space, []).append(generator)
        if generator.kind in _DIAGONAL:
            for name, _ in generator.copies:
                by_copy.setdefault(name, set()).add(generator.kind)
    zeros = _zeros(solver)
    out: list[Space] = []
    for id_, members in spaces.items():
        atom = members[0].atom
        root, _ = solver.groups.permutations.find(members[0])
        found = by_space.get(id_, [])
        factor = solver.name(atom)
        admits = {g.kind for g in found} | by_copy.get(factor, set())
        out.append(
            Space(
                id=id_,
                factor=factor,
                size=solver.size_of(atom),
                copies=solver.copies_of(solver.groups.copies(root.members)),
                parameters=tuple(
                    dict.fromkeys((str(k.block.value.parameter), k.occurrence[0]) for k in members)
                ),
                admits=tuple(kind for kind in Kind if kind in admits),
                limits=_limits(solver, members, admits, zeros),
            )
        )
    return tuple(out)


def _zeros(solver: Solver) -> dict[tuple[Block, Occurrence], tuple[int, Fact]]:
    """(block, occurrence) -> the fact that forced the scale along it to one."""
    return {
        (unknown.block, next(iter(unknown.subset))): (number, solver.positive.blame[number])
        for number, unknown in enumerate(solver.positive.unknowns)
        if len(unknown.subset) == 1 and number in solver.positive.blame
    }


def _limits(
    solver: Solver,
    members: Sequence[Key],
    admits: set[Kind],
    zeros: Mapping[tuple[Block, Occurrence], tuple[int, Fact]],
) -> tuple[Limit, ...]:
    limits: list[Limit] = []

    def note(kind: Kind, blame: Blame | None) -> None:
        if blame is not None:
            limits.append(Limit(kind, blame.fact.node, blame.fact.module, blame.reason))

    root, _ = solver.groups.permutations.find(members[0])
    roots: dict[Key, int] = {}
    for key in members:
        partner = solver.groups.linear.keys.get((key.block, key.occurrence))
        if partner is not None:
            top, _ = solver.groups.linear.find(partner)
            roots[top] = roots.get(top, 0) + 1
    main = max(roots, key=lambda r: roots[r]) if roots else None
    if Kind.PERMUTATION in root.stops:
        note(Kind.PERMUTATION, root.stops[Kind.PERMUTATION])
    if not admits & {Kind.POSITIVE, Kind.SCALE, Kind.GENERAL_LINEAR, Kind.COMPLEX}:
        forced = [z for k in members if (z := zeros.get((k.block, k.occurrence))) is not None]
        if forced:
            _, fact = min(forced, key=lambda item: item[0])
            reason = f"{fact.op.removeprefix('aten.')} is not homogeneous"
            limits.append(Limit(Kind.POSITIVE, fact.node, fact.module, reason))
    if main is not None:
        for kind in (Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR):
            if kind in main.stops and not admits & _AT_LEAST[kind]:
                note(kind, main.stops[kind])
    return tuple(limits)
