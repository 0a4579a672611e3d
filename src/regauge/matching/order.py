"""What stands between a generator and its solution: elements of others that are not known yet.

An action of a generator relates one block of a with one block of b. Factors of that block on which an unknown
element still acts are *loose*: corresponding positions along them are not known. A permutation can be found
all the same, from what no such element changes; a rotation cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from regauge.atlas import Action, Generator, Kind, Part
from regauge.elements import DIAGONAL

LINEAR = (
    Kind.PERMUTATION,
    Kind.SIGN,
    Kind.POSITIVE,
    Kind.SCALE,
    Kind.COMPLEX,
    Kind.ORTHOGONAL_ONES,
    Kind.ORTHOGONAL,
    Kind.GENERAL_LINEAR,
)


@dataclass(frozen=True)
class View:
    """How the block of an action is compared.

    Attributes:
        action: the action.
        mixed: loose factors along which an unknown element mixes or reorders entries.
        apart: factors whose indices must not be summed over before squaring: those along which an unknown
            diagonal acts, and those on which an unknown element depends.
        scaled: an unknown diagonal acts along the acting factor itself: 0 none, 1 signs, 2 sizes.
        level: 0 nothing is loose; 1 only along the axis of the action; 2 elsewhere too; 3 an unknown element
            acts on other factors than the block has, so that it cannot be compared yet.
    """

    action: Action
    mixed: tuple[str, ...]
    apart: tuple[str, ...]
    scaled: int
    level: int


class Unknown:
    """Generators not solved yet, by the parameter they act on."""

    def __init__(self, generators: Sequence[Generator]) -> None:
        self._acts: dict[str, list[tuple[Generator, Action]]] = {}
        for generator in generators:
            for action in generator.actions:
                self._acts.setdefault(action.parameter, []).append((generator, action))

    def solved(self, generator: Generator) -> None:
        for name in generator.parameters:
            self._acts[name] = [item for item in self._acts[name] if item[0].id != generator.id]

    def views(self, generator: Generator, together: Sequence[Generator] = ()) -> tuple[View, ...] | None:
        """How each action can be compared now; None if the copies do not correspond yet.

        Args:
            generator: whose actions.
            together: generators solved at once with it, which do not count as unknown.
        """
        with_it = {generator.id, *(g.id for g in together)}
        copies = {name for name, _ in generator.copies}
        views: list[View] = []
        for action in generator.actions:
            own = (action.axis, action.acting)
            mixed: dict[str, int] = {}
            apart: dict[str, int] = {}
            scaled, waits, hidden = 0, False, False
            sizes = sizes_of(action)
            for other, act in self._acts.get(action.parameter, ()):
                if other.id in with_it or not overlap(action, act):
                    continue
                here = (act.axis, act.acting)
                diagonal = other.kind in DIAGONAL
                if axis_of(action, act.acting) < 0 and other.size == 1:
                    # One sign for the whole block, which every group but permutations contains.
                    scaled = max(scaled, 1 if generator.kind is Kind.PERMUTATION else 0)
                    continue
                if any(name not in sizes for name in (act.acting, *(n for n, _ in other.copies))):
                    hidden = True
                    continue
                if here == own:
                    if diagonal and generator.kind not in DIAGONAL:
                        scaled = max(scaled, 1 if other.kind is Kind.SIGN else 2)
                        apart |= {n: axis_of(action, n) for n, _ in other.copies if n not in copies}
                        continue
                    if diagonal and {other.kind, generator.kind} != {Kind.SIGN, Kind.POSITIVE}:
                        scaled = 2
                    waits = waits or not diagonal
                    continue
                if act.acting in copies and not diagonal:
                    waits = True
                    continue
                (apart if diagonal else mixed)[act.acting] = act.axis
                apart |= {name: axis_of(action, name) for name, _ in other.copies}
            if waits:
                return None
            apart = {
                n: a for n, a in apart.items() if n not in mixed and n not in copies and n != action.acting
            }
            mixed = {n: a for n, a in mixed.items() if n not in copies}
            loose = {*mixed.values(), *apart.values()}
            level = 3 if hidden else 0 if not loose else 1 if loose == {action.axis} else 2
            views.append(View(action, tuple(mixed), tuple(apart), scaled, level))
        return tuple(views)


def axis_of(action: Action, name: str) -> int:
    """The axis of the block that has a factor."""
    return next((i for i, part in enumerate(action.parts) if any(f.name == name for f in part.factors)), -1)


def overlap(one: Action, other: Action) -> bool:
    """Whether the blocks of two actions on one parameter may share positions."""
    return all(_meet(part, second) for part, second in zip(one.parts, other.parts, strict=True))


@lru_cache(maxsize=4096)
def _meet(part: Part, other: Part) -> bool:
    """Whether two parts of one axis share a position."""
    if part == other:
        return True
    if part.offset + _reach(part) < other.offset or other.offset + _reach(other) < part.offset:
        return False
    return not _positions(part).isdisjoint(_positions(other))


def _reach(part: Part) -> int:
    return sum((factor.size - 1) * factor.stride for factor in part.factors)


def _positions(part: Part) -> frozenset[int]:
    found = [part.offset]
    for factor in part.factors:
        found = [at + i * factor.stride for at in found for i in range(factor.size)]
    return frozenset(found)


def sizes_of(action: Action) -> Mapping[str, int]:
    return {factor.name: factor.size for part in action.parts for factor in part.factors}
