"""The entries of abstract values in another arrangement: moved, left out, repeated, joined."""

from __future__ import annotations

from collections.abc import Sequence

from regauge.atoms import Axis, Conflict, total
from regauge.entrywise import Entrywise
from regauge.facts import Concat, Link, Remap, Stop, Value
from regauge.reshapes import Group


class Arrange(Entrywise):
    """State of one walk, entrywise functions and rearrangements."""

    def remap(self, value: Value, axes: list[Axis], links: Sequence[Link]) -> Value:
        """The same entries in another arrangement; entries may be left out or repeated."""
        if value.given:
            return self._ranged(self.given([total(axis) for axis in axes]), value)
        self.materialise(value)
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
            self.on_rigid(str(conflict))
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
                chosen = self.align(chosen, value.axes[j])
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


def _link(group: Group) -> Link:
    return Link(group.source, group.target)
