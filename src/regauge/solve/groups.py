"""Groups that mix the entries of one factor: permutation, orthogonal, orthogonal fixing the ones
vector, general linear, complex. One union-find over (block, axis, atom) for permutations, one with
parity for the linear kinds; a class survives for a kind if no fact that touches it stops that kind.

=================  ============  ==========================  ============  =========
fact               permutation   orthogonal fixing ones      orthogonal    general
=================  ============  ==========================  ============  =========
contraction        same          same                        same          dual
squared length     passes        passes                      passes        stops
plain sum, mean    passes        passes                      stops         stops
constant added     passes        passes                      stops         stops
entrywise          same          stops                       stops         stops
rotary pair        stops         stops                       stops         complex only
=================  ============  ==========================  ============  =========
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from regauge.atlas import Kind
from regauge.facts import (
    AlignPermutation,
    Center,
    Concat,
    Contract,
    Fact,
    Facts,
    Law,
    Normalise,
    Pointwise,
    Reduce,
    Remap,
    Rotary,
    Stop,
    Value,
)
from regauge.interpret import Selection
from regauge.solve.layout import Block, Layout, Occurrence, OccurrenceMap, unread_blocks

LINEAR = (Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR, Kind.COMPLEX)
ALL = (Kind.PERMUTATION, *LINEAR)


@dataclass(frozen=True, slots=True)
class Blame:
    """Why a class is stopped for a kind."""

    fact: Fact
    reason: str


@dataclass(eq=False, slots=True)
class Key:
    """One occurrence of an atom in a block of a value."""

    block: Block
    occurrence: Occurrence
    parent: Key | None = None
    parity: int = 0
    members: list[Key] = field(default_factory=list)
    stops: dict[Kind, Blame] = field(default_factory=dict)
    rotated: bool = False

    @property
    def atom(self) -> int:
        return self.occurrence[1]


class Forest:
    """Union-find with parity."""

    def __init__(self) -> None:
        self.keys: dict[tuple[Block, Occurrence], Key] = {}

    def key(self, block: Block, occurrence: Occurrence) -> Key:
        key = self.keys.get((block, occurrence))
        if key is None:
            key = Key(block, occurrence)
            key.members.append(key)
            self.keys[(block, occurrence)] = key
        return key

    def find(self, key: Key) -> tuple[Key, int]:
        path: list[Key] = []
        while key.parent is not None:
            path.append(key)
            key = key.parent
        parity = 0
        for node in reversed(path):
            parity ^= node.parity
            node.parity, node.parent = parity, key
        return key, (path[0].parity if path else 0)

    def union(self, a: Key, b: Key, parity: int) -> bool:
        """Join; False if both were joined already with the other parity."""
        root_a, p = self.find(a)
        root_b, q = self.find(b)
        if root_a is root_b:
            return p ^ q == parity
        if len(root_a.members) < len(root_b.members):
            root_a, root_b = root_b, root_a
        root_b.parent = root_a
        root_b.parity = p ^ q ^ parity
        root_a.members.extend(root_b.members)
        root_b.members = []
        for kind, blame in root_b.stops.items():
            root_a.stops.setdefault(kind, blame)
        root_a.rotated = root_a.rotated or root_b.rotated
        return True


class Groups:
    """Both forests of one model."""

    def __init__(self, layout: Layout, facts: Facts, folded: Set[int] = frozenset()) -> None:
        self.layout = layout
        self.facts = facts
        self.folded = folded
        self.permutations = Forest()
        self.linear = Forest()
        self.extra: dict[Block, set[int]] = {}  # axes mixed over: what survives cannot depend on them
        self.summed: dict[tuple[Block, Occurrence], set[int]] = {}  # the same for one occurrence
        self.read: set[Block] = set()
        self._fact: Fact | None = None

    def solve(self) -> Groups:
        for value in self.facts.parameters.values():
            for block in self.layout.blocks(value):
                for occurrence in block.order:
                    if isinstance(block.occurrences[occurrence], Selection):
                        continue
                    self.permutations.key(block, occurrence)
                    self.linear.key(block, occurrence)
                    if occurrence in block.repeated:
                        self._fact = None
                        self._stop(block, [occurrence], ALL, "occurs twice on one axis")
        for fact in self.facts.facts:
            self._fact = fact
            self._handle(fact)
        self._fact = None
        unread = list(unread_blocks(self.layout, self.facts, self.read))
        for block, partner, shared in unread:
            for occurrence in block.order:
                if occurrence in shared:
                    self._join(block, occurrence, partner, occurrence, 0, True)
                else:
                    self._stop(block, [occurrence], ALL, "is a part that the trace does not read")
        self.read.difference_update(block for block, _, _ in unread)
        return self

    # --- helpers ---------------------------------------------------------------------------------

    def _stop(
        self, block: Block, occurrences: Iterable[Occurrence], kinds: Iterable[Kind], reason: str
    ) -> None:
        assert self._fact is not None or reason
        kinds = tuple(kinds)
        for occurrence in occurrences:
            if isinstance(block.occurrences[occurrence], Selection):
                continue
            fact = self._fact or Fact("", "", "")
            for kind in kinds:
                forest = self.permutations if kind is Kind.PERMUTATION else self.linear
                root, _ = forest.find(forest.key(block, occurrence))
                root.stops.setdefault(kind, Blame(fact, reason))

    def _kill(self, reason: str, *values: Value) -> None:
        """Stop everything on the values; a fact that is not followed stops its output as well."""
        for value in values:
            for block in self.layout.blocks(value):
                self._stop(block, block.order, ALL, reason)

    def _unmatched(self, out: Block, matched: Iterable[Occurrence]) -> None:
        """Output factors that no input accounts for."""
        known = set(matched)
        self._stop(out, [o for o in out.order if o not in known], ALL, "layouts do not match")

    def _join(
        self, block_a: Block, a: Occurrence, block_b: Block, b: Occurrence, parity: int, linear: bool
    ) -> None:
        atom = block_a.occurrences[a]
        if isinstance(atom, Selection) or isinstance(block_b.occurrences[b], Selection):
            return
        self.read.update((block_a, block_b))
        p, q = self.permutations.key(block_a, a), self.permutations.key(block_b, b)
        self.permutations.union(p, q, 0)
        if not linear:
            return
        x, y = self.linear.key(block_a, a), self.linear.key(block_b, b)
        if not self.linear.union(x, y, parity):
            self._stop(block_a, [a], (Kind.GENERAL_LINEAR, Kind.COMPLEX), "meets itself transposed")

    def _follow(self, out: Block, block: Block, mapping: OccurrenceMap, linear: bool = True) -> None:
        for a, b in mapping.items():
            self._join(block, a, out, b, 0, linear)

    # --- facts -----------------------------------------------------------------------------------

    def _handle(self, fact: Fact) -> None:
        if isinstance(fact, Pointwise):
            self._pointwise(fact)
        elif isinstance(fact, Contract):
            self._contract(fact)
        elif isinstance(fact, Remap):
            for out, block, mapping in self.layout.remap(fact):
                linked = {axis for link in fact.links for axis in link.dst}
                self._move(fact.inp, out, block, mapping, linked)
        elif isinstance(fact, Concat):
            for out, block, mapping in self.layout.concat(fact):
                if block is None:
                    self._kill("is joined along an axis of another layout", fact.out, *fact.ins)
                else:
                    self._move(block.value, out, block, mapping, set(range(fact.out.rank)))
        elif isinstance(fact, Reduce):
            self._reduce(fact)
        elif isinstance(fact, Center):
            for out in self.layout.blocks(fact.out):
                block = self.layout.pick(fact.inp, list(out.offsets))
                if block is None:
                    self._kill("layouts do not match", fact.inp, fact.out)
                    continue
                self._follow(out, block, {o: o for o in block.order if o in out.occurrences})
                centred = [o for o in block.order if o[0] in fact.over]
                self._stop(block, centred, _NOT_ONES, "its mean is subtracted")
                self._mixed(block, fact.over)
        elif isinstance(fact, Normalise):
            for out in self.layout.blocks(fact.out):
                block = self.layout.pick(fact.inp, list(out.offsets))
                if block is None:
                    self._kill("layouts do not match", fact.inp, fact.out)
                    continue
                self._follow(out, block, {o: o for o in block.order if o in out.occurrences}, linear=False)
                self._stop(block, block.order, LINEAR, "passes through softmax")
                self._stop(out, out.order, LINEAR, "passes through softmax")
                self._mixed(block, (fact.axis,))
        elif isinstance(fact, Rotary):
            self._rotary(fact)
        elif isinstance(fact, AlignPermutation):
            self._align(fact)
        elif isinstance(fact, Stop):
            for block in self.layout.blocks(fact.value):
                chosen = [o for o in block.order if fact.axes is None or o[0] in fact.axes]
                self._stop(block, chosen, ALL, fact.reason)
        else:
            raise TypeError(f"no group law for {type(fact).__name__}")

    def _mixed(self, block: Block, axes: Iterable[int]) -> None:
        self.extra.setdefault(block, set()).update(axes)

    def _move(
        self, value: Value, out: Block, block: Block | None, mapping: OccurrenceMap, linked: set[int]
    ) -> None:
        if block is None:
            self._kill("layouts do not match", value, out.value)
            return
        self._follow(out, block, mapping)
        lost = [o for o in block.order if o not in mapping]
        self._stop(block, lost, ALL, "is rearranged in a way that does not keep its layout")
        images = set(mapping.values())
        fresh = [o for o in out.order if o not in images]
        self._stop(out, [o for o in fresh if o[0] not in linked], _NOT_ONES, "is repeated along an axis")
        self._stop(out, [o for o in fresh if o[0] in linked], ALL, "layouts do not match")

    def _pointwise(self, fact: Pointwise) -> None:
        for out, ins in self.layout.pointwise(fact):
            if any(block is None for block, _ in ins):
                self._kill("layouts do not match", fact.out, *fact.ins)
                continue
            live = [
                (block, mapping)
                for value, (block, mapping) in zip(fact.ins, ins, strict=True)
                if block is not None and not (fact.law is Law.PRODUCT and value.id in self.folded)
            ]
            self._entrywise(fact, out, live)

    def _entrywise(self, fact: Pointwise, out: Block, live: list[tuple[Block, OccurrenceMap]]) -> None:
        count: dict[Occurrence, int] = {}
        for _, mapping in live:
            for target in mapping.values():
                count[target] = count.get(target, 0) + 1
        for target in out.order:
            holders = [(block, o) for block, mapping in live for o, t in mapping.items() if t == target]
            kinds, reason = self._law(fact, target, count.get(target, 0), len(live))
            linear = Kind.ORTHOGONAL_ONES not in kinds
            for block, o in holders:
                self._join(block, o, out, target, 0, linear)
            if kinds:
                self._stop(out, [target], kinds, reason)
                for block, o in holders:
                    self._stop(block, [o], kinds, reason)
            if target[0] in fact.fixed:
                self._stop(out, [target], ALL, "is combined with a tensor that no parameter changes")
        for block, mapping in live:
            lost = [o for o in block.order if o not in mapping]
            self._stop(block, lost, ALL, "layouts do not match")
        if live:
            self._unmatched(out, count)

    def _law(
        self, fact: Pointwise, target: Occurrence, holders: int, operands: int
    ) -> tuple[tuple[Kind, ...], str]:
        if fact.law is Law.SUM:
            if holders < operands:
                return _NOT_ONES, "a value constant along it is added"
            return (), ""
        if fact.law is Law.SHIFT:
            return _NOT_ONES, "a constant is added"
        if fact.law is Law.PRODUCT:
            if holders <= 1 and all(e == 1.0 for e in fact.exponents):
                return (), ""
            if holders <= 1:
                divided = any(e != 1.0 for e in fact.exponents) and holders == 1
                return (
                    (LINEAR, "divides entry by entry")
                    if divided and self._divides(fact, target)
                    else ((), "")
                )
            gains = [v for v in fact.ins if v.parameter is not None]
            if gains:
                return LINEAR, f"is multiplied entry by entry by {gains[0].parameter}"
            return LINEAR, "is multiplied entry by entry"
        return LINEAR, f"passes through {fact.op.removeprefix('aten.')} entry by entry"

    def _divides(self, fact: Pointwise, target: Occurrence) -> bool:
        """Does the divisor itself span the target axis?"""
        for axes, exponent in zip(fact.maps, fact.exponents, strict=True):
            if exponent != 1.0 and axes[target[0]] is not None:
                return True
        return False

    def _contract(self, fact: Contract) -> None:
        for a, out, b, free_a, free_b, pairs in self.layout.contract(fact):
            if out is None:
                self._kill("layouts do not match", fact.a, fact.b, fact.out)
                continue
            both = set(free_a.values()) & set(free_b.values())
            for block, free, labels in ((a, free_a, fact.la), (b, free_b, fact.lb)):
                over = {axis for axis, letter in enumerate(labels) if letter not in fact.lo}
                for o, target in free.items():
                    self.summed.setdefault((block, o), set()).update(over)
                    batch = target in both
                    self._join(block, o, out, target, 0, not batch)
                    if batch:
                        self._stop(block, [o], LINEAR, "is paired entry by entry in a product")
                        self._stop(out, [target], LINEAR, "is paired entry by entry in a product")
            self._unmatched(out, {*free_a.values(), *free_b.values()})
            for x, y in pairs:
                self._join(a, x, b, y, 1, True)
                if fact.a is fact.b:
                    only = (Kind.GENERAL_LINEAR, Kind.COMPLEX)
                    self._stop(a, [x], only, "only its squared length is used")
            for block, free, used, labels in (
                (a, free_a, {x for x, _ in pairs}, fact.la),
                (b, free_b, {y for _, y in pairs}, fact.lb),
            ):
                for o in block.order:
                    if o in free or o in used:
                        continue
                    if labels[o[0]] in fact.lo:
                        self._stop(block, [o], ALL, "layouts do not match")
                    else:
                        self._stop(block, [o], ALL, "is summed against data")

    def _reduce(self, fact: Reduce) -> None:
        keep = dict(fact.keep)
        for block in self.layout.blocks(fact.inp):
            offsets = [0] * fact.out.rank
            for i, j in fact.keep:
                offsets[j] = block.offsets[i]
            out = self.layout.pick(fact.out, offsets)
            if out is None:
                self._kill("layouts do not match", fact.inp, fact.out)
                return
            linear = fact.law is Law.SUM
            mapping = {
                o: (keep[o[0]], o[1])
                for o in block.order
                if o[0] in keep and (keep[o[0]], o[1]) in out.occurrences
            }
            self._follow(out, block, mapping, linear)
            self._unmatched(out, mapping.values())
            over = [o for o in block.order if o[0] in fact.over]
            if linear:
                self._stop(block, over, _NOT_ONES, "its entries are summed")
            else:
                self._stop(block, block.order, LINEAR, f"passes through {fact.op.removeprefix('aten.')}")
                self._stop(out, out.order, LINEAR, f"passes through {fact.op.removeprefix('aten.')}")
            rest = [o for o in block.order if o not in mapping and o not in over]
            self._stop(block, rest, ALL, "layouts do not match")
            self._mixed(block, fact.over)

    def _rotary(self, fact: Rotary) -> None:
        two = self.layout.structure.find(fact.two).id
        for out in self.layout.blocks(fact.out):
            block = self.layout.pick(fact.inp, list(out.offsets))
            if block is None:
                self._kill("layouts do not match", fact.inp, fact.out)
                return
            self._follow(out, block, {o: o for o in block.order if o in out.occurrences})
            for o in block.order:
                if o == (fact.axis, two):
                    kinds = (Kind.PERMUTATION, Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES, Kind.GENERAL_LINEAR)
                    self._stop(block, [o], kinds, "is a pair turned by rotary position embedding")
                    root, _ = self.linear.find(self.linear.key(block, o))
                    root.rotated = True
                elif o[0] == fact.axis:
                    reason = "every pair turns at its own frequency (rotary position embedding)"
                    self._stop(block, [o], ALL, reason)

    def _align(self, fact: AlignPermutation) -> None:
        for a in self.layout.blocks(fact.a):
            for b in self.layout.blocks(fact.b):
                for o in a.order:
                    if o[0] != fact.axis_a:
                        continue
                    target = (fact.axis_b, o[1])
                    if target in b.occurrences:
                        self._join(a, o, b, target, 0, False)
                        self._stop(a, [o], LINEAR, "its entries are selected one by one")
                        self._stop(b, [target], LINEAR, "its entries are selected one by one")
                    else:
                        self._stop(a, [o], ALL, "layouts do not match")

    # --- dependence --------------------------------------------------------------------------------

    def copies(self, members: Iterable[Key]) -> list[int]:
        """Atoms that accompany the acting one, once, in every block of the class: the element may
        differ for each of their indices. Rows selected from an atom count as it, if all of them are
        the same selection."""
        shared: set[int] | None = None
        selections: dict[int, set[int]] = {}
        for key in members:
            present: dict[int, int] = {}
            mixed = self.extra.get(key.block, set()) | self.summed.get((key.block, key.occurrence), set())
            for occurrence in key.block.order:
                if occurrence == key.occurrence or occurrence[0] in mixed:
                    continue
                atom = key.block.occurrences[occurrence]
                number = occurrence[1]
                if isinstance(atom, Selection):
                    stands = self.layout.structure.expand(atom.stands_for)
                    if len(stands) != 1:
                        continue
                    number = stands[0].id
                    selections.setdefault(number, set()).add(atom.id)
                present[number] = present.get(number, 0) + 1
            once = {atom for atom, n in present.items() if n == 1 and atom != key.atom}
            if any(n > 1 for n in present.values()):
                once -= {atom for atom, n in present.items() if n > 1}
            shared = once if shared is None else shared & once
            if not shared:
                return []
        return sorted(atom for atom in shared or () if len(selections.get(atom, ())) < 2)


_NOT_ONES = (Kind.ORTHOGONAL, Kind.GENERAL_LINEAR, Kind.COMPLEX)
