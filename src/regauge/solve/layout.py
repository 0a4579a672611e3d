"""Blocks of values after the structure is final, and how facts relate them.

A value whose axes are sums of segments is a grid of *blocks*, one for each choice of segments; in a
block every axis is a plain product of atoms. An *occurrence* is (axis, atom id) in a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from itertools import product

from regauge.atoms import Atom, Piece, total
from regauge.facts import Concat, Contract, Facts, Pointwise, Remap, Value
from regauge.interpret import Selection
from regauge.structure import Structure

Occurrence = tuple[int, int]  # (axis, atom id)
OccurrenceMap = dict[Occurrence, Occurrence]


@dataclass(eq=False, slots=True)
class Block:
    """One block of a value.

    Attributes:
        value: the value.
        offsets: first position on every axis.
        occurrences: (axis, atom id) -> atom; data atoms are left out, selections kept.
        order: the same in row-major order, outermost first.
        repeated: atoms that occur twice on one axis; nothing may act on them.
    """

    value: Value
    offsets: tuple[int, ...]
    pieces: tuple[Piece, ...]
    occurrences: dict[Occurrence, Atom] = field(default_factory=dict)
    order: list[Occurrence] = field(default_factory=list)
    repeated: set[Occurrence] = field(default_factory=set)


class Layout:
    """Blocks of every value, made on demand from the final structure."""

    def __init__(self, structure: Structure, facts: Facts) -> None:
        self.structure = structure
        self.facts = facts
        self._blocks: dict[int, list[Block]] = {}
        self._axis: dict[tuple[int, ...], list[Piece]] = {}

    def pieces(self, value: Value, axis: int) -> list[Piece]:
        key = tuple(id(atom) for atom in value.axes[axis])
        if key not in self._axis:
            self._axis[key] = self.structure.pieces(value.axes[axis])
        return self._axis[key]

    def blocks(self, value: Value) -> list[Block]:
        if value.id not in self._blocks:
            per_axis = [self.pieces(value, axis) for axis in range(value.rank)]
            self._blocks[value.id] = [self._block(value, pieces) for pieces in product(*per_axis)]
        return self._blocks[value.id]

    def _block(self, value: Value, pieces: tuple[Piece, ...]) -> Block:
        block = Block(value, tuple(piece.offset for piece in pieces), pieces)
        for axis, piece in enumerate(pieces):
            for atom, _ in piece.factors:
                if atom.data and not isinstance(atom, Selection):
                    continue
                key = (axis, atom.id)
                if key in block.occurrences:
                    block.repeated.add(key)
                block.occurrences[key] = atom
                block.order.append(key)
        return block

    def pick(self, value: Value, offsets: list[int]) -> Block | None:
        """The block at the given offsets; on an axis with one piece any offset will do."""
        blocks = self.blocks(value)
        if len(blocks) == 1:
            return blocks[0]
        wanted = tuple(
            0 if len(self.pieces(value, axis)) == 1 else offset for axis, offset in enumerate(offsets)
        )
        for block in blocks:
            if block.offsets == wanted:
                return block
        return None

    # --- relations -------------------------------------------------------------------------------

    def pointwise(self, fact: Pointwise) -> Iterator[tuple[Block, list[tuple[Block | None, OccurrenceMap]]]]:
        """For each output block, the input blocks with input occurrence -> output occurrence."""
        for out in self.blocks(fact.out):
            found: list[tuple[Block | None, OccurrenceMap]] = []
            for value, axes in zip(fact.ins, fact.maps, strict=True):
                found.append(self.aligned(out, value, axes))
            yield out, found

    def aligned(
        self, out: Block, value: Value, axes: tuple[int | None, ...]
    ) -> tuple[Block | None, OccurrenceMap]:
        offsets = [0] * value.rank
        for j, i in enumerate(axes):
            if i is not None:
                offsets[i] = out.offsets[j]
        block = self.pick(value, offsets)
        if block is None:
            return None, {}
        back = {i: j for j, i in enumerate(axes) if i is not None}
        mapping: OccurrenceMap = {}
        for axis, atom in block.order:
            target = (back.get(axis, -1), atom)
            if target in out.occurrences:
                mapping[(axis, atom)] = target
        return block, mapping

    def remap(self, fact: Remap) -> Iterator[tuple[Block, Block | None, OccurrenceMap]]:
        """For each output block, the input block it shows."""
        inp, out_value = fact.inp, fact.out
        for out in self.blocks(out_value):
            offsets = [0] * inp.rank
            for link in fact.links:
                position = 0
                for j in link.dst:
                    position = position * total(out_value.axes[j]) + out.offsets[j]
                position = link.start + link.step * position
                for i in reversed(link.src):
                    size = total(inp.axes[i])
                    offsets[i] = position % size
                    position //= size
            block = self.pick(inp, offsets)
            if block is None:
                yield out, None, {}
                continue
            mapping: OccurrenceMap = {}
            for link in fact.links:
                source = [o for o in block.order if o[0] in link.src]
                target = [o for o in out.order if o[0] in link.dst]
                _match(block, source, out, target, mapping)
            yield out, block, mapping

    def concat(self, fact: Concat) -> Iterator[tuple[Block, Block | None, OccurrenceMap]]:
        """For each output block, the input block it came from."""
        edges: list[tuple[int, int, Value]] = []
        start = 0
        for value in fact.ins:
            size = total(value.axes[fact.axis])
            edges.append((start, start + size, value))
            start += size
        whole = len(self.pieces(fact.out, fact.axis)) == 1
        for out in self.blocks(fact.out):
            position = out.offsets[fact.axis]
            for low, high, value in edges:
                if not whole and not low <= position < high:
                    continue
                offsets = list(out.offsets)
                offsets[fact.axis] = position - low if not whole else 0
                block = self.pick(value, offsets)
                mapping: OccurrenceMap = {}
                if block is not None:
                    for o in block.order:
                        if o in out.occurrences and (o[0] != fact.axis or not whole):
                            mapping[o] = o
                yield out, block, mapping

    def contract(
        self, fact: Contract
    ) -> Iterator[
        tuple[Block, Block | None, Block, OccurrenceMap, OccurrenceMap, list[tuple[Occurrence, Occurrence]]]
    ]:
        """For each pair of blocks multiplied and the output block they add to: the maps of free
        occurrences of both into the output, and the contracted pairs."""
        where_a = {letter: axis for axis, letter in enumerate(fact.la)}
        where_b = {letter: axis for axis, letter in enumerate(fact.lb)}
        for a in self.blocks(fact.a):
            for b in self.blocks(fact.b):
                shared = [x for x in fact.la if x in where_b]
                if any(
                    a.offsets[where_a[x]] != b.offsets[where_b[x]]
                    and len(self.pieces(fact.a, where_a[x])) > 1
                    and len(self.pieces(fact.b, where_b[x])) > 1
                    for x in shared
                ):
                    continue
                offsets: list[int] = []
                for x in fact.lo:
                    offset = a.offsets[where_a[x]] if x in where_a else 0
                    if offset == 0 and x in where_b:
                        offset = b.offsets[where_b[x]]
                    offsets.append(offset)
                out = self.pick(fact.out, offsets)
                free_a: OccurrenceMap = {}
                free_b: OccurrenceMap = {}
                pairs: list[tuple[Occurrence, Occurrence]] = []
                place = {letter: j for j, letter in enumerate(fact.lo)}
                for axis, atom in a.order:
                    letter = fact.la[axis]
                    if letter in place:
                        if out is not None and (place[letter], atom) in out.occurrences:
                            free_a[(axis, atom)] = (place[letter], atom)
                    elif letter in where_b and (where_b[letter], atom) in b.occurrences:
                        pairs.append(((axis, atom), (where_b[letter], atom)))
                for axis, atom in b.order:
                    letter = fact.lb[axis]
                    if letter in place and out is not None and (place[letter], atom) in out.occurrences:
                        free_b[(axis, atom)] = (place[letter], atom)
                yield a, out, b, free_a, free_b, pairs


def _match(
    block: Block, source: list[Occurrence], out: Block, target: list[Occurrence], mapping: OccurrenceMap
) -> None:
    once = len(set(source)) == len(source) == len(target) == len(set(target))
    if once and all(
        a[1] == b[1] or isinstance(out.occurrences[b], Selection) for a, b in zip(source, target, strict=True)
    ):
        mapping.update(zip(source, target, strict=True))
        return
    for a in source:
        same = [b for b in target if b[1] == a[1]]
        if len(same) == 1 and [o[1] for o in source].count(a[1]) == 1:
            mapping[a] = same[0]


def unread_blocks(
    layout: Layout, facts: Facts, read: Set[Block]
) -> Iterator[tuple[Block, Block, frozenset[Occurrence]]]:
    """Blocks of parameters that no fact reads although others of the same parameter are read (the rows
    of a position table beyond the traced length): each with the read block most like it, and the
    occurrences on axes where the two do not differ. There it must move along; elsewhere it is stopped.
    """
    for value in facts.parameters.values():
        blocks = layout.blocks(value)
        known = [block for block in blocks if block in read]
        if not known or len(known) == len(blocks):
            continue
        for block in blocks:
            if block in read:
                continue
            partner = max(known, key=lambda other: len(_shared(block, other)))
            yield block, partner, _shared(block, partner)


def _shared(block: Block, other: Block) -> frozenset[Occurrence]:
    same = {axis for axis, (a, b) in enumerate(zip(block.pieces, other.pieces, strict=True)) if a == b}
    return frozenset(o for o in block.order if o[0] in same and o in other.occurrences)
