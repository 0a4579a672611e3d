"""How the indices of a set pass through each fact, and when their new slices are zero.

=============  ==========================================  ==========================================
fact           indices                                     zero on the new indices
=============  ==========================================  ==========================================
sum            one by one                                  if every operand is
product        one by one                                  if a factor with a positive power is
power, odd,    one by one                                  if the argument is
homogeneous
other curve    one by one                                  never known
contraction    kept, paired, or summed over                if either factor is
mean, sum      kept, or summed over                        if the argument is
softmax        along another axis                          never
centring       along another axis                          if the argument is
rearrangement  kept                                        if the argument is
=============  ==========================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from regauge.facts import (
    AlignPermutation,
    Center,
    Concat,
    Contract,
    Fact,
    Law,
    Normalise,
    Pointwise,
    Reduce,
    Remap,
    Rotary,
    Stop,
    Value,
)
from regauge.solve.layout import Block, Layout, Occurrence, OccurrenceMap

_ZERO_AT_ZERO = (Law.POWER, Law.HOMOGENEOUS, Law.ABSOLUTE, Law.ODD)


@dataclass
class Relation:
    """One output block of one fact: which occurrences of the inputs become which of the output.

    Attributes:
        fact: the fact.
        out: the output block, None where a fact has none.
        ins: input blocks with their maps into the output.
        pairs: contracted occurrences of the two inputs.
        over: occurrences of the first input that are summed alone.
        bad: occurrences that go nowhere known, with the reason.
        zero: given, for each input that has an output occurrence or not, whether its slice is zero (None:
            it does not have the occurrence), whether the output's is.
        activations: both inputs of a contraction depend on what the network is given.
    """

    fact: Fact
    out: Block | None
    ins: list[tuple[Block, OccurrenceMap]]
    zero: Callable[[list[bool | None]], bool]
    pairs: list[tuple[Occurrence, Occurrence]] = field(default_factory=list)
    over: list[Occurrence] = field(default_factory=list)
    bad: list[tuple[Occurrence, str]] = field(default_factory=list)
    activations: bool = False


def _all_zero(known: list[bool | None]) -> bool:
    return all(state is True for state in known)


def _moved(known: list[bool | None]) -> bool:
    return known[0] is True


def _never(known: list[bool | None]) -> bool:
    return False


def relations(layout: Layout) -> Iterable[Relation]:
    weights = {value.id for value in layout.facts.parameters.values()}
    for fact in layout.facts.facts:
        if isinstance(fact, (Remap, Reduce)) and fact.inp.id in weights:
            weights.add(fact.out.id)
        if isinstance(fact, Pointwise):
            yield from _pointwise(layout, fact)
        elif isinstance(fact, Remap):
            for out, block, mapping in layout.remap(fact):
                yield _carried(fact, out, block, mapping, fact.inp)
        elif isinstance(fact, Concat):
            for out, block, mapping in layout.concat(fact):
                yield _carried(fact, out, block, mapping, *fact.ins)
        elif isinstance(fact, Contract):
            yield from _contract(layout, fact, not {fact.a.id, fact.b.id} & weights)
        elif isinstance(fact, Reduce):
            yield from _reduce(layout, fact)
        elif isinstance(fact, (Center, Normalise, Rotary)):
            yield from _same_shape(layout, fact)
        elif isinstance(fact, Stop):
            for block in layout.blocks(fact.value):
                chosen = [o for o in block.order if fact.axes is None or o[0] in fact.axes]
                yield Relation(fact, None, [], _never, bad=[(o, fact.reason) for o in chosen])
        elif isinstance(fact, AlignPermutation):
            for block in layout.blocks(fact.a):
                lost = [(o, "its entries are selected one by one") for o in block.order]
                yield Relation(fact, None, [], _never, bad=[x for x in lost if x[0][0] == fact.axis_a])
        else:
            raise TypeError(f"not known how a new index passes {type(fact).__name__}")


def _carried(fact: Fact, out: Block, block: Block | None, mapping: OccurrenceMap, *ins: Value) -> Relation:
    if block is None:
        bad = [(o, "layouts do not match") for o in out.order]
        return Relation(fact, out, [], _never, bad=bad)
    lost = [(o, "layouts do not match") for o in block.order if o not in mapping]
    return Relation(fact, out, [(block, mapping)], _moved, bad=lost)


def _pointwise(layout: Layout, fact: Pointwise) -> Iterable[Relation]:
    def zero(known: list[bool | None]) -> bool:
        if fact.law is Law.SUM:
            return _all_zero(known)
        if fact.law is Law.PRODUCT:
            exponents = fact.exponents or (1.0,) * len(known)
            return any(state and e > 0 for state, e in zip(known, exponents, strict=True))
        if fact.law is Law.POWER:
            return _moved(known) and all(e > 0 for e in fact.exponents)
        return fact.law in _ZERO_AT_ZERO and _all_zero(known)

    for out, ins in layout.pointwise(fact):
        if any(block is None for block, _ in ins):
            yield Relation(fact, out, [], _never, bad=[(o, "layouts do not match") for o in out.order])
            continue
        live = [(block, mapping) for block, mapping in ins if block is not None]
        bad = [(o, "layouts do not match") for block, m in live for o in block.order if o not in m]
        bad += [
            (o, "is combined with a tensor that no parameter changes")
            for o in out.order
            if o[0] in fact.fixed
        ]
        yield Relation(fact, out, live, zero, bad=bad)


def _contract(layout: Layout, fact: Contract, activations: bool) -> Iterable[Relation]:
    def zero(known: list[bool | None]) -> bool:
        return any(state is True for state in known)

    for a, out, b, free_a, free_b, pairs in layout.contract(fact):
        used = {(0, x) for x, _ in pairs} | {(1, y) for _, y in pairs}
        bad = [
            (o, "is summed against a tensor that no parameter changes")
            for side, (block, free) in enumerate(((a, free_a), (b, free_b)))
            for o in block.order
            if o not in free and (side, o) not in used
        ]
        yield Relation(fact, out, [(a, free_a), (b, free_b)], zero, pairs, bad=bad, activations=activations)


def _reduce(layout: Layout, fact: Reduce) -> Iterable[Relation]:
    keep: Mapping[int, int] = dict(fact.keep)
    for block in layout.blocks(fact.inp):
        offsets = [0] * fact.out.rank
        for i, j in fact.keep:
            offsets[j] = block.offsets[i]
        out = layout.pick(fact.out, offsets)
        if out is None:
            yield Relation(fact, None, [], _never, bad=[(o, "layouts do not match") for o in block.order])
            continue
        mapping = {
            o: (keep[o[0]], o[1])
            for o in block.order
            if o[0] in keep and (keep[o[0]], o[1]) in out.occurrences
        }
        over = [o for o in block.order if o[0] in fact.over]
        lost = [(o, "layouts do not match") for o in block.order if o not in mapping and o not in over]
        if fact.law is not Law.SUM:
            lost += [(o, f"is reduced by {fact.op.removeprefix('aten.')}") for o in over]
            over = []
        zero = _moved if fact.law in (Law.SUM, Law.HOMOGENEOUS) else _never
        yield Relation(fact, out, [(block, mapping)], zero, over=over, bad=lost)


def _same_shape(layout: Layout, fact: Center | Normalise | Rotary) -> Iterable[Relation]:
    for out in layout.blocks(fact.out):
        block = layout.pick(fact.inp, list(out.offsets))
        if block is None:
            yield Relation(fact, out, [], _never, bad=[(o, "layouts do not match") for o in out.order])
            continue
        mapping = {o: o for o in block.order if o in out.occurrences}
        bad: list[tuple[Occurrence, str]] = []
        zero = _moved
        if isinstance(fact, Center):
            bad = [(o, "its mean is subtracted") for o in block.order if o[0] in fact.over]
        elif isinstance(fact, Normalise):
            bad = [(o, "passes through softmax") for o in block.order if o[0] == fact.axis]
            zero = _never
        else:
            two = layout.structure.find(fact.two).id
            bad = [(o, "is a pair turned by rotary position embedding") for o in block.order
                   if o == (fact.axis, two)]  # fmt: skip
        yield Relation(fact, out, [(block, mapping)], zero, bad=bad)
