"""What happens to the new entries when an index set grows: where they go, and where they are summed.

Let an index set (an atom) get more indices. A value that has it gets a *new slice* along it. Exact growth
needs two things, and both follow from the facts of the walk:

- every operation treats the indices one by one, so that the old slices do not see the new ones, and
- wherever the index set is summed over, one of the factors is zero on the new indices: Σ_new a·b = 0.

Which slices are zero follows from which parameters are zero there: a sum of zeros, a product with a zero,
a power, a homogeneous or an odd function of a zero is zero.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from regauge.errors import Refused
from regauge.facts import Center, Contract, Fact, Law, Pointwise, Reduce, Remap, Rotary
from regauge.growing.passing import Relation, relations
from regauge.solve.layout import Block, Layout, Occurrence

Slice = tuple[Block, Occurrence]
Side = tuple[str, int, int]
"""A parameter by state-dict name, one of its axes, and where on it the part that has the index set begins."""


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

    def named(self, pattern: str) -> bool:
        """Whether a parameter that has it has a name that matches; an empty pattern matches all."""
        return not pattern or any(fnmatch.fnmatchcase(name, pattern) for name, _, _ in self.sides)

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
        for relation in self._relations:
            _enter(relation, found)
        return found

    def zero(self, reach: Reach, sides: Iterable[Side]) -> set[Slice]:
        """Every slice that is zero on the new indices when these parameters are, along these axes."""
        zero: set[Slice] = {part for side in sides for part in reach.sides[side]}
        for group in self._groups:
            _spread(group, reach.atom, zero)
        return zero

    @cached_property
    def _groups(self) -> list[list[Relation]]:
        """Relations of one fact that add to one output block, together."""
        groups: dict[tuple[int, int], list[Relation]] = {}
        for relation in self._relations:
            groups.setdefault((id(relation.fact), id(relation.out)), []).append(relation)
        return list(groups.values())

    @cached_property
    def _relations(self) -> list[Relation]:
        return list(relations(self.layout))


def _enter(relation: Relation, reach: Reach) -> None:
    atom = reach.atom
    for o, reason in relation.bad:
        if o[1] == atom:
            _refuse(relation, reason)
    if relation.out is not None:
        for block, mapping in relation.ins:
            for o, target in mapping.items():
                if o[1] == atom:
                    reach.came.setdefault((relation.out, target), []).append((block, o))
                    if isinstance(relation.fact, (Remap, Reduce)):
                        reach.rearranged.add((relation.out, target))
    if isinstance(relation.fact, Contract):
        (a, free_a), (b, free_b) = relation.ins
        for x, y in relation.pairs:
            if x[1] == atom:
                reach.sums.append(Sum(relation.fact, (a, x), (b, y)))
        if relation.activations:
            left = {t: (a, o) for o, t in free_a.items() if o[1] == atom}
            right = {t: (b, o) for o, t in free_b.items() if o[1] == atom}
            reach.paired += [(left[t], right[t]) for t in left if t in right]
            reach.mixed |= left.keys() != right.keys()
    if isinstance(relation.fact, Pointwise) and relation.fact.law is Law.PRODUCT:
        carriers = [(block, o) for block, mapping in relation.ins for o in mapping if o[1] == atom]
        stored = [reach.stored(part) for part in carriers]
        if None in stored:
            reach.gains.update(side for side in stored if side is not None)
    for o in relation.over:
        if o[1] == atom:
            reach.sums.append(Sum(relation.fact, (relation.ins[0][0], o), None))
    if isinstance(relation.fact, Rotary) and any(a.id == atom for a in relation.fact.pairs):
        reach.turned = True


def _spread(group: list[Relation], atom: int, zero: set[Slice]) -> None:
    """All relations of one fact that add to one output block: their sum is zero if each of them is."""
    out = group[0].out
    if out is None:
        return
    for target in out.order:
        if target[1] != atom or (out, target) in zero:
            continue
        states = [_known(relation, target, zero) for relation in group]
        if all(
            any(state is not None for state in known) and relation.zero(known)
            for relation, known in zip(group, states, strict=True)
        ):
            zero.add((out, target))


def _known(relation: Relation, target: Occurrence, zero: set[Slice]) -> list[bool | None]:
    """For each input whether its slice is zero; None where it does not have the index set."""
    known: list[bool | None] = []
    for block, mapping in relation.ins:
        sources = [o for o, t in mapping.items() if t == target]
        known.append(all((block, o) in zero for o in sources) if sources else None)
    return known


def _refuse(relation: Relation, reason: str) -> None:
    raise Refused(
        "an index set cannot grow here: " + reason,
        node=f"{relation.fact.node} in {relation.fact.module or 'the model'}",
        expected="operations that treat its indices one by one, and sums",
        found=relation.fact.op or type(relation.fact).__name__,
        way_out="make RMSNorms of LayerNorms first, with center:norm=rms, where that exists"
        if isinstance(relation.fact, Center)
        else None,
    )
