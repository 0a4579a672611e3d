"""Where the entries of an axis lie after some of its index sets have grown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from regauge.atoms import Atom, total
from regauge.structure import Structure


@dataclass(frozen=True)
class Leaf:
    """A leaf part of an axis, as it is and as it becomes: ``offset + Σ_f i_f · stride_f`` over its factors.

    Attributes:
        offset, grown_offset: first position before and after.
        factors: (atom id, size, stride, grown size, grown stride), outermost first.
    """

    offset: int
    grown_offset: int
    factors: tuple[tuple[int, int, int, int, int], ...]


@dataclass(frozen=True)
class GrownAxis:
    """One axis of a parameter after growth.

    Attributes:
        size: its length then.
        old: int64 [length before]: where each old position goes.
        index: (atom id, offset of a leaf before growth) -> int64 [size]: index within the atom at each
            position of that leaf, -1 elsewhere.
        stride: the same key -> step between neighbouring indices, after growth.
        leaves: the parts it consists of.
    """

    size: int
    old: torch.Tensor
    index: Mapping[tuple[int, int], torch.Tensor]
    stride: Mapping[tuple[int, int], int]
    leaves: tuple[Leaf, ...]


def grown_axis(structure: Structure, axis: Iterable[Atom], sizes: Mapping[int, int]) -> GrownAxis:
    """The axis with the atoms ``sizes`` (id -> new size) made larger; new indices come after the old."""
    leaves = tuple(_leaves(structure, list(axis), sizes))
    length = sum(_count(leaf, grown=False) for leaf in leaves)
    size = sum(_count(leaf, grown=True) for leaf in leaves)
    old = torch.empty(length, dtype=torch.int64)
    index: dict[tuple[int, int], torch.Tensor] = {}
    stride: dict[tuple[int, int], int] = {}
    for leaf in leaves:
        before, after = torch.tensor([leaf.offset]), torch.tensor([leaf.grown_offset])
        every = torch.tensor([leaf.grown_offset])
        inside: dict[int, torch.Tensor] = {}
        for atom, n, step, m, wide in leaf.factors:
            old_steps, steps = torch.arange(n), torch.arange(m)
            before = (before[:, None] + old_steps * step).flatten()
            after = (after[:, None] + old_steps * wide).flatten()
            every = (every[:, None] + steps * wide).flatten()
            inside = {key: held.repeat_interleave(m) for key, held in inside.items()}
            if atom in sizes:
                stride[atom, leaf.offset] = wide
                inside[atom] = steps.repeat(len(every) // m)
        old[before] = after
        for atom, held in inside.items():
            index[atom, leaf.offset] = torch.full((size,), -1, dtype=torch.int64)
            index[atom, leaf.offset][every] = held
    return GrownAxis(size, old, index, stride, leaves)


def positions(leaf: Leaf) -> torch.Tensor:
    """int64: every position of a leaf after growth."""
    found = torch.tensor([leaf.grown_offset])
    for _, _, _, m, wide in leaf.factors:
        found = (found[:, None] + torch.arange(m) * wide).flatten()
    return found


def _count(leaf: Leaf, grown: bool) -> int:
    count = 1
    for _, n, _, m, _ in leaf.factors:
        count *= m if grown else n
    return count


def _grown_total(structure: Structure, axis: Iterable[Atom], sizes: Mapping[int, int]) -> int:
    count = 1
    for atom in structure.expand(axis):
        if atom.segments is not None and not atom.data:
            count *= sum(_grown_total(structure, segment, sizes) for segment in atom.segments)
        else:
            count *= sizes.get(atom.id, atom.size)
    return count


def _leaves(structure: Structure, axis: list[Atom], sizes: Mapping[int, int]) -> list[Leaf]:
    """As :meth:`regauge.structure.Structure.pieces`, before and after side by side."""
    done = [Leaf(0, 0, ())]
    inner = grown_inner = 1
    for atom in reversed(structure.expand(axis)):
        if atom.segments is not None and not atom.data:
            more: list[Leaf] = []
            start = grown_start = 0
            for segment in atom.segments:
                for part in _leaves(structure, segment, sizes):
                    head = tuple((a, n, s * inner, m, w * grown_inner) for a, n, s, m, w in part.factors)
                    more.extend(
                        Leaf(
                            (start + part.offset) * inner + tail.offset,
                            (grown_start + part.grown_offset) * grown_inner + tail.grown_offset,
                            head + tail.factors,
                        )
                        for tail in done
                    )
                start += total(segment)
                grown_start += _grown_total(structure, segment, sizes)
            done = more
            inner *= atom.size
            grown_inner *= grown_start
        else:
            m = sizes.get(atom.id, atom.size)
            done = [
                Leaf(t.offset, t.grown_offset, ((atom.id, atom.size, inner, m, grown_inner), *t.factors))
                for t in done
            ]
            inner *= atom.size
            grown_inner *= m
    return sorted(done, key=lambda leaf: leaf.offset)
