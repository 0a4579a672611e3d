"""Every generator in turn: from what is anchored to what depends on it, then again until nothing improves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from regauge.atlas import Action, Generator, Kind
from regauge.elements import DIAGONAL, Diagonal, Element
from regauge.matching.general import descended
from regauge.matching.kinds import Projection, improved, solve
from regauge.matching.moved import Pair
from regauge.matching.order import LINEAR, Unknown, View, sizes_of
from regauge.matching.scales import Layout, solve_diagonals

SWEEPS = 8
_SIGNED = (Kind.SIGN, Kind.SCALE)
_SIZED = (Kind.POSITIVE, Kind.SCALE)
_MATRICES = (Kind.COMPLEX, Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)
_THIN = 0.2
"""Share of a generator's features below which what is clear is a weak hint only."""
_ENOUGH = 64
"""So many clear features tell units apart whatever their share: cosines of strangers are 1/8 in the mean."""

Tell = Callable[[int, int], None]
Bundle = tuple[Generator, ...]
"""Generators that are solved at once: diagonals on one factor that share blocks, or one other."""


@dataclass(frozen=True)
class Found:
    """What was solved.

    Attributes:
        order: generators in the order they were solved.
        unsolved: generators that nothing determines; their element is left as it is.
        provisional: rotations of which a part is not determined by the weights.
    """

    order: tuple[Bundle, ...]
    unsolved: tuple[Generator, ...]
    provisional: tuple[Generator, ...]


def run(pair: Pair, generators: Sequence[Generator], tell: Tell = lambda done, total: None) -> Found:
    """Solve all generators once; ``pair`` then holds the elements."""
    linear = [generator for generator in generators if generator.kind in LINEAR]
    unknown = Unknown(linear)
    left = bundles(linear)
    total = len(left)
    order: list[Bundle] = []
    partly: list[Bundle] = []
    loose: dict[str, Generator] = {}
    while left:
        ranked = [(rank, i) for i, bundle in enumerate(left) if (rank := _rank(bundle, unknown)) is not None]
        if not ranked:
            break
        bundle = left.pop(min(ranked)[1])
        if any(g.kind in _SIGNED for g in bundle) and _clear(bundle, unknown) != _clear(bundle, Unknown(())):
            partly.append(bundle)
        _solve(pair, bundle, unknown, loose)
        for generator in bundle:
            unknown.solved(generator)
        order.append(bundle)
        tell(len(order), total)
    if loose:
        _again(pair, order, loose)
    _signed_again(pair, partly, order)
    return Found(tuple(order), tuple(g for bundle in left for g in bundle), tuple(loose.values()))


def bundles(generators: Sequence[Generator]) -> list[Bundle]:
    """The generators, each in one bundle, in their order."""
    found: list[list[Generator]] = []
    for generator in generators:
        if generator.kind not in DIAGONAL:
            found.append([generator])
            continue
        joined = [b for b in found if any(_share(generator, other) for other in b)]
        if not joined:
            found.append([generator])
            continue
        joined[0].append(generator)
        for bundle in joined[1:]:
            joined[0].extend(bundle)
            found.remove(bundle)
    return [tuple(items) for items in found]


def _share(one: Generator, other: Generator) -> bool:
    """Whether two diagonals act on one factor of one block."""
    if other.kind not in DIAGONAL or one.acting != other.acting or one.size != other.size:
        return False
    places = {(a.parameter, a.parts, a.axis) for a in other.actions}
    return any((a.parameter, a.parts, a.axis) in places for a in one.actions)


def refine(pair: Pair, found: Found) -> bool:
    """One more element for each generator, everything else being known; whether a permutation changed.

    No element makes Σ w ‖a − b‖² over all parameters larger, w being :meth:`Pair.weight`.
    """
    unknown = Unknown(())
    changed = False
    for bundle in found.order:
        generator = bundle[0]
        if generator.kind in DIAGONAL:
            _solve(pair, bundle, unknown, {})
            continue
        views = unknown.views(generator) or ()
        if generator.kind is Kind.PERMUTATION:
            element = improved(pair, generator, views)
            changed = changed or element is not None
        elif generator.kind is Kind.GENERAL_LINEAR:
            element = descended(pair, generator, views)
        else:
            element = solve(pair, generator, views)
        if element is not None and not isinstance(element, Projection):
            pair.apply(generator, element)
    return changed


def _solve(pair: Pair, bundle: Bundle, unknown: Unknown, loose: dict[str, Generator]) -> None:
    if bundle[0].kind in DIAGONAL:
        views = _clear(bundle, unknown)
        for generator, element in zip(bundle, solve_diagonals(pair, bundle, views), strict=True):
            pair.apply(generator, element)
        return
    (generator,) = bundle
    element: Element = solve(pair, generator, unknown.views(generator) or ())
    loose.pop(generator.id, None)
    if isinstance(element, Projection):
        loose[generator.id] = generator
    pair.apply(generator, element)


def _clear(bundle: Bundle, unknown: Unknown) -> list[list[View]]:
    """Views of each generator of a bundle with nothing loose."""
    views = [unknown.views(generator, bundle) or () for generator in bundle]
    return [[view for view in own if view.level == 0 and not view.scaled] for own in views]


def _again(pair: Pair, order: Sequence[Bundle], loose: dict[str, Generator]) -> None:
    """Solve everything a second time, since a rotation was known in part only when the rest was solved."""
    pending: list[Bundle] = []
    for at, bundle in enumerate(order):
        for later in order[at + 1 :]:
            if later not in pending and any(_depends(x, y) for x in later for y in bundle):
                pending.append(later)
        pending = [other for other in pending if other != bundle]
        dropped = {g.id for other in (bundle, *pending) for g in other}
        pair.replace([item for item in pair.history if item[0].id not in dropped])
        _solve(pair, bundle, Unknown([g for other in (bundle, *pending) for g in other]), loose)


def _signed_again(pair: Pair, partly: Sequence[Bundle], order: Sequence[Bundle]) -> None:
    """Solve signs again that were found from a part of what shows them, then the sizes that rested on them.

    A unit may be nothing in all that was clear, and then its sign is a guess. Where a guess was wrong, sizes
    were found from a and b that agreed less than they could.
    """
    turned: set[str] = set()
    for bundle in partly:
        _solve(pair, bundle, Unknown(()), {})
        for generator, element in pair.history[-len(bundle) :]:
            if isinstance(element, Diagonal) and bool((element.vector < 0).any()):
                turned.update(generator.parameters)
    for bundle in order:
        sized = any(g.kind in _SIZED and not turned.isdisjoint(g.parameters) for g in bundle)
        if sized and bundle not in partly:
            _solve(pair, bundle, Unknown(()), {})


def _depends(other: Generator, generator: Generator) -> bool:
    """Whether the elements of ``other`` are numbered, or act, in the order that ``generator`` sets."""
    return other.id != generator.id and (
        other.acting == generator.acting or generator.acting in {name for name, _ in other.copies}
    )


def _rank(bundle: Bundle, unknown: Unknown) -> tuple[float, int] | None:
    """How early a bundle can be solved: little is loose, much is clear. None: not yet."""
    if bundle[0].kind in DIAGONAL:
        return _rank_diagonals(bundle, unknown)
    (generator,) = bundle
    views = unknown.views(generator)
    if not views:
        return None
    levels: Mapping[int, int] = {
        level: sum(_features(v.action, generator) for v in views if v.level <= level) for level in (0, 1, 2)
    }
    whole = sum(_features(view.action, generator) for view in views)
    if generator.kind in _MATRICES:
        seen = [v for v in views if v.level == 0 and not v.scaled]
        clear = sum(_features(v.action, generator) for v in seen)
        if not clear or (clear < 2 and levels[2] > 1):
            return None
        late = 0.0 if clear >= _THIN * whole else 0.5
        if generator.kind is Kind.GENERAL_LINEAR and not _determined(generator, seen, views):
            late = 0.75
        return late, -clear
    for level in (0, 1, 2):
        enough = levels[level] >= _ENOUGH and not level
        if levels[level] and (enough or levels[level] >= _THIN * whole):
            return (level + (0.25 if level else 0.0)), -levels[level]
    return None


def _determined(generator: Generator, seen: Sequence[View], views: Sequence[View]) -> bool:
    """Whether writers and readers are clear where there are both, or one has a feature for each unit."""

    def features(among: Sequence[View], sign: int) -> int:
        return sum(_features(v.action, generator) for v in among if v.action.exponent * sign > 0)

    sides = [sign for sign in (1, -1) if features(views, sign)]
    return all(features(seen, sign) for sign in sides) or any(
        features(seen, sign) >= generator.size for sign in sides
    )


def _rank_diagonals(bundle: Bundle, unknown: Unknown) -> tuple[float, int] | None:
    """The same for diagonals: what is clear must determine as much as all blocks together do."""
    everything = [unknown.views(generator, bundle) for generator in bundle]
    if any(views is None for views in everything):
        return None
    clear = _clear(bundle, unknown)
    features = sum(_features(view.action, bundle[0]) for own in clear for view in own)
    if not features:
        return None
    whole = sum(_features(view.action, bundle[0]) for own in everything for view in own or ())
    known, most = (
        int(torch.linalg.matrix_rank(Layout(bundle, v).table)) if v else 0
        for v in (clear, [own or () for own in everything])
    )
    late = 0.0 if features >= _THIN * whole else 0.5
    return (late if known == most else 1.0), -features


def _features(action: Action, generator: Generator) -> int:
    total = 1
    for size in sizes_of(action).values():
        total *= size
    return max(1, total // (generator.count * generator.size))
