"""Families of sets of axes: along which changes of a value are invisible."""

from __future__ import annotations

from collections.abc import Callable, Set

from regauge.facts import Value

Back = Callable[[int], "tuple[int, ...] | None"]
Family = frozenset[frozenset[int]]
"""Minimal sets of axes; a change constant along all axes of one of them is invisible."""

NOTHING: Family = frozenset()
ALL: Family = frozenset({frozenset[int]()})
SPREAD = -1
"""In a convolution, whose positions the facts leave out: "and the same at every position"."""

LIMIT = 6


def meet(first: Family, second: Family) -> Family:
    """What two readers both do not see."""
    if first is second or first == ALL:
        return second
    if second == ALL:
        return first
    joined = {a | b for a in first for b in second}
    kept = [s for s in joined if not any(other < s for other in joined)]
    kept.sort(key=lambda s: (len(s), sorted(s)))
    return frozenset(kept[:LIMIT])


def least(sets: Set[frozenset[int]]) -> Family:
    return frozenset(s for s in sets if not any(other < s for other in sets))


def through(family: Family, value: Value, back: Back) -> Family:
    """Map every set through ``back(axis) -> axes or None``; drop axes of size one."""
    out: set[frozenset[int]] = set()
    for axes in family:
        moved: set[int] | None = set()
        for axis in axes:
            image = back(axis)
            if image is None:
                moved = None
                break
            moved |= {i for i in image if i == SPREAD or value.shape[i] != 1}
        if moved is not None:
            out.add(frozenset(moved))
    return frozenset(s for s in out if not any(other < s for other in out))
