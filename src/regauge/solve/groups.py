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

from regauge.atlas import Kind
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
from regauge.interpret import Selection
from regauge.solve.classes import ALL, LINEAR, NOT_ONES, Classes
from regauge.solve.layout import Block, Occurrence, OccurrenceMap, unread_blocks


class Groups(Classes):
    """The law of every fact for the groups of one model."""

    def solve(self) -> Groups:
        for value in self.facts.parameters.values():
            for block in self.layout.blocks(value):
                for occurrence in block.order:
                    if isinstance(block.occurrences[occurrence], Selection):
                        continue
                    self.permutations.key(block, occurrence)
                    self.linear.key(block, occurrence)
                    if occurrence in block.repeated:
                        self.fact = None
                        self.stop(block, [occurrence], ALL, "occurs twice on one axis")
        for fact in self.facts.facts:
            self.fact = fact
            self._handle(fact)
        self.fact = None
        unread = list(unread_blocks(self.layout, self.facts, self.read))
        for block, partner, shared in unread:
            for occurrence in block.order:
                if occurrence in shared:
                    self.join(block, occurrence, partner, occurrence, 0, True)
                else:
                    self.stop(block, [occurrence], ALL, "is a part that the trace does not read")
        self.read.difference_update(block for block, _, _ in unread)
        return self

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
                    self.kill("is joined along an axis of another layout", fact.out, *fact.ins)
                else:
                    self._move(block.value, out, block, mapping, set(range(fact.out.rank)))
        elif isinstance(fact, Reduce):
            self._reduce(fact)
        elif isinstance(fact, Center):
            for out in self.layout.blocks(fact.out):
                block = self.layout.pick(fact.inp, list(out.offsets))
                if block is None:
                    self.kill("layouts do not match", fact.inp, fact.out)
                    continue
                self.follow(out, block, {o: o for o in block.order if o in out.occurrences})
                centred = [o for o in block.order if o[0] in fact.over]
                self.stop(block, centred, NOT_ONES, "its mean is subtracted")
                self.mixed(block, fact.over)
        elif isinstance(fact, Normalise):
            for out in self.layout.blocks(fact.out):
                block = self.layout.pick(fact.inp, list(out.offsets))
                if block is None:
                    self.kill("layouts do not match", fact.inp, fact.out)
                    continue
                self.follow(out, block, {o: o for o in block.order if o in out.occurrences}, linear=False)
                self.stop(block, block.order, LINEAR, "passes through softmax")
                self.stop(out, out.order, LINEAR, "passes through softmax")
                self.mixed(block, (fact.axis,))
        elif isinstance(fact, Rotary):
            self._rotary(fact)
        elif isinstance(fact, AlignPermutation):
            self._align(fact)
        elif isinstance(fact, Stop):
            for block in self.layout.blocks(fact.value):
                chosen = [o for o in block.order if fact.axes is None or o[0] in fact.axes]
                self.stop(block, chosen, ALL, fact.reason)
        else:
            raise TypeError(f"no group law for {type(fact).__name__}")

    def _move(
        self, value: Value, out: Block, block: Block | None, mapping: OccurrenceMap, linked: set[int]
    ) -> None:
        if block is None:
            self.kill("layouts do not match", value, out.value)
            return
        self.follow(out, block, mapping)
        lost = [o for o in block.order if o not in mapping]
        self.stop(block, lost, ALL, "is rearranged in a way that does not keep its layout")
        images = set(mapping.values())
        fresh = [o for o in out.order if o not in images]
        self.stop(out, [o for o in fresh if o[0] not in linked], NOT_ONES, "is repeated along an axis")
        self.stop(out, [o for o in fresh if o[0] in linked], ALL, "layouts do not match")

    def _pointwise(self, fact: Pointwise) -> None:
        for out, ins in self.layout.pointwise(fact):
            if any(block is None for block, _ in ins):
                self.kill("layouts do not match", fact.out, *fact.ins)
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
                self.join(block, o, out, target, 0, linear)
            if kinds:
                self.stop(out, [target], kinds, reason)
                for block, o in holders:
                    self.stop(block, [o], kinds, reason)
            if target[0] in fact.fixed:
                self.stop(out, [target], ALL, "is combined with a tensor that no parameter changes")
        for block, mapping in live:
            lost = [o for o in block.order if o not in mapping]
            self.stop(block, lost, ALL, "layouts do not match")
        if live:
            self.unmatched(out, count)

    def _law(
        self, fact: Pointwise, target: Occurrence, holders: int, operands: int
    ) -> tuple[tuple[Kind, ...], str]:
        if fact.law is Law.SUM:
            if holders < operands:
                return NOT_ONES, "a value constant along it is added"
            return (), ""
        if fact.law is Law.SHIFT:
            return NOT_ONES, "a constant is added"
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
                self.kill("layouts do not match", fact.a, fact.b, fact.out)
                continue
            both = set(free_a.values()) & set(free_b.values())
            for block, free, labels in ((a, free_a, fact.la), (b, free_b, fact.lb)):
                over = {axis for axis, letter in enumerate(labels) if letter not in fact.lo}
                for o, target in free.items():
                    self.summed.setdefault((block, o), set()).update(over)
                    batch = target in both
                    self.join(block, o, out, target, 0, not batch)
                    if batch:
                        self.stop(block, [o], LINEAR, "is paired entry by entry in a product")
                        self.stop(out, [target], LINEAR, "is paired entry by entry in a product")
            self.unmatched(out, {*free_a.values(), *free_b.values()})
            for x, y in pairs:
                self.join(a, x, b, y, 1, True)
                if fact.a is fact.b:
                    only = (Kind.GENERAL_LINEAR, Kind.COMPLEX)
                    self.stop(a, [x], only, "only its squared length is used")
            for block, free, used, labels in (
                (a, free_a, {x for x, _ in pairs}, fact.la),
                (b, free_b, {y for _, y in pairs}, fact.lb),
            ):
                for o in block.order:
                    if o in free or o in used:
                        continue
                    if labels[o[0]] in fact.lo:
                        self.stop(block, [o], ALL, "layouts do not match")
                    else:
                        self.stop(block, [o], ALL, "is summed against data")

    def _reduce(self, fact: Reduce) -> None:
        keep = dict(fact.keep)
        for block in self.layout.blocks(fact.inp):
            offsets = [0] * fact.out.rank
            for i, j in fact.keep:
                offsets[j] = block.offsets[i]
            out = self.layout.pick(fact.out, offsets)
            if out is None:
                self.kill("layouts do not match", fact.inp, fact.out)
                return
            linear = fact.law is Law.SUM
            mapping = {
                o: (keep[o[0]], o[1])
                for o in block.order
                if o[0] in keep and (keep[o[0]], o[1]) in out.occurrences
            }
            self.follow(out, block, mapping, linear)
            self.unmatched(out, mapping.values())
            over = [o for o in block.order if o[0] in fact.over]
            if linear:
                self.stop(block, over, NOT_ONES, "its entries are summed")
            else:
                self.stop(block, block.order, LINEAR, f"passes through {fact.op.removeprefix('aten.')}")
                self.stop(out, out.order, LINEAR, f"passes through {fact.op.removeprefix('aten.')}")
            rest = [o for o in block.order if o not in mapping and o not in over]
            self.stop(block, rest, ALL, "layouts do not match")
            self.mixed(block, fact.over)

    def _rotary(self, fact: Rotary) -> None:
        two = self.layout.structure.find(fact.two).id
        for out in self.layout.blocks(fact.out):
            block = self.layout.pick(fact.inp, list(out.offsets))
            if block is None:
                self.kill("layouts do not match", fact.inp, fact.out)
                return
            self.follow(out, block, {o: o for o in block.order if o in out.occurrences})
            for o in block.order:
                if o == (fact.axis, two):
                    kinds = (Kind.PERMUTATION, Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES, Kind.GENERAL_LINEAR)
                    self.stop(block, [o], kinds, "is a pair turned by rotary position embedding")
                    root, _ = self.linear.find(self.linear.key(block, o))
                    root.rotated = True
                elif o[0] == fact.axis:
                    reason = "every pair turns at its own frequency (rotary position embedding)"
                    self.stop(block, [o], ALL, reason)

    def _align(self, fact: AlignPermutation) -> None:
        for a in self.layout.blocks(fact.a):
            for b in self.layout.blocks(fact.b):
                for o in a.order:
                    if o[0] != fact.axis_a:
                        continue
                    target = (fact.axis_b, o[1])
                    if target in b.occurrences:
                        self.join(a, o, b, target, 0, False)
                        self.stop(a, [o], LINEAR, "its entries are selected one by one")
                        self.stop(b, [target], LINEAR, "its entries are selected one by one")
                    else:
                        self.stop(a, [o], ALL, "layouts do not match")
