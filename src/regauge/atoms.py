"""Index sets, of which axes are made.

An axis is a list of atoms, outermost first; its positions are the product of their index sets. An
atom may later turn out to be a *product* of atoms (a view splits heads from width) or a *sum* of
segments (a slice or a concatenation: q | k | v); the definition then holds everywhere the atom
occurs, before and after. Two atoms become one when an operation aligns them index by index.

*Data* atoms stand for axes that no parameter change may touch (batch, positions, vocabulary rows
selected by the input). They carry a size and nothing else. Sizes never decide identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias


class Atom:
    """An index set. ``items`` is None, or the factors of a product, or the segments of a sum."""

    __slots__ = ("data", "factors", "id", "parent", "segments", "size")

    def __init__(self, id: int, size: int, data: bool) -> None:
        self.id = id
        self.size = size
        self.data = data
        self.parent: Atom | None = None
        self.factors: list[Atom] | None = None
        self.segments: list[list[Atom]] | None = None

    def __repr__(self) -> str:
        return f"{'~' if self.data else 'a'}{self.id}:{self.size}"


Axis: TypeAlias = "list[Atom]"


class Conflict(Exception):
    """Two index structures that cannot be refined to a common one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A leaf part of an axis: ``offset + sum i_f * stride_f``; factors outermost first."""

    offset: int
    factors: tuple[tuple[Atom, int], ...]


def total(axis: Sequence[Atom]) -> int:
    return prod(atom.size for atom in axis)
