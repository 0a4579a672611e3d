"""What stands between a generator and its solution: elements of others that are not known yet.

An action of a generator relates one block of a with one block of b. Factors of that block on which an unknown
element still acts are *loose*: corresponding positions along them are not known. A permutation can be found
all the same, from what no such element changes; a rotation cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from regauge.atlas import Action, Generator, Kind
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
        level: 0 nothing is loose; 1 only along the axis of the action; 2 elsewhere too.
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

    def views(self, generator: Generator) -> tuple[View, ...] | None:
        """How each action can be compared now; None if the copies do not correspond yet."""
        copies = {name for name, _ in generator.copies}
        views: list[View] = []
        for action in generator.actions:
            own = (action.axis, action.acting)
            mixed: dict[str, int] = {}
            apart: dict[str, int] = {}
            scaled, waits = 0, False
            for other, act in self._acts.get(action.parameter, ()):
                if other.id == generator.id or not overlap(action, act):
                    continue
                here = (act.axis, act.acting)
                diagonal = other.kind in DIAGONAL
                if axis_of(action, act.acting) < 0 and other.size == 1:
                    # One sign for the whole block, which every group but permutations contains.
                    scaled = max(scaled, 1 if generator.kind is Kind.PERMUTATION else 0)
                    continue
                if here == own:
                    if diagonal and generator.kind not in DIAGONAL:
                        scaled = max(scaled, 1 if other.kind is Kind.SIGN else 2)
                        apart |= {n: axis_of(action, n) for n, _ in other.copies if n not in copies}
                        continue
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
            level = 0 if not loose else 1 if loose == {action.axis} else 2
            views.append(View(action, tuple(mixed), tuple(apart), scaled, level))
        return tuple(views)


def axis_of(action: Action, name: str) -> int:
    """The axis of the block that has a factor."""
    return next((i for i, part in enumerate(action.parts) if any(f.name == name for f in part.factors)), -1)


def overlap(one: Action, other: Action) -> bool:
    """Whether the blocks of two actions on one parameter may share positions.

    Blocks whose parts have the same factors are equal or, at another offset, apart.
    """
    for part, second in zip(one.parts, other.parts, strict=True):
        first, then = _layout(part.factors), _layout(second.factors)
        if first == then and part.offset != second.offset:
            return False
    return True


def _layout(factors: Collection[object]) -> frozenset[tuple[int, int]]:
    return frozenset((f.size, f.stride) for f in factors if f.size > 1)  # type: ignore[attr-defined]


def sizes_of(action: Action) -> Mapping[str, int]:
    return {factor.name: factor.size for part in action.parts for factor in part.factors}
