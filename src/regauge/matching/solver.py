"""Every generator in turn: from what is anchored to what depends on it, then again until nothing improves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from regauge.atlas import Action, Generator, Kind
from regauge.elements import DIAGONAL
from regauge.matching.kinds import Projection, improved, solve
from regauge.matching.moved import Pair
from regauge.matching.order import LINEAR, Unknown, View, sizes_of

SWEEPS = 8
_MATRICES = (Kind.COMPLEX, Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)
_THIN = 0.2
"""Share of a generator's features below which what is clear is a weak hint only."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What was solved.

    Attributes:
        order: generators in the order they were solved.
        unsolved: generators that nothing determines; their element is left as it is.
        provisional: rotations of which a part is not determined by the weights.
    """

    order: tuple[Generator, ...]
    unsolved: tuple[Generator, ...]
    provisional: tuple[Generator, ...]


def run(pair: Pair, generators: Sequence[Generator], tell: Tell = lambda done, total: None) -> Found:
    """Solve all generators once; ``pair`` then holds the elements."""
    linear = [generator for generator in generators if generator.kind in LINEAR]
    unknown = Unknown(linear)
    left = list(linear)
    order: list[Generator] = []
    loose: dict[str, Generator] = {}
    while left:
        ranked = [(rank, -i) for i, g in enumerate(left) if (rank := _rank(g, unknown.views(g))) is not None]
        if not ranked:
            break
        at = -min(ranked, key=lambda item: (item[0], -item[1]))[1]
        generator = left.pop(at)
        _solve(pair, generator, unknown, loose)
        unknown.solved(generator)
        order.append(generator)
        tell(len(order), len(linear))
    if loose:
        _again(pair, order, loose)
    return Found(tuple(order), tuple(left), tuple(loose.values()))


def refine(pair: Pair, found: Found) -> bool:
    """One more element for each generator, everything else being known; whether a permutation changed."""
    unknown = Unknown(())
    changed = False
    for generator in found.order:
        views = unknown.views(generator) or ()
        if generator.kind is Kind.PERMUTATION:
            better = improved(pair, generator, views)
            if better is not None:
                pair.apply(generator, better)
                changed = True
            continue
        element = solve(pair, generator, views)
        if not isinstance(element, Projection):
            pair.apply(generator, element)
    return changed


def _solve(pair: Pair, generator: Generator, unknown: Unknown, loose: dict[str, Generator]) -> None:
    element = solve(pair, generator, unknown.views(generator) or ())
    loose.pop(generator.id, None)
    if isinstance(element, Projection):
        loose[generator.id] = generator
    pair.apply(generator, element)


def _again(pair: Pair, order: Sequence[Generator], loose: dict[str, Generator]) -> None:
    """Solve everything a second time, since a rotation was known in part only when the rest was solved."""
    waiting = list(order)
    while waiting:
        generator = waiting.pop(0)
        dropped = {g.id: g for g, _ in pair.history if g.id == generator.id or _depends(g, generator)}
        pair.replace([item for item in pair.history if item[0].id not in dropped])
        others = [g for g in dropped.values() if g.id != generator.id]
        waiting += [g for g in others if all(g.id != w.id for w in waiting)]
        _solve(pair, generator, Unknown([generator, *others]), loose)


def _depends(other: Generator, generator: Generator) -> bool:
    """Whether the elements of ``other`` are numbered, or act, in the order that ``generator`` sets."""
    return other.id != generator.id and (
        other.acting == generator.acting or generator.acting in {name for name, _ in other.copies}
    )


def _rank(generator: Generator, views: Sequence[View] | None) -> tuple[float, int] | None:
    """How early a generator can be solved: little is loose, much is clear. None: not yet."""
    if not views:
        return None
    levels: Mapping[int, int] = {
        level: sum(_features(v.action, generator) for v in views if v.level <= level) for level in (0, 1, 2)
    }
    if generator.kind in _MATRICES or generator.kind in DIAGONAL:
        clear = sum(_features(v.action, generator) for v in views if v.level == 0 and not v.scaled)
        if not clear or (clear < 2 and levels[2] > 1 and generator.kind in _MATRICES):
            return None
        return (0.0 if clear >= _THIN * levels[2] else 0.5), -clear
    for level in (0, 1, 2):
        if levels[level] >= _THIN * levels[2]:
            return (level + (0.25 if level else 0.0)), -levels[level]
    return None


def _features(action: Action, generator: Generator) -> int:
    total = 1
    for size in sizes_of(action).values():
        total *= size
    return max(1, total // (generator.count * generator.size))
