"""Abstract values and what can be done with them entry by entry and place by place.

The first half of the walk: bookkeeping, entrywise functions, rearrangements. Sums are in
:mod:`regauge.walk`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch._ops import OpOverload

from regauge.align import Group
from regauge.atlas import Refusal
from regauge.atoms import Atom, Axis, Conflict, total
from regauge.facts import Concat, Fact, Facts, Law, Link, Pointwise, Remap, Stop, Value
from regauge.structure import Structure
from regauge.trace import Trace, module_path


class Abstract:
    """State of one walk, and the primitives that rules are written in.

    Every primitive returns new values, unifies the index structure of the axes it aligns, and
    records one fact. ``None`` stands for a Python scalar where a value may stand.
    """

    def __init__(self, trace: Trace, untied: bool = False) -> None:
        self.trace = trace
        self.untied = untied
        self.result = Facts()
        self.refusals: list[Refusal] = []
        self.node: fx.Node | None = None
        self.structure = Structure(self._on_rigid)
        self.selections: dict[tuple[int, int, int, int], Atom] = {}
        self.orders: dict[int, int] = {}
        self.uniform: set[int] = set()
        self.repeated: dict[int, Value] = {}

    # --- bookkeeping ---------------------------------------------------------------------------

    def _on_rigid(self, reason: str) -> None:
        self.refusals.append(Refusal(self.name, self.module, f"{self.op}: {reason}"))

    @property
    def name(self) -> str:
        return self.node.name if self.node is not None else ""

    @property
    def module(self) -> str:
        return module_path(self.node) if self.node is not None else ""

    @property
    def op(self) -> str:
        return op_name(self.node) if self.node is not None else ""

    @property
    def where(self) -> tuple[str, str, str]:
        return self.name, self.module, self.op

    def value(self, axes: list[Axis], given: bool = False) -> Value:
        value = Value(len(self.result.values), axes, self.name, self.module, given)
        self.result.values.append(value)
        return value

    def given(self, shape: Sequence[int]) -> Value:
        return self.value([self.structure.axis(n, True) for n in shape], given=True)

    def record(self, fact: Fact) -> None:
        self.result.facts.append(fact)

    def use(self, *values: Value) -> None:
        """Read values by their entries: materialise the deferred fact of a product; indices that
        were selected from an axis and are computed with stop that axis."""
        for value in values:
            self._materialise(value)
            if value.range_of is not None:
                source, axis = value.range_of
                self.record(Stop(*self.where, source, "its selected indices are computed with", (axis,)))

    def _materialise(self, value: Value) -> None:
        if value.pending is not None:
            fact, value.pending = value.pending, None
            self.record(fact)

    def consume(self, index: Value, reason: str) -> None:
        """Indices taken from a live value by a rule: their own axes and scales are stopped."""
        if not index.given:
            self._materialise(index)
            self.record(Stop(*self.where, index, reason))

    def order(self, index: Value) -> int:
        """Two values of indices with the same number hold the same entries in the same order."""
        return self.orders.setdefault(index.id, index.id)

    def parameter(self, name: str, chart: float = 0.0) -> Value:
        key = (name, chart)
        if key not in self.result.parameters:
            if chart:
                axes = self.parameter(name).axes
            else:
                axes = [self.structure.axis(n) for n in self._shape(name)]
            value = self.value(axes)
            value.parameter, value.chart = name, chart
            value.module = name
            self.result.parameters[key] = value
        return self.result.parameters[key]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.trace.shapes[self.trace.canonical[name]]

    # --- primitives ----------------------------------------------------------------------------

    def pointwise(
        self, ins: Sequence[Value], law: Law, exponents: Sequence[float] = (), defer: bool = False
    ) -> Value:
        """Elementwise function with broadcasting. Given tensors only fix the axes they span, unless
        they hold one number everywhere."""
        ins = self._broadcast(ins)
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
                    chosen = self._align(chosen, value.axes[i])
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

    def _broadcast(self, ins: Sequence[Value]) -> list[Value]:
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

    def _align(self, first: Axis, second: Axis) -> Axis:
        """Unify two axes; where one is data, prefer one that remembers what it selects."""
        if self.structure.is_data(first) and self.structure.is_data(second):
            return second if _selects(second) and not _selects(first) else first
        if _selects(first) or _selects(second):
            self.structure.rigid(second if _selects(first) else first)
            return first if _selects(first) else second
        self.structure.unify(first, second)
        return first

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

    def remap(self, value: Value, axes: list[Axis], links: Sequence[Link]) -> Value:
        """The same entries in another arrangement; entries may be left out or repeated."""
        if value.given:
            return self._ranged(self.given([total(axis) for axis in axes]), value)
        self._materialise(value)
        out = self.value(axes)
        self.record(Remap(*self.where, out, value, tuple(links)))
        return self._ranged(out, value)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        if value.given:
            return self._ranged(self.given(shape), value)
        if tuple(shape) == value.shape:
            return value
        axes, groups = self.structure.regroup(value.axes, shape)
        out = self.remap(value, axes, [_link(group) for group in groups])
        if value.range_of is not None:
            self.orders[out.id] = self.order(value)
        return out

    def _ranged(self, out: Value, value: Value) -> Value:
        out.range_of = value.range_of
        out.zero = value.zero
        if value.id in self.uniform:
            self.uniform.add(out.id)
        return out

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        order = [d % value.rank for d in order]
        if value.given:
            return self._ranged(self.given([value.shape[d] for d in order]), value)
        out = self.remap(
            value,
            [value.axes[d] for d in order],
            [Link((d,), (j,)) for j, d in enumerate(order)],
        )
        if value.normalised is not None:
            out.normalised = order.index(value.normalised)
        return out

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        lead = len(shape) - value.rank
        shape = [value.shape[j - lead] if n == -1 else n for j, n in enumerate(shape)]
        if value.given:
            return self._ranged(self.given(shape), value)
        axes: list[Axis] = []
        links: list[Link] = []
        for j, size in enumerate(shape):
            i = j - lead
            if i >= 0 and value.shape[i] == size:
                axes.append(value.axes[i])
                links.append(Link((i,), (j,)))
            else:
                axes.append(self.structure.axis(size))
        out = self.remap(value, axes, links)
        self.repeated[out.id] = value
        return out

    def slice(self, value: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        axis %= value.rank
        size = value.shape[axis]
        start = max(0, min(size, start + size if start < 0 else start))
        stop = max(start, min(size, stop + size if stop < 0 else stop))
        length = max(0, -(-(stop - start) // step))
        shape = list(value.shape)
        shape[axis] = length
        if value.given:
            return self._ranged(self.given(shape), value)
        if length == size:
            return value
        if length == 0:
            return self.given(shape)
        kept = self._slice_axis(value.axes[axis], start, length, step)
        axes = [*value.axes[:axis], kept, *value.axes[axis + 1 :]]
        links = [Link((i,), (i,)) for i in range(value.rank) if i != axis]
        links.append(Link((axis,), (axis,), start, step))
        return self.remap(value, axes, links)

    def _slice_axis(self, axis: Axis, start: int, length: int, step: int) -> Axis:
        if self.structure.is_data(axis):
            return self.structure.axis(length, True)
        try:
            if step == 1:
                points = sorted({start, start + length} - {0, total(axis)})
                pieces = self.structure.cut(axis, points)
                position = 0
                for piece in pieces:
                    if position == start:
                        return list(piece)
                    position += total(piece)
                raise Conflict("empty slice")
            if total(axis) % step or length * step != total(axis):
                raise Conflict("strided slice that does not cover the axis evenly")
            outer, inner = self.structure.split_axis(axis, step)
            self.structure.cut(inner, list(range(1, step)))
            return outer
        except Conflict as conflict:
            self._on_rigid(str(conflict))
            self.structure.rigid(axis)
            return self.structure.axis(length, True)

    def select(self, value: Value, axis: int, index: int) -> Value:
        axis %= value.rank
        index %= value.shape[axis]
        piece = self.slice(value, axis, index, index + 1)
        return self.reshape(piece, [n for i, n in enumerate(piece.shape) if i != axis])

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        axis %= max(value.rank for value in values)
        values = [value for value in values if 0 not in value.shape] or list(values[:1])
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        if all(value.given for value in values):
            return self.given(shape)
        values = [self._ungiven(value, axis) for value in values]
        axes: list[Axis] = []
        for j in range(len(shape)):
            if j == axis:
                axes.append([self.structure.sum([value.axes[axis] for value in values])])
                continue
            chosen = values[0].axes[j]
            for value in values[1:]:
                chosen = self._align(chosen, value.axes[j])
            axes.append(chosen)
        self.use(*values)
        out = self.value(axes)
        self.record(Concat(*self.where, out, tuple(values), axis))
        return out

    def _ungiven(self, value: Value, axis: int) -> Value:
        """A given tensor inside a concatenation: a value whose axes are stopped."""
        if not value.given:
            return value
        out = self.value([self.structure.axis(n) for n in value.shape])
        if not value.zero:
            self.record(Stop(*self.where, out, "is joined with a tensor that no parameter changes"))
        return out


def op_name(node: fx.Node) -> str:
    """``aten.add`` for every overload of it; other targets by their own name."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def _link(group: Group) -> Link:
    return Link(group.source, group.target)


def _selects(axis: Axis) -> bool:
    return any(isinstance(atom, Selection) for atom in axis)


class Selection(Atom):
    """Data that says which index of another axis was chosen (the experts of a token)."""

    __slots__ = ("stands_for",)

    def __init__(self, id: int, size: int, stands_for: Axis) -> None:
        super().__init__(id, size, True)
        self.stands_for = stands_for


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return list(torch.broadcast_shapes(*shapes))
