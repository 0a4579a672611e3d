"""The primitives that rules are written in: every one returns new values, unifies the index
structure of the axes it aligns, and records one fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from regauge.arrange import Arrange
from regauge.atlas import Refusal
from regauge.atoms import Axis, total
from regauge.errors import RegaugeError
from regauge.facts import Center, Contract, Law, Normalise, Reduce, Stop, Value


class Walk(Arrange):
    """State of one walk over a graph: entrywise functions and rearrangements from :class:`Arrange`,
    sums and products here.

    Attributes:
        results: name of an operation -> what it gave: a value, several, or plain data. Set at the end.
    """

    results: Mapping[str, Any] = MappingProxyType({})

    def contract(self, a: Value, b: Value, la: Sequence[str], lb: Sequence[str], lo: Sequence[str]) -> Value:
        """Einsum of two values. A letter whose axis has size one in one of them is broadcast."""
        sizes: dict[str, int] = {}
        for labels, value in ((la, a), (lb, b)):
            for letter, n in zip(labels, value.shape, strict=True):
                sizes[letter] = max(sizes.get(letter, 1), n)
        if a.given and b.given:
            return self.given([sizes[letter] for letter in lo])
        for given, other, lg, lv in ((a, b, la, lb), (b, a, lb, la)):
            if given.given:
                return self._contract_given(given, other, lg, lv, lo, sizes)
        axes: dict[str, Axis] = {}
        for labels, value in ((la, a), (lb, b)):
            for letter, axis in zip(labels, value.axes, strict=True):
                if total(axis) != sizes[letter] or not axis:
                    continue
                axes[letter] = self.align(axes[letter], axis) if letter in axes else axis
        for j, letter in enumerate(la):
            if total(a.axes[j]) != sizes[letter] and letter not in lo:
                raise RegaugeError("a contracted axis is broadcast", node=self.name)
        if a is not b:
            self.use(a)
        self.use(b)
        out = self.value([axes.get(letter, []) for letter in lo])
        self.record(Contract(*self.where, out, a, b, tuple(la), tuple(lb), tuple(lo)))
        return out

    def _contract_given(
        self,
        given: Value,
        other: Value,
        lg: Sequence[str],
        lv: Sequence[str],
        lo: Sequence[str],
        sizes: dict[str, int],
    ) -> Value:
        """Contraction with a tensor no parameter changes: linear in the other one; every axis of
        it that the given tensor spans is fixed."""
        spanned = [
            i for i, letter in enumerate(lv) if letter in lg and given.shape[list(lg).index(letter)] > 1
        ]
        live = [i for i in spanned if other.shape[i] > 1 and not self.structure.is_data(other.axes[i])]
        self.use(other)
        if live:
            self.record(
                Stop(
                    *self.where,
                    other,
                    "is multiplied with a tensor that no parameter changes",
                    tuple(live),
                    whole=False,
                )
            )
        axes = [
            other.axes[list(lv).index(letter)]
            if letter in lv and total(other.axes[list(lv).index(letter)]) == sizes[letter]
            else self.structure.axis(sizes[letter], sizes[letter] > 1)
            for letter in lo
        ]
        out = self.value(axes)
        keep = tuple((list(lv).index(letter), j) for j, letter in enumerate(lo) if letter in lv)
        over = tuple(i for i, letter in enumerate(lv) if letter not in lo)
        self.record(Reduce(*self.where, out, other, keep, over, Law.SUM))
        return out

    def reduce(self, value: Value, over: Sequence[int], keepdim: bool, law: Law) -> Value:
        over = sorted({d % value.rank for d in over}) if value.rank else []
        shape: list[int] = []
        axes: list[Axis] = []
        keep: list[tuple[int, int]] = []
        for i, axis in enumerate(value.axes):
            if i in over:
                if keepdim:
                    axes.append([])
                    shape.append(1)
                continue
            keep.append((i, len(axes)))
            axes.append(axis)
            shape.append(total(axis))
        if value.given:
            return self.given(shape)
        if law is Law.SUM and value.product_of is not None:
            return self._sum_of_product(value, over, keepdim)
        self.use(value)
        out = self.value(axes)
        self.record(Reduce(*self.where, out, value, tuple(keep), tuple(over), law))
        return out

    def _sum_of_product(self, value: Value, over: Sequence[int], keepdim: bool) -> Value:
        assert value.product_of is not None
        a, b = value.product_of
        letters = [f"x{j}" for j in range(value.rank)]
        labels: list[list[str]] = []
        for factor in (a, b):
            lead = value.rank - factor.rank
            labels.append(letters[lead:])
        squeezed: list[Value] = []
        names: list[list[str]] = []
        for factor, names_of in zip((a, b), labels, strict=True):
            drop = [
                i
                for i, letter in enumerate(names_of)
                if factor.shape[i] == 1 and value.shape[letters.index(letter)] > 1
            ]
            if drop:
                shape = [n for i, n in enumerate(factor.shape) if i not in drop]
                squeezed.append(self.reshape(factor, shape))
                names.append([letter for i, letter in enumerate(names_of) if i not in drop])
            else:
                squeezed.append(factor)
                names.append(names_of)
        lo = [letter for j, letter in enumerate(letters) if j not in over]
        out = self.contract(squeezed[0], squeezed[1], names[0], names[1], lo)
        if keepdim:
            shape = [1 if j in over else n for j, n in enumerate(value.shape)]
            return self.reshape(out, shape)
        return out

    def product(self, a: Value, b: Value, exponents: tuple[float, float] = (1.0, 1.0)) -> Value:
        if a.given and b.given:
            return self.pointwise([a, b], Law.PRODUCT, exponents)
        a, b = self.broadcast([a, b])
        summable = exponents == (1.0, 1.0) and not a.given and not b.given
        out = self.pointwise([a, b], Law.PRODUCT, exponents, defer=summable)
        if summable:
            out.product_of = (a, b)
        return out

    def square(self, value: Value) -> Value:
        if value.given:
            return self.given(value.shape)
        out = self.pointwise([value], Law.POWER, [2.0], defer=True)
        out.product_of = (value, value)
        return out

    def center(self, value: Value, over: Sequence[int]) -> Value:
        if value.given:
            return self.given(value.shape)
        self.use(value)
        out = self.value(value.axes)
        self.record(Center(*self.where, out, value, tuple(sorted(d % value.rank for d in over))))
        return out

    def softmax(self, value: Value, axis: int) -> Value:
        if value.given:
            return self.given(value.shape)
        self.use(value)
        axis %= value.rank
        out = self.value(value.axes)
        out.normalised = axis
        self.record(Normalise(*self.where, out, value, axis))
        return out

    def stop(self, value: Value, reason: str, axes: Sequence[int] | None = None) -> None:
        """Nothing passes along the given axes, or anywhere."""
        if not value.given:
            self.materialise(value)
            self.record(Stop(*self.where, value, reason, None if axes is None else tuple(axes)))
            if value.range_of is not None and axes is None:
                source, axis = value.range_of
                self.record(Stop(*self.where, source, reason, (axis,)))

    def opaque(self, ins: Sequence[Value], shapes: Sequence[Sequence[int]], reason: str) -> list[Value]:
        """An operation nobody explained: stop everything that goes in; outputs are fresh data."""
        live = [value for value in ins if not value.given]
        told = reason if reason.startswith(self.op) else f"{self.op}: {reason}"
        self.refusals.append(Refusal(self.name, self.module, told))
        for value in live:
            self.use(value)
            self.stop(value, reason)
        outs = [self.given(shape) for shape in shapes]
        return outs
