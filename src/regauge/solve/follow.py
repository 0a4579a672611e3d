"""Following a shift of one bias to the biases that can take it back.

A shift ``t`` of a parameter that is added, constant along all data, is followed forward through
rearrangements, sums, averages with weights that sum to one, and at most one linear map ``W``, which
makes it ``W t``. Every branch must end in a *slot*, a bias that is added at the same place and takes the
shift back, or where nobody sees it. Everything else (an activation function, a product, a padded
convolution) stops the shift, and there is no translation.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction

from regauge.facts import Concat, Contract, Fact, Law, Pointwise, Reduce, Remap, Stop, Value
from regauge.solve.blind import Blind
from regauge.solve.flow import Flow, inverse
from regauge.solve.layout import Block, Occurrence, OccurrenceMap
from regauge.solve.path import Failure, Form, LinearMap, Path
from regauge.solve.reads import CONVOLUTIONS, UNEVEN, shows, sources
from regauge.solve.slots import Slots

MEET = "two parts of the shift meet"
SLOT = "needs a bias slot"


class Follower:
    """Follows shifts through the facts of one walk."""

    def __init__(self, flow: Flow, blind: Blind, usable: Sequence[Value]) -> None:
        self.flow = flow
        self.layout = flow.layout
        self.blind = blind
        self.slots = Slots(flow, usable)

    def follow(self, source: Block) -> Path:
        path = Path(source)
        self._put(path, source, Form(tuple((o, o) for o in source.order), Fraction(1)), None)
        while path.queue:
            number = heapq.heappop(path.queue)
            while path.queue and path.queue[0] == number:
                heapq.heappop(path.queue)
            self._visit(path, number)
        for (slot, *_), events in path.absorbed.items():
            leaves = list(self.flow.leaves(slot))
            if len(events) != len(leaves) or set(events) != set(leaves):
                fact = self.flow.facts[events[0][0]]
                path.failures.append(Failure(fact, "the bias that would take it back is also used elsewhere"))
        return path

    # --- one step --------------------------------------------------------------------------------

    def _fail(self, path: Path, fact: Fact, form: Form, reason: str) -> None:
        if form.map is not None:
            path.failures.append(Failure(form.map.fact, SLOT, slot=True))
        else:
            path.failures.append(Failure(fact, reason))

    def _pass(
        self,
        path: Path,
        fact: Fact,
        out: Block,
        form: Form,
        mapping: OccurrenceMap,
        factor: Fraction = Fraction(1),
    ) -> None:
        """The fact hands the shift on to ``out``."""
        moved = form.moved(mapping, factor)
        if moved is None or out in path.forms:
            self._fail(path, fact, form, f"{_name(fact)} takes its axis apart" if moved is None else MEET)
            return
        self._put(path, out, moved, fact)

    def _put(self, path: Path, block: Block, form: Form, fact: Fact | None) -> None:
        if self._invisible(block, form) and not self.slots.ahead(block):
            return
        path.forms[block] = form
        readers = self.flow.consumers.get(block.value.id)
        if not readers:
            path.failures.append(Failure(fact or self.flow.facts[0], "its use was not recorded"))
        for number in readers or ():
            heapq.heappush(path.queue, number)

    def _invisible(self, block: Block, form: Form) -> bool:
        held = {here[0] for _, here in form.images}
        return any(
            not axes & held and all(len(self.layout.pieces(block.value, axis)) == 1 for axis in axes)
            for axes in self.blind.of(block)
        )

    def _visit(self, path: Path, number: int) -> None:
        fact = self.flow.facts[number]
        if isinstance(fact, Remap):
            self._remap(path, fact)
        elif isinstance(fact, Pointwise):
            self._pointwise(path, number, fact)
        elif isinstance(fact, Contract):
            self._contract(path, fact)
        elif isinstance(fact, Reduce):
            self._reduce(path, fact)
        elif isinstance(fact, Concat):
            self._concat(path, fact)
        elif isinstance(fact, Stop) and fact.axes is not None and self._beside(fact):
            return
        else:
            for block in (b for value in sources(fact) for b in self.layout.blocks(value)):
                if block in path.forms:
                    reason = fact.reason if isinstance(fact, Stop) else f"{_name(fact)} takes no shift"
                    self._fail(path, fact, path.forms[block], reason)

    def _beside(self, stop: Stop) -> bool:
        """Another fact of the same operation tells how it reads the value."""
        return any(
            self.flow.facts[n].node == stop.node and not isinstance(self.flow.facts[n], Stop)
            for n in self.flow.consumers.get(stop.value.id, ())
        )

    def _remap(self, path: Path, fact: Remap) -> None:
        rows = list(self.layout.remap(fact))
        for block in self.layout.blocks(fact.inp):
            form = path.forms.get(block)
            if form is None:
                continue
            mine = [(out, mapping) for out, b, mapping in rows if b is block]
            lost = any(b is None for _, b, _ in rows) or (not mine and shows(self.layout, fact, block))
            if fact.op in UNEVEN or lost or any(here in block.repeated for _, here in form.images):
                self._fail(path, fact, form, f"{_name(fact)} takes no shift")
                continue
            for out, mapping in mine:
                self._pass(path, fact, out, form, mapping)

    def _pointwise(self, path: Path, number: int, fact: Pointwise) -> None:
        for out, ins in self.layout.pointwise(fact):
            hits = [k for k, (block, _) in enumerate(ins) if block is not None and block in path.forms]
            lost = [v for v, (b, _) in zip(fact.ins, ins, strict=True) if b is None]
            if not hits and not any(b in path.forms for v in lost for b in self.layout.blocks(v)):
                continue
            if len(hits) != 1 or lost:
                form = next(iter(path.forms.values()))
                self._fail(path, fact, form, MEET)
                continue
            block, mapping = ins[hits[0]]
            assert block is not None
            form = path.forms[block]
            factor = self._factor(fact, hits[0])
            if factor is None:
                self._fail(path, fact, form, f"{_name(fact)} takes no shift")
                continue
            moved = form.moved(mapping, factor)
            if moved is None or not self.slots.take_back(path, number, fact, out, ins, hits[0], moved):
                self._pass(path, fact, out, form, mapping, factor)

    def _factor(self, fact: Pointwise, k: int) -> Fraction | None:
        if fact.law is Law.PRODUCT:
            rest = [v for i, v in enumerate(fact.ins) if i != k and v.id not in self.blind.folded]
            plain = not rest and not fact.fixed and fact.exponents[k] == 1
            return Fraction(1) if plain and len(fact.ins) > 1 else None
        return self.flow.coefficient(fact, k)

    def _contract(self, path: Path, fact: Contract) -> None:
        for a, out, b, free_a, free_b, pairs in self.layout.contract(fact):
            hits = [block for block in (a, b) if block in path.forms]
            if not hits:
                continue
            form = path.forms[hits[0]]
            if out is None or len(hits) > 1 or fact.a is fact.b or fact.op in CONVOLUTIONS:
                what = "may pad positions" if fact.op in CONVOLUTIONS else "multiplies it with itself"
                self._fail(path, fact, form, f"{_name(fact)} {what}")
                continue
            left = hits[0] is a
            own, other = (free_a, free_b) if left else (free_b, free_a)
            joined = dict(pairs) if left else {y: x for x, y in pairs}
            value, letters = (fact.b, fact.lb) if left else (fact.a, fact.la)
            summed = [letter for letter in letters if letter not in fact.lo]
            average = self.flow.averaged(value)
            if average is not None and summed == [letters[average]]:
                self._pass(path, fact, out, form, own)
                continue
            passed = self._through(fact, form, b if left else a, joined, other)
            if passed is None:
                self._fail(path, fact, form, f"{_name(fact)} multiplies it with an activation")
                continue
            if out in path.forms:
                self._fail(path, fact, form, MEET)
                continue
            self._put(path, out, passed, fact)

    def _through(
        self, fact: Contract, form: Form, other: Block, joined: OccurrenceMap, free: OccurrenceMap
    ) -> Form | None:
        """The image of a shift under a linear map whose weight is a parameter with two axes."""
        found = self.flow.parameter(other)
        if found is None or form.map is not None:
            return None
        block, there = found
        if block.value.rank != 2 or block.repeated or other.repeated:
            return None
        inner = form.moved(joined)
        inner = None if inner is None else inner.moved(there)
        axes = {there[o][0] for o in joined.values() if o in there}
        if inner is None or len(axes) != 1:
            return None
        axis = axes.pop()
        result = 1 - axis
        back = inverse(there)
        if back is None:
            return None
        contracted = {there[o] for o in joined.values() if o in there}
        images: list[tuple[Occurrence, Occurrence]] = []
        for o in block.order:
            if o[0] == axis and o not in contracted:
                return None
            if o[0] == result:
                here = back.get(o)
                if here is None or here not in free or free[here][1] != o[1]:
                    return None
                images.append((o, free[here]))
        for side in (axis, result):
            if len(block.pieces[side].factors) != sum(o[0] == side for o in block.order):
                return None
        return Form(tuple(images), form.scale, LinearMap(block, axis, result, fact))

    def _reduce(self, path: Path, fact: Reduce) -> None:
        keep = dict(fact.keep)
        for block in self.layout.blocks(fact.inp):
            form = path.forms.get(block)
            if form is None:
                continue
            offsets = {j: block.offsets[i] for i, j in fact.keep}
            out = self.layout.pick(fact.out, [offsets.get(j, 0) for j in range(fact.out.rank)])
            whole = all(len(self.layout.pieces(fact.inp, axis)) == 1 for axis in fact.over)
            if fact.op != "aten.mean" or fact.law is not Law.SUM or out is None or not whole:
                self._fail(path, fact, form, f"{_name(fact)} takes no shift")
                continue
            mapping = {o: (keep[o[0]], o[1]) for o in block.order if o[0] in keep and o[0] not in fact.over}
            self._pass(path, fact, out, form, mapping)

    def _concat(self, path: Path, fact: Concat) -> None:
        whole = len(self.layout.pieces(fact.out, fact.axis)) == 1
        for out, block, mapping in self.layout.concat(fact):
            if block is None or block not in path.forms:
                continue
            if whole:
                self._fail(path, fact, path.forms[block], "only some positions would be shifted")
                continue
            self._pass(path, fact, out, path.forms[block], mapping)


def _name(fact: Fact) -> str:
    return fact.op.removeprefix("aten.")
