"""Keep only diagonal generators that no larger one contains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from regauge.solve.layout import Block, Occurrence

Entry = tuple[Block, frozenset[Occurrence]]


@dataclass(frozen=True)
class Vector:
    """Exponents on blocks of parameters; the scale is a function of the given atoms."""

    atoms: frozenset[int]
    entries: dict[Entry, Fraction]

    def restrict(self, atoms: frozenset[int]) -> Vector:
        """The same exponents for scales that depend on fewer factors."""
        entries = {
            (block, frozenset(o for o in subset if o[1] in atoms)): coefficient
            for (block, subset), coefficient in self.entries.items()
        }
        return Vector(atoms, entries)


class Quotient:
    """Vectors modulo the span of what larger generators already give."""

    def __init__(self, binary: bool) -> None:
        self.binary = binary
        self._covers: list[Vector] = []
        self._by_block: dict[Block, list[int]] = {}

    def cover(self, vector: Vector) -> None:
        number = len(self._covers)
        self._covers.append(vector)
        for block, _ in vector.entries:
            self._by_block.setdefault(block, []).append(number)

    def maximal(self, vectors: Iterable[Vector]) -> list[Vector]:
        """Vectors that larger ones do not generate, those with most factors first."""
        out: list[Vector] = []
        levels: dict[frozenset[int], list[Vector]] = {}
        for vector in vectors:
            levels.setdefault(vector.atoms, []).append(vector)
        for atoms in sorted(levels, key=lambda a: (-len(a), sorted(a))):
            rows: dict[Entry, dict[Entry, Fraction]] = {}
            used: set[int] = set()
            for vector in levels[atoms]:
                for block, _ in vector.entries:
                    used.update(self._by_block.get(block, ()))
            for number in sorted(used):
                cover = self._covers[number]
                if cover.atoms >= atoms:
                    self._insert(rows, cover.restrict(atoms).entries)
            for vector in levels[atoms]:
                reduced = self._insert(rows, vector.entries)
                if reduced is not None:
                    out.append(vector)
                    self.cover(vector)
        return out

    def _insert(
        self, rows: dict[Entry, dict[Entry, Fraction]], entries: dict[Entry, Fraction]
    ) -> dict[Entry, Fraction] | None:
        work = {k: v for k, v in entries.items() if v}
        while True:
            pivot = next((k for k in work if k in rows), None)
            if pivot is None:
                break
            factor = work[pivot]
            for k, v in rows[pivot].items():
                value = work.get(k, Fraction(0)) - factor * v
                if self.binary:
                    value = Fraction(value.numerator % 2)
                if value == 0:
                    work.pop(k, None)
                else:
                    work[k] = value
        if not work:
            return None
        pivot = next(iter(work))
        scale = work[pivot]
        rows[pivot] = {k: v / scale for k, v in work.items()}
        return work
