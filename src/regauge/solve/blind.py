"""Which changes of a value nobody sees.

Walked backward over the facts, every block of every value gets the sets of axes ``S`` such that
adding any tensor that is constant along ``S`` (and arbitrary along the other axes) leaves the function
unchanged. The empty set means that any change is invisible. Centring over axes ``S`` and softmax along
an axis start it, and so does a contraction with something that sums to zero; everything that keeps a
tensor constant along ``S`` passes it back; several readers do not see what none of them sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set

from torch import fx

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
from regauge.interpret import Walk
from regauge.solve.balance import balanced
from regauge.solve.family import ALL, NOTHING, SPREAD, Family, least, meet, through
from regauge.solve.layout import Block, Layout
from regauge.solve.reads import CONVOLUTIONS, MASKING, PLAIN_SUMS, UNEVEN, defined_everywhere, shows, sources

LOW = -1e8
"""exp of a score below this is zero."""


class Blind:
    """Which changes of every value are invisible. ``of`` answers for a block."""

    def __init__(self, walk: Walk, layout: Layout, folded: Set[int] = frozenset()) -> None:
        self.walk = walk
        self.layout = layout
        self.folded = folded
        self._seen: dict[Block, Family] = {}
        self._facts_of: dict[tuple[int, str], int] = {}
        self._centred: set[str] = set()
        for fact in walk.result.facts:
            if isinstance(fact, Center):
                self._centred.add(fact.node)
            if not isinstance(fact, (Stop, AlignPermutation)):
                for value in sources(fact):
                    key = (value.id, fact.node)
                    self._facts_of[key] = self._facts_of.get(key, 0) + 1
        self._nodes: dict[str, fx.Node] = {node.name: node for node in walk.trace.graph.nodes}
        self._readers: dict[int, list[Fact]] = {}
        for fact in walk.result.facts:
            for value in sources(fact):
                self._readers.setdefault(value.id, []).append(fact)
        self._balanced = balanced(walk.result.facts, folded)

    def solve(self) -> Blind:
        for fact in reversed(self.walk.result.facts):
            self._visit(fact)
        return self

    def of(self, block: Block) -> Family:
        """Sets of axes of the block's value; a set spans all blocks that differ along it only."""
        family = self._seen.get(block, NOTHING)
        blocks = self.layout.blocks(block.value)
        if len(blocks) == 1 or not family:
            return family
        return frozenset(s for s in family if self._whole(block, s, blocks))

    def _whole(self, block: Block, axes: frozenset[int], blocks: list[Block]) -> bool:
        return all(
            any(s <= axes for s in self._seen.get(other, NOTHING))
            for other in blocks
            if all(block.offsets[i] == n or i in axes for i, n in enumerate(other.offsets))
        )

    # --- bookkeeping -----------------------------------------------------------------------------

    def _see(self, value: Value, found: dict[Block, Family], rest: Family = ALL) -> None:
        for block in self.layout.blocks(value):
            family = found.get(block, rest)
            self._seen[block] = meet(self._seen.get(block, ALL), family)

    def _nothing(self, value: Value) -> None:
        self._see(value, {}, NOTHING)

    def _pull(self, value: Value, pairs: Iterable[tuple[Block | None, Family]]) -> None:
        found: dict[Block, Family] = {}
        for block, family in pairs:
            if block is None:
                self._nothing(value)
                return
            found[block] = meet(found.get(block, ALL), family)
        self._see(value, found, NOTHING)

    # --- facts -----------------------------------------------------------------------------------

    def _visit(self, fact: Fact) -> None:
        if isinstance(fact, Pointwise):
            self._pointwise(fact)
        elif isinstance(fact, Remap):
            self._remap(fact)
        elif isinstance(fact, Contract):
            self._contract(fact)
        elif isinstance(fact, Reduce):
            self._reduce(fact)
        elif isinstance(fact, Concat):
            self._concat(fact)
        elif isinstance(fact, Center):
            over = frozenset(i for i in fact.over if fact.inp.shape[i] != 1)
            self._same_shape(fact.out, fact.inp, lambda family: least({*family, over}))
        elif isinstance(fact, Normalise):
            over = frozenset({fact.axis} if fact.inp.shape[fact.axis] != 1 else ())
            self._same_shape(fact.out, fact.inp, lambda family: least({*(family & ALL), over}))
        elif isinstance(fact, Rotary):
            self._same_shape(fact.out, fact.inp, lambda family: family & ALL)
        elif isinstance(fact, Stop):
            self._stop(fact)
        elif isinstance(fact, AlignPermutation):
            self._nothing(fact.b)
        else:
            raise TypeError(f"no law of null directions for {type(fact).__name__}")

    def _same_shape(self, out: Value, inp: Value, law: Callable[[Family], Family]) -> None:
        def pairs() -> Iterator[tuple[Block | None, Family]]:
            for block in self.layout.blocks(inp):
                partner = self.layout.pick(out, list(block.offsets))
                yield (None, NOTHING) if partner is None else (block, law(self.of(partner)))

        self._pull(inp, pairs())

    def _pointwise(self, fact: Pointwise) -> None:
        rows = [(out, [block for block, _ in ins]) for out, ins in self.layout.pointwise(fact)]
        for k, value in enumerate(fact.ins):
            self._pull(value, [(ins[k], self._through_pointwise(fact, k, self.of(out))) for out, ins in rows])

    def _through_pointwise(self, fact: Pointwise, k: int, family: Family) -> Family:
        value, axes = fact.ins[k], fact.maps[k]
        convolution = fact.op in CONVOLUTIONS

        def plain(j: int) -> tuple[int, ...] | None:
            if j == SPREAD:
                return (() if k else (SPREAD,)) if convolution else None
            i = axes[j]
            return () if i is None else (i,)

        def scaled(j: int) -> tuple[int, ...] | None:
            if j == SPREAD or j in fact.fixed:
                return None
            for other, (operand, where) in enumerate(zip(fact.ins, fact.maps, strict=True)):
                if other != k and operand.id not in self.folded and where[j] is not None:
                    return None
            return plain(j)

        if fact.law is Law.SUM or (fact.law is Law.SHIFT and fact.op not in MASKING):
            return through(family, value, plain)
        if fact.law is Law.PRODUCT and k < len(fact.exponents) and fact.exponents[k] == 1:
            return through(family, value, scaled)
        if k == 0 and fact.op in MASKING and self._masks_softmax(fact):
            return through(family, value, plain)
        return family & ALL if defined_everywhere(fact, k) else NOTHING

    def _masks_softmax(self, fact: Pointwise) -> bool:
        """Entries are replaced by a number so low that the softmax, which alone reads them, gives zero
        there: a constant along its axis then cancels among the others."""
        node = self._nodes.get(fact.node)
        fill = None if node is None or len(node.args) < 3 else node.args[2]
        low = isinstance(fill, (int, float)) and fill <= LOW
        readers = self._readers.get(fact.out.id, [])
        return low and len(readers) == 1 and isinstance(readers[0], Normalise) and fact.law is Law.SHIFT

    def _remap(self, fact: Remap) -> None:
        by_target = {j: link for link in fact.links for j in link.dst}
        linked = {i for link in fact.links for i in link.src}
        free = tuple(i for i in range(fact.inp.rank) if i not in linked)
        structure = self.walk.structure
        convolution = fact.op in CONVOLUTIONS

        def back(j: int) -> tuple[int, ...] | None:
            if j == SPREAD:
                return (SPREAD,) if convolution else None
            if fact.op in UNEVEN and structure.is_data(fact.out.axes[j]):
                return None
            link = by_target.get(j)
            if link is None:
                return (SPREAD,) if convolution else free
            return link.src

        found: dict[Block, Family] = {}
        for out, block, _ in self.layout.remap(fact):
            if block is None:
                self._nothing(fact.inp)
                return
            found[block] = meet(found.get(block, ALL), through(self.of(out), fact.inp, back))
        missing = [block for block in self.layout.blocks(fact.inp) if block not in found]
        if any(shows(self.layout, fact, block) for block in missing):
            self._nothing(fact.inp)
            return
        self._see(fact.inp, found)

    def _contract(self, fact: Contract) -> None:
        place = {letter: j for j, letter in enumerate(fact.lo)}
        rows = [(a, b, out) for a, out, b, _, _, _ in self.layout.contract(fact)]
        operands = ((fact.a, fact.la, fact.b, fact.lb), (fact.b, fact.lb, fact.a, fact.la))
        for k, (value, letters, other, others) in enumerate(operands):
            own = {place[x]: i for i, x in enumerate(letters) if x in place and value.shape[i] != 1}
            against = {place[x] for i, x in enumerate(others) if x in place and other.shape[i] != 1}

            def back(j: int, own: Mapping[int, int] = own, no: Set[int] = against) -> tuple[int, ...] | None:
                return (own[j],) if j in own and j not in no else None

            level = {others[i] for i in self._balanced.get(other.id, ()) if others[i] not in place}
            cancels = frozenset(frozenset({i}) for i, x in enumerate(letters) if x in level)
            pairs: list[tuple[Block | None, Family]] = []
            for row in rows:
                out = row[2]
                family = NOTHING if out is None else through(self.of(out), value, back)
                family = least({*family, *cancels})
                pairs.append((row[k], family & ALL if fact.a is fact.b else family))
            self._pull(value, pairs)

    def _reduce(self, fact: Reduce) -> None:
        if self._only_centres(fact):
            return
        source = {j: i for i, j in fact.keep}
        structure = self.walk.structure

        def back(j: int) -> tuple[int, ...] | None:
            i = source.get(j)
            if i is None or i in fact.over or fact.inp.shape[i] != fact.out.shape[j]:
                return None
            if fact.op not in PLAIN_SUMS and structure.is_data(fact.inp.axes[i]):
                return None
            return (i,)

        def pairs() -> Iterator[tuple[Block | None, Family]]:
            for block in self.layout.blocks(fact.inp):
                offsets = [block.offsets[source[j]] if j in source else 0 for j in range(fact.out.rank)]
                out = self.layout.pick(fact.out, offsets)
                if out is None:
                    yield None, NOTHING
                    return
                family = self.of(out)
                yield block, through(family, fact.inp, back) if fact.law is Law.SUM else family & ALL

        self._pull(fact.inp, pairs())

    def _only_centres(self, fact: Reduce) -> bool:
        """A mean that was only subtracted again: the centring stands for it."""
        if fact.out.mean_of is None or self.layout.blocks(fact.out)[0] in self._seen:
            return False
        node = self._nodes.get(fact.node)
        users = [] if node is None else [user.name for user in node.users]
        return bool(users) and all(user in self._centred for user in users)

    def _concat(self, fact: Concat) -> None:
        def across(j: int) -> tuple[int, ...] | None:
            return None if j == fact.axis else (j,)

        found: dict[int, list[tuple[Block | None, Family]]] = {value.id: [] for value in fact.ins}
        for out, block, _ in self.layout.concat(fact):
            if block is None:
                for value in fact.ins:
                    self._nothing(value)
                return
            family = through(self.of(out), block.value, across)
            found[block.value.id].append((block, family))
        for value in dict.fromkeys(fact.ins):
            self._pull(value, found[value.id])

    def _stop(self, fact: Stop) -> None:
        beside = self._facts_of.get((fact.value.id, fact.node), 0)
        if fact.axes is None or not beside:
            self._nothing(fact.value)
            return
        axes = frozenset(fact.axes)
        for block in self.layout.blocks(fact.value):
            seen = self._seen.get(block, ALL)
            if not fact.whole:
                self._seen[block] = frozenset(s for s in seen if not s & axes)
