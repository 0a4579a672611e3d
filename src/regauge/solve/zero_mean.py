"""Which values have mean zero along an axis, given parameters that have been centred there.

Sums of zero-mean values, linear maps into a centred axis and products with numbers that are constant
along the axis keep the mean at zero; a LayerNorm of such a value is an RMSNorm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from regauge.facts import Center, Concat, Contract, Facts, Law, Pointwise, Reduce, Remap, Value

Axes = dict[int, frozenset[int]]
NONE: frozenset[int] = frozenset()


def zero_mean_inputs(
    facts: Facts, centred: Set[tuple[str, int]], taken: Mapping[int, int] | None = None
) -> tuple[str, ...]:
    """Names of the operations that centre a value whose mean is zero already.

    Args:
        facts: the result of a walk.
        centred: (parameter, axis) pairs whose mean along the axis is zero for every other index.
        taken: id of a value -> axis along which its mean is subtracted before anything reads it.
    """
    zero: Axes = {}
    for value in facts.parameters.values():
        if value.chart == 0.0:
            axes = frozenset(axis for axis in range(value.rank) if (value.parameter, axis) in centred)
            zero[value.id] = axes
    found: list[str] = []
    for fact in facts.facts:
        if isinstance(fact, Center):
            if len(fact.over) == 1 and fact.over[0] in zero.get(fact.inp.id, NONE):
                found.append(fact.node)
            zero[fact.out.id] = frozenset(fact.over) if len(fact.over) == 1 else NONE
        elif isinstance(fact, Pointwise):
            zero[fact.out.id] = _pointwise(fact, zero)
        elif isinstance(fact, Remap):
            held = zero.get(fact.inp.id, NONE)
            kept = (
                link.dst[0]
                for link in fact.links
                if len(link.src) == 1 == len(link.dst)
                and link.src[0] in held
                and not link.picks
                and _whole(fact, link.src[0], link.dst[0])
            )
            zero[fact.out.id] = frozenset(kept)
        elif isinstance(fact, Concat):
            common = [zero.get(value.id, NONE) for value in fact.ins]
            zero[fact.out.id] = frozenset.intersection(*common) - {fact.axis}
        elif isinstance(fact, Contract):
            zero[fact.out.id] = _contract(fact, zero)
        elif isinstance(fact, Reduce) and fact.law is Law.SUM:
            held = zero.get(fact.inp.id, NONE)
            zero[fact.out.id] = frozenset(j for i, j in fact.keep if i in held)
        out = getattr(fact, "out", None)
        if taken and isinstance(out, Value) and out.id in taken:
            zero[out.id] = zero.get(out.id, NONE) | {taken[out.id]}
    return tuple(dict.fromkeys(found))


def _whole(fact: Remap, source: int, target: int) -> bool:
    return fact.inp.shape[source] == fact.out.shape[target]


def _pointwise(fact: Pointwise, zero: Axes) -> frozenset[int]:
    axes: Iterable[int] = range(fact.out.rank)
    if fact.law is Law.SUM:
        return frozenset(
            j
            for j in axes
            if all(
                m[j] is not None and m[j] in zero.get(v.id, NONE)
                for v, m in zip(fact.ins, fact.maps, strict=True)
            )
        )
    if fact.law is Law.PRODUCT:
        return frozenset(j for j in axes if _one_spans(fact, zero, j))
    return NONE


def _one_spans(fact: Pointwise, zero: Axes, j: int) -> bool:
    """Exactly one factor varies along the axis, it enters as it is, and its mean is zero."""
    if j in fact.fixed:
        return False
    spans: list[tuple[Value, int, float]] = []
    for value, axes, exponent in zip(fact.ins, fact.maps, fact.exponents, strict=True):
        i = axes[j]
        if i is not None:
            spans.append((value, i, exponent))
    return len(spans) == 1 and spans[0][2] == 1.0 and spans[0][1] in zero.get(spans[0][0].id, NONE)


def _contract(fact: Contract, zero: Axes) -> frozenset[int]:
    out: list[int] = []
    for j, letter in enumerate(fact.lo):
        in_a, in_b = letter in fact.la, letter in fact.lb
        if in_a and in_b:
            continue
        value, labels = (fact.a, fact.la) if in_a else (fact.b, fact.lb)
        if (in_a or in_b) and labels.index(letter) in zero.get(value.id, NONE):
            out.append(j)
    return frozenset(out)
