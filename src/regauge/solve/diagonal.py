"""Diagonal gauges: positive scales (over the rationals) and signs (over GF(2)).

The logarithm of the scale of a value is a function of its indices. Split by the set U of factors it
truly depends on, every fact is a linear equation for each U on its own: a product adds, a power
multiplies, a contraction cancels whatever depends on a contracted factor, an entrywise function
that is not homogeneous forces zero. One unknown for each block of each parameter and each U; what
the equations leave free are the generators, with the largest dependence found by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

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
from regauge.solve.layout import Block, Layout, Occurrence, OccurrenceMap, unread_blocks
from regauge.solve.linear_system import Expr, LinearSystem

Subset = frozenset[Occurrence]
Exprs = dict[Subset, Expr]

MAX_FACTORS = 6


@dataclass(frozen=True)
class Unknown:
    """The scale of one block of one parameter, as a function of the factors in ``subset``."""

    value: Value
    block: Block
    subset: Subset


class Diagonal:
    """Solves one field. After ``solve``: ``system``, ``unknowns``, and why each zero is zero."""

    def __init__(
        self, layout: Layout, facts: Facts, binary: bool, folded: Set[int], read: Set[Block]
    ) -> None:
        self.read = read
        self._sources_of: dict[Block, Exprs] = {}
        self.layout = layout
        self.facts = facts
        self.binary = binary
        self.folded = folded
        self.system = LinearSystem(binary)
        self.unknowns: list[Unknown] = []
        self.blame: dict[int, Fact] = {}
        self._exprs: dict[Block, Exprs] = {}
        self._fact: Fact | None = None

    def solve(self) -> Diagonal:
        for value in self.facts.parameters.values():
            if value.id in self.folded:
                continue
            for block in self.layout.blocks(value):
                self._exprs[block] = self._sources_of[block] = self._sources(value, block)
        for fact in self.facts.facts:
            self._fact = fact
            self._handle(fact)
        self._fact = None
        for block, partner, shared in unread_blocks(self.layout, self.facts, self.read):
            like = self._sources_of.get(partner, {})
            for subset, expr in self._sources_of.get(block, {}).items():
                twin = like.get(subset, {}) if subset <= shared else {}
                self._zero(self.system.add(expr, twin, Fraction(-1)))
        return self

    def _sources(self, value: Value, block: Block) -> Exprs:
        free = [o for o in block.order if o not in block.repeated]
        if len(free) > MAX_FACTORS:
            free = free[:MAX_FACTORS]
        out: Exprs = {}
        for size in range(len(free) + 1):
            for subset in combinations(free, size):
                if len({atom for _, atom in subset}) < size:
                    continue
                number = len(self.unknowns)
                self.unknowns.append(Unknown(value, block, frozenset(subset)))
                out[frozenset(subset)] = self.system.variable(number, len(block.order))
        return out

    # --- helpers ---------------------------------------------------------------------------------

    def _read(self, block: Block) -> Exprs:
        """Nonzero expressions of a block, reduced."""
        exprs = self._exprs.get(block)
        if not exprs:
            return {}
        out: Exprs = {}
        for subset, expr in exprs.items():
            reduced = self.system.reduce(expr)
            if reduced:
                out[subset] = reduced
        self._exprs[block] = out
        return out

    def _zero(self, expr: Expr) -> None:
        expr = self.system.reduce(expr)
        if not expr:
            return
        pivot = max(expr, key=lambda unknown: (self.system.rank[unknown], unknown))
        if self._fact is not None:
            for unknown in expr if len(expr) == 1 else (pivot,):
                self.blame.setdefault(unknown, self._fact)
        self.system.zero(expr)

    def _kill(self, value: Value) -> None:
        for block in self.layout.blocks(value):
            for expr in self._read(block).values():
                self._zero(expr)

    def _mapped(self, block: Block | None, mapping: OccurrenceMap) -> Exprs:
        """Expressions of a block carried over; those on lost factors are forced to zero."""
        if block is None:
            return {}
        out: Exprs = {}
        for subset, expr in self._read(block).items():
            if all(o in mapping for o in subset):
                out[frozenset(mapping[o] for o in subset)] = expr
            else:
                self._zero(expr)
        return out

    def _agree(self, many: list[Exprs]) -> Exprs:
        """All must be equal, a missing one being zero."""
        if len(many) == 1:
            return many[0]
        out: Exprs = {}
        keys: dict[Subset, None] = {}
        for exprs in many:
            keys.update(dict.fromkeys(exprs))
        for key in keys:
            first = many[0].get(key, {})
            for other in many[1:]:
                self._zero(self.system.add(first, other.get(key, {}), Fraction(-1)))
            out[key] = self.system.reduce(first)
        return out

    def _add_to(self, out: Block, exprs: Exprs) -> None:
        self._exprs[out] = {k: e for k, e in exprs.items() if e}

    # --- facts -----------------------------------------------------------------------------------

    def _handle(self, fact: Fact) -> None:
        if isinstance(fact, Pointwise):
            self._pointwise(fact)
        elif isinstance(fact, Contract):
            self._contract(fact)
        elif isinstance(fact, Remap):
            for out, block, mapping in self.layout.remap(fact):
                if block is None:
                    self._kill(fact.inp)
                self._add_to(out, self._mapped(block, mapping))
        elif isinstance(fact, Concat):
            joined: dict[Block, list[Exprs]] = {}
            for out, block, mapping in self.layout.concat(fact):
                if block is None:
                    for value in fact.ins:
                        self._kill(value)
                joined.setdefault(out, []).append(self._mapped(block, mapping))
            for out, many in joined.items():
                self._add_to(out, self._agree(many))
        elif isinstance(fact, (Reduce, Center)):
            self._reduce(fact)
        elif isinstance(fact, Normalise):
            self._kill(fact.inp)
        elif isinstance(fact, Rotary):
            self._rotary(fact)
        elif isinstance(fact, Stop):
            self._stop(fact)
        elif not isinstance(fact, AlignPermutation):
            raise TypeError(f"no diagonal law for {type(fact).__name__}")

    def _pointwise(self, fact: Pointwise) -> None:
        for out, ins in self.layout.pointwise(fact):
            if any(block is None for block, _ in ins):
                for value in fact.ins:
                    self._kill(value)
                continue
            many = [
                self._mapped(block, mapping)
                for value, (block, mapping) in zip(fact.ins, ins, strict=True)
                if value.id not in self.folded or fact.law is not Law.PRODUCT
            ]
            powers = [
                Fraction(power).limit_denominator(64)
                for value, power in zip(fact.ins, fact.exponents, strict=False)
                if value.id not in self.folded or fact.law is not Law.PRODUCT
            ]
            self._add_to(out, self._apply(fact.law, many, powers))

    def _apply(self, law: Law, many: list[Exprs], powers: list[Fraction]) -> Exprs:
        if law is Law.SUM:
            return self._agree(many)
        if law is Law.PRODUCT or law is Law.POWER:
            out: Exprs = {}
            for exprs, power in zip(many, powers, strict=True):
                for key, expr in exprs.items():
                    if self.binary and power.denominator != 1:
                        self._zero(expr)
                        continue
                    out[key] = self.system.add(out.get(key, {}), expr, power)
            return out
        passes = law in (Law.ODD,) if self.binary else law in (Law.HOMOGENEOUS, Law.ABSOLUTE)
        if passes:
            return many[0]
        if self.binary and law in (Law.ABSOLUTE, Law.EVEN):
            return {}
        for exprs in many:
            for expr in exprs.values():
                self._zero(expr)
        return {}

    def _contract(self, fact: Contract) -> None:
        sums: dict[Block, list[Exprs]] = {}
        for a, out, b, free_a, free_b, pairs in self.layout.contract(fact):
            if out is None:
                self._kill(fact.a)
                self._kill(fact.b)
                continue
            label_a: dict[Occurrence, tuple[str, Occurrence]] = {o: ("o", t) for o, t in free_a.items()}
            label_b: dict[Occurrence, tuple[str, Occurrence]] = {o: ("o", t) for o, t in free_b.items()}
            for x, y in pairs:
                label_a[x] = label_b[y] = ("c", x)
            total: dict[frozenset[tuple[str, Occurrence]], Expr] = {}
            for block, labels in ((a, label_a), (b, label_b)):
                for subset, expr in self._read(block).items():
                    if not all(o in labels for o in subset):
                        self._zero(expr)
                        continue
                    key = frozenset(labels[o] for o in subset)
                    total[key] = self.system.add(total.get(key, {}), expr)
            passed: Exprs = {}
            for key, expr in total.items():
                if any(kind == "c" for kind, _ in key):
                    self._zero(expr)
                else:
                    passed[frozenset(o for _, o in key)] = expr
            sums.setdefault(out, []).append(passed)
        for out, many in sums.items():
            reduced = [{k: self.system.reduce(e) for k, e in exprs.items()} for exprs in many]
            self._add_to(out, self._agree(reduced))

    def _reduce(self, fact: Reduce | Center) -> None:
        law = Law.SUM if isinstance(fact, Center) else fact.law
        if law is not Law.SUM and (self.binary or law is not Law.HOMOGENEOUS):
            self._kill(fact.inp)
            return
        keep = {i: i for i in range(fact.inp.rank)} if isinstance(fact, Center) else dict(fact.keep)
        groups: dict[tuple[int, ...], list[Exprs]] = {}
        blocks: dict[tuple[int, ...], list[Block]] = {}
        for block in self.layout.blocks(fact.inp):
            mapping: OccurrenceMap = {
                o: (keep[o[0]], o[1]) for o in block.order if o[0] in keep and o[0] not in fact.over
            }
            key = tuple(n for axis, n in enumerate(block.offsets) if axis not in fact.over)
            groups.setdefault(key, []).append(self._mapped(block, mapping))
            blocks.setdefault(key, []).append(block)
        agreed = {key: self._agree(many) for key, many in groups.items()}
        if isinstance(fact, Center):
            for key, members in blocks.items():
                for block in members:
                    out = self.layout.pick(fact.out, list(block.offsets))
                    if out is not None:
                        self._add_to(out, agreed[key])
            return
        survivors = [axis for axis in range(fact.inp.rank) if axis not in fact.over]
        for out in self.layout.blocks(fact.out):
            offsets = {i: out.offsets[j] for i, j in fact.keep}
            key = tuple(offsets.get(axis, 0) for axis in survivors)
            if key in agreed:
                self._add_to(out, agreed[key])

    def _rotary(self, fact: Rotary) -> None:
        two = self.layout.structure.find(fact.two).id
        for out in self.layout.blocks(fact.out):
            block = self.layout.pick(fact.inp, list(out.offsets))
            if block is None:
                self._kill(fact.inp)
                return
            mapping = {o: o for o in block.order if o != (fact.axis, two)}
            self._add_to(out, self._mapped(block, mapping))

    def _stop(self, fact: Stop) -> None:
        for block in self.layout.blocks(fact.value):
            for subset, expr in self._read(block).items():
                if fact.axes is None or any(axis in fact.axes for axis, _ in subset):
                    self._zero(expr)

    # --- results ---------------------------------------------------------------------------------

    def basis(self) -> Iterable[Expr]:
        return self.system.basis()
