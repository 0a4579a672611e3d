"""Classes of factors that move together, and what facts do to them: join them, stop them, mix along axes."""

from __future__ import annotations

from collections.abc import Iterable, Set

from regauge.atlas import Kind
from regauge.facts import Fact, Facts, Value
from regauge.interpret import Selection
from regauge.solve.forest import Blame, Forest, Key
from regauge.solve.layout import Block, Layout, Occurrence, OccurrenceMap

LINEAR = (Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR, Kind.COMPLEX)
ALL = (Kind.PERMUTATION, *LINEAR)
NOT_ONES = (Kind.ORTHOGONAL, Kind.GENERAL_LINEAR, Kind.COMPLEX)


class Classes:
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
        self.fact: Fact | None = None

    def stop(
        self, block: Block, occurrences: Iterable[Occurrence], kinds: Iterable[Kind], reason: str
    ) -> None:
        assert self.fact is not None or reason
        kinds = tuple(kinds)
        for occurrence in occurrences:
            if isinstance(block.occurrences[occurrence], Selection):
                continue
            fact = self.fact or Fact("", "", "")
            for kind in kinds:
                forest = self.permutations if kind is Kind.PERMUTATION else self.linear
                root, _ = forest.find(forest.key(block, occurrence))
                root.stops.setdefault(kind, Blame(fact, reason))

    def kill(self, reason: str, *values: Value) -> None:
        """Stop everything on the values; a fact that is not followed stops its output as well."""
        for value in values:
            for block in self.layout.blocks(value):
                self.stop(block, block.order, ALL, reason)

    def unmatched(self, out: Block, matched: Iterable[Occurrence]) -> None:
        """Output factors that no input accounts for."""
        known = set(matched)
        self.stop(out, [o for o in out.order if o not in known], ALL, "layouts do not match")

    def join(
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
            self.stop(block_a, [a], (Kind.GENERAL_LINEAR, Kind.COMPLEX), "meets itself transposed")

    def follow(self, out: Block, block: Block, mapping: OccurrenceMap, linear: bool = True) -> None:
        for a, b in mapping.items():
            self.join(block, a, out, b, 0, linear)

    def mixed(self, block: Block, axes: Iterable[int]) -> None:
        self.extra.setdefault(block, set()).update(axes)

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
