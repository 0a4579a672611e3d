"""Axes along which a value sums to zero: contracted there, it does not see a constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from regauge.facts import Center, Fact, Law, Pointwise, Remap
from regauge.solve.reads import UNEVEN


def balanced(facts: Iterable[Fact], folded: Set[int]) -> dict[int, frozenset[int]]:
    """Value -> axes along which it sums to zero."""
    known: dict[int, frozenset[int]] = {}
    for fact in facts:
        found = _axes(fact, known, folded)
        if found:
            assert isinstance(fact, (Center, Remap, Pointwise))
            known[fact.out.id] = frozenset(found)
    return known


def _axes(fact: Fact, known: Mapping[int, frozenset[int]], folded: Set[int]) -> set[int]:
    found: set[int] = set()
    if isinstance(fact, Center):
        if len(fact.over) == 1:
            found = set(fact.over)
    elif isinstance(fact, Remap):
        axes = known.get(fact.inp.id, frozenset())
        for link in fact.links:
            kept = len(link.dst) == 1 and fact.out.shape[link.dst[0]] == fact.inp.shape[link.src[0]]
            if len(link.src) == 1 and link.src[0] in axes and kept and not (link.picks or fact.op in UNEVEN):
                found.add(link.dst[0])
    elif isinstance(fact, Pointwise):
        found = _pointwise(fact, known, folded)
    return found


def _pointwise(fact: Pointwise, known: Mapping[int, frozenset[int]], folded: Set[int]) -> set[int]:
    level = [
        {j for j, i in enumerate(where) if i is not None and i in known.get(value.id, ())}
        for value, where in zip(fact.ins, fact.maps, strict=True)
    ]
    if fact.law is Law.SUM and fact.op != "aten.where":
        return set.intersection(*level)
    if fact.law is not Law.PRODUCT:
        return set()
    live = [k for k, value in enumerate(fact.ins) if value.id not in folded]
    return {
        j
        for k in live
        if k < len(fact.exponents) and fact.exponents[k] == 1
        for j in level[k]
        if j not in fact.fixed and all(fact.maps[o][j] is None for o in live if o != k)
    }
