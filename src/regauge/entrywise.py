"""Functions of abstract values entry by entry, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.abstract import Abstract
from regauge.atoms import Axis, total
from regauge.facts import Law, Pointwise, Value


class Entrywise(Abstract):
    """State of one walk, and entrywise functions."""

    def pointwise(
        self, ins: Sequence[Value], law: Law, exponents: Sequence[float] = (), defer: bool = False
    ) -> Value:
        """Elementwise function with broadcasting. Given tensors only fix the axes they span, unless
        they hold one number everywhere."""
        ins = self.broadcast(ins)
        if all(value.given for value in ins):
            return self.given(_broadcast([value.shape for value in ins]))
        shape = _broadcast([value.shape for value in ins])
        live = [value for value in ins if not value.given]
        powers = [e for value, e in zip(ins, exponents, strict=False) if not value.given]
        fixed: set[int] = set()
        axes: list[Axis] = []
        for j, size in enumerate(shape):
            chosen: Axis | None = None
            for value in live:
                i = j - len(shape) + value.rank
                if i < 0 or total(value.axes[i]) != size or size == 1:
                    continue
                if chosen is None:
                    chosen = value.axes[i]
                else:
                    chosen = self.align(chosen, value.axes[i])
            if size > 1:
                for value in ins:
                    i = j - len(shape) + value.rank
                    alike = value.zero or value.id in self.uniform
                    if value.given and i >= 0 and value.shape[i] == size and not alike:
                        fixed.add(j)
            axes.append(chosen if chosen is not None else self.structure.axis(size, size > 1))
        self.use(*live)
        out = self.value(axes)
        maps = tuple(
            tuple(
                (i if i >= 0 and value.shape[i] == shape[j] else None)
                for j in range(len(shape))
                for i in [j - len(shape) + value.rank]
            )
            for value in live
        )
        if law is Law.SUM and len(live) < len(ins):
            zero = all(value.zero for value in ins if value.given)
            law = Law.SUM if zero else Law.SHIFT
        fact = Pointwise(*self.where, out, tuple(live), maps, law, tuple(powers), tuple(sorted(fixed)))
        if defer:
            out.pending = fact
        else:
            self.record(fact)
        return out

    def broadcast(self, ins: Sequence[Value]) -> list[Value]:
        """Arguments that were repeated along axes, without the repetition where broadcasting repeats them."""
        shape = _broadcast([value.shape for value in ins])
        out = list(ins)
        for k, value in enumerate(ins):
            base = self.repeated.get(value.id)
            if base is not None:
                changed = [*out[:k], base, *out[k + 1 :]]
                if _broadcast([other.shape for other in changed]) == shape:
                    out = changed
        return out

    def scaled(self, value: Value) -> Value:
        """Multiplication by a constant: the same value for every kind of group."""
        return value

    def shifted(self, value: Value) -> Value:
        """A constant, equal everywhere, is added."""
        if value.given:
            return self.given(value.shape)
        self.use(value)
        out = self.value(value.axes)
        self.record(Pointwise(*self.where, out, (value,), (tuple(range(value.rank)),), Law.SHIFT))
        return out

    def unary(self, value: Value, law: Law, power: float = 1.0) -> Value:
        return self.pointwise([value], law, [power])


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return list(torch.broadcast_shapes(*shapes))
