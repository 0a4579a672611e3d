"""What happens to the new entries when an index set grows: where they go, and where they are summed.

Let an index set (an atom) get more indices. A value that has it gets a *new slice* along it. Exact growth
needs two things, and both follow from the facts of the walk:

- every operation treats the indices one by one, so that the old slices do not see the new ones, and
- wherever the index set is summed over, one of the factors is zero on the new indices: Σ_new a·b = 0.

Which slices are zero follows from which parameters are zero there: a sum of zeros, a product with a zero,
a power, a homogeneous or an odd function of a zero is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from regauge.errors import Refused
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

Slice = tuple[Block, Occurrence]
Side = tuple[str, int, int]
"""A parameter by state-dict name, one of its axes, and where on it the part that has the index set begins."""

_ZERO_AT_ZERO = (Law.POWER, Law.HOMOGENEOUS, Law.ABSOLUTE, Law.ODD)


@dataclass(frozen=True)
class Sum:
    """A place where the index set is summed over: Σ_i left[…, i, …] · right[…, i, …].

    Attributes:
        fact: what sums; its ``op`` tells a mean from a sum.
        left, right: the slices that are multiplied; ``right`` is None for a plain sum of entries.
    """

    fact: Fact
    left: Slice
    right: Slice | None


@dataclass
class Reach:
    """Everything the index set reaches.

    Attributes:
        atom: id of the atom.
        size: number of its indices.
        sides: parts of parameters that have it.
        sums: where it is summed over, in the order of the graph.
        paired: products of two activations that have it as an index of both (as heads are).
        mixed: some product of two activations has it in one factor alone (as values are).
        turned: it counts the pairs that a rotary position embedding turns.
        came: slice -> the slices it is made of, entry by entry.
        rearranged: slices that hold the entries of another one in another order, or sums of them.
        gains: parameters that multiply an activation entry by entry.
    """

    atom: int
    size: int
    sides: dict[Side, list[Slice]] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    paired: list[tuple[Slice, Slice]] = field(default_factory=list)
    mixed: bool = False
    turned: bool = False
    came: dict[Slice, list[Slice]] = field(default_factory=dict)
    rearranged: set[Slice] = field(default_factory=set)
    gains: set[Side] = field(default_factory=set)

    def stored(self, part: Slice) -> Side | None:
        """The parameter that a slice shows as it is stored, or rearranged; None for an activation."""
        names = {held: side for side, parts in self.sides.items() for held in parts}
        while part not in names:
            before = self.came.get(part, ())
            if len(before) != 1 or part not in self.rearranged:
                return None
            part = before[0]
        return names[part]

    def writers(self, start: Slice) -> set[Side]:
        """Parameters whose new slice can make the new slice of ``start`` differ from zero."""
        found: set[Side] = set()
        seen = {start}
        stack = [start]
        names = {part: side for side, parts in self.sides.items() for part in parts}
        while stack:
            part = stack.pop()
            if part in names:
                found.add(names[part])
            for before in self.came.get(part, ()):
                if before not in seen:
                    seen.add(before)
                    stack.append(before)
        return found


class Follower:
    """Follows index sets through the facts of one model."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.facts = layout.facts
        self._relations: list[_Relation] | None = None

    def reach(self, atom: int) -> Reach:
        """Where the index set ``atom`` goes.

        Raises:
            Refused: an operation mixes its indices, or it is not known what it does with them.
        """
        found: Reach | None = None
        for value in self.facts.parameters.values():
            for block in self.layout.blocks(value):
                for o in block.order:
                    if o[1] == atom:
                        found = found or Reach(atom, block.occurrences[o].size)
                        assert value.parameter is not None
                        side = (value.parameter, o[0], block.offsets[o[0]])
                        found.sides.setdefault(side, []).append((block, o))
                        if o in block.repeated:
                            raise Refused("an index set occurs twice on one axis", parameter=value.parameter)
        if found is None:
            raise Refused("no parameter has this index set", space=f"atom {atom}")
        for relation in self._all():
            relation.enter(found)
        return found

    def zero(self, reach: Reach, sides: Iterable[Side]) -> set[Slice]:
        """Every slice that is zero on the new indices when these parameters are, along these axes."""
        zero: set[Slice] = {part for side in sides for part in reach.sides[side]}
        for relation in self._all():
            relation.spread(reach.atom, zero)
        return zero

    def _all(self) -> list[_Relation]:
        if self._relations is None:
            self._relations = list(_relations(self.layout))
        return self._relations


@dataclass
class _Relation:
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
    bad: list[tuple[Block, Occurrence, str]] = field(default_factory=list)
    activations: bool = False

    def enter(self, reach: Reach) -> None:
        atom = reach.atom
        for block, o, reason in self.bad:
            if o[1] == atom:
                self._refuse(block, reason)
        if self.out is not None:
            for block, mapping in self.ins:
                for o, target in mapping.items():
                    if o[1] == atom:
                        reach.came.setdefault((self.out, target), []).append((block, o))
                        if isinstance(self.fact, (Remap, Reduce)):
                            reach.rearranged.add((self.out, target))
        if isinstance(self.fact, Contract):
            (a, free_a), (b, free_b) = self.ins
            for x, y in self.pairs:
                if x[1] == atom:
                    reach.sums.append(Sum(self.fact, (a, x), (b, y)))
            if self.activations:
                left = {t: (a, o) for o, t in free_a.items() if o[1] == atom}
                right = {t: (b, o) for o, t in free_b.items() if o[1] == atom}
                reach.paired += [(left[t], right[t]) for t in left if t in right]
                reach.mixed |= left.keys() != right.keys()
        if isinstance(self.fact, Pointwise) and self.fact.law is Law.PRODUCT:
            carriers = [(block, o) for block, mapping in self.ins for o in mapping if o[1] == atom]
            stored = [reach.stored(part) for part in carriers]
            if None in stored:
                reach.gains.update(side for side in stored if side is not None)
        for o in self.over:
            if o[1] == atom:
                reach.sums.append(Sum(self.fact, (self.ins[0][0], o), None))
        if isinstance(self.fact, Rotary) and any(a.id == atom for a in self.fact.pairs):
            reach.turned = True

    def spread(self, atom: int, zero: set[Slice]) -> None:
        if self.out is None:
            return
        for target in self.out.order:
            if target[1] != atom or (self.out, target) in zero:
                continue
            known: list[bool | None] = []
            for block, mapping in self.ins:
                sources = [o for o, t in mapping.items() if t == target]
                known.append(all((block, o) in zero for o in sources) if sources else None)
            if any(state is not None for state in known) and self.zero(known):
                zero.add((self.out, target))

    def _refuse(self, block: Block, reason: str) -> None:
        raise Refused(
            "an index set cannot grow here: " + reason,
            node=f"{self.fact.node} in {self.fact.module or 'the model'}",
            expected="operations that treat its indices one by one, and sums",
            found=self.fact.op or type(self.fact).__name__,
            way_out="make RMSNorms of LayerNorms first, with center:norm=rms, where that exists"
            if isinstance(self.fact, Center)
            else None,
        )


def _all_zero(known: list[bool | None]) -> bool:
    return all(state is True for state in known)


def _moved(known: list[bool | None]) -> bool:
    return known[0] is True


def _never(known: list[bool | None]) -> bool:
    return False


def _relations(layout: Layout) -> Iterable[_Relation]:
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
                yield _Relation(fact, None, [], _never, bad=[(block, o, fact.reason) for o in chosen])
        elif isinstance(fact, AlignPermutation):
            for block in layout.blocks(fact.a):
                lost = [(block, o, "its entries are selected one by one") for o in block.order]
                yield _Relation(fact, None, [], _never, bad=[x for x in lost if x[1][0] == fact.axis_a])
        else:
            raise TypeError(f"not known how a new index passes {type(fact).__name__}")


def _carried(fact: Fact, out: Block, block: Block | None, mapping: OccurrenceMap, *ins: Value) -> _Relation:
    if block is None:
        bad = [(out, o, "layouts do not match") for o in out.order]
        return _Relation(fact, out, [], _never, bad=bad)
    lost = [(block, o, "layouts do not match") for o in block.order if o not in mapping]
    return _Relation(fact, out, [(block, mapping)], _moved, bad=lost)


def _pointwise(layout: Layout, fact: Pointwise) -> Iterable[_Relation]:
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
            yield _Relation(fact, out, [], _never, bad=[(out, o, "layouts do not match") for o in out.order])
            continue
        live = [(block, mapping) for block, mapping in ins if block is not None]
        bad = [(block, o, "layouts do not match") for block, m in live for o in block.order if o not in m]
        bad += [
            (out, o, "is combined with a tensor that no parameter changes")
            for o in out.order
            if o[0] in fact.fixed
        ]
        yield _Relation(fact, out, live, zero, bad=bad)


def _contract(layout: Layout, fact: Contract, activations: bool) -> Iterable[_Relation]:
    def zero(known: list[bool | None]) -> bool:
        return any(state is True for state in known)

    for a, out, b, free_a, free_b, pairs in layout.contract(fact):
        used = {(0, x) for x, _ in pairs} | {(1, y) for _, y in pairs}
        bad = [
            (block, o, "is summed against a tensor that no parameter changes")
            for side, (block, free) in enumerate(((a, free_a), (b, free_b)))
            for o in block.order
            if o not in free and (side, o) not in used
        ]
        yield _Relation(fact, out, [(a, free_a), (b, free_b)], zero, pairs, bad=bad, activations=activations)


def _reduce(layout: Layout, fact: Reduce) -> Iterable[_Relation]:
    keep: Mapping[int, int] = dict(fact.keep)
    for block in layout.blocks(fact.inp):
        offsets = [0] * fact.out.rank
        for i, j in fact.keep:
            offsets[j] = block.offsets[i]
        out = layout.pick(fact.out, offsets)
        if out is None:
            yield _Relation(
                fact, None, [], _never, bad=[(block, o, "layouts do not match") for o in block.order]
            )
            continue
        mapping = {
            o: (keep[o[0]], o[1])
            for o in block.order
            if o[0] in keep and (keep[o[0]], o[1]) in out.occurrences
        }
        over = [o for o in block.order if o[0] in fact.over]
        lost = [(block, o, "layouts do not match") for o in block.order if o not in mapping and o not in over]
        if fact.law is not Law.SUM:
            lost += [(block, o, f"is reduced by {fact.op.removeprefix('aten.')}") for o in over]
            over = []
        zero = _moved if fact.law in (Law.SUM, Law.HOMOGENEOUS) else _never
        yield _Relation(fact, out, [(block, mapping)], zero, over=over, bad=lost)


def _same_shape(layout: Layout, fact: Center | Normalise | Rotary) -> Iterable[_Relation]:
    for out in layout.blocks(fact.out):
        block = layout.pick(fact.inp, list(out.offsets))
        if block is None:
            yield _Relation(fact, out, [], _never, bad=[(out, o, "layouts do not match") for o in out.order])
            continue
        mapping = {o: o for o in block.order if o in out.occurrences}
        bad: list[tuple[Block, Occurrence, str]] = []
        zero = _moved
        if isinstance(fact, Center):
            bad = [(block, o, "its mean is subtracted") for o in block.order if o[0] in fact.over]
        elif isinstance(fact, Normalise):
            bad = [(block, o, "passes through softmax") for o in block.order if o[0] == fact.axis]
            zero = _never
        else:
            two = layout.structure.find(fact.two).id
            bad = [(block, o, "is a pair turned by rotary position embedding") for o in block.order
                   if o == (fact.axis, two)]  # fmt: skip
        yield _Relation(fact, out, [(block, mapping)], zero, bad=bad)
