"""Rearrangements: the same entries at other places. Index maps only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from regauge.atoms import Axis
from regauge.facts import Law, Link, Value
from regauge.interpret import Walk
from regauge.rules.table import Table

RULES = Table()


def _shape_of(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


@RULES.op("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten",
          "aten.unsqueeze", "aten.squeeze", "aten.view_as", "aten.reshape_as", "aten._reshape_alias",
          "aten.view_copy", even_given=True)  # fmt: skip
def view(walk: Walk, node: Any, x: Value, *rest: Any) -> Value:
    """Row-major regrouping: an axis splits into factors, or factors merge into an axis."""
    if str(node.target._overloadname) == "dtype":
        raise ValueError("bits read as another type")
    return walk.reshape(x, _shape_of(node))


@RULES.op("aten.permute", even_given=True)
def permute(walk: Walk, node: Any, x: Value, order: list[int]) -> Value:
    """Axes in another order."""
    return walk.permute(x, order)


@RULES.op("aten.transpose", "aten.swapaxes", even_given=True)
def transpose(walk: Walk, node: Any, x: Value, a: int, b: int) -> Value:
    """Two axes change places."""
    order = list(range(x.rank))
    a, b = a % x.rank, b % x.rank
    order[a], order[b] = order[b], order[a]
    return walk.permute(x, order)


@RULES.op("aten.t", "aten.mT", even_given=True)
def t(walk: Walk, node: Any, x: Value) -> Value:
    """Matrix transpose."""
    order = list(range(x.rank))
    order[-2:] = reversed(order[-2:])
    return walk.permute(x, order)


@RULES.op("aten.numpy_T", even_given=True)
def reversed_axes(walk: Walk, node: Any, x: Value) -> Value:
    """All axes in reversed order."""
    return walk.permute(x, list(reversed(range(x.rank))))


@RULES.op("aten.movedim", "aten.moveaxis", even_given=True)
def movedim(walk: Walk, node: Any, x: Value, source: Any, target: Any) -> Value:
    """Axes moved to new places."""
    sources = [source] if isinstance(source, int) else list(source)
    targets = [target] if isinstance(target, int) else list(target)
    order = [d for d in range(x.rank) if d not in [s % x.rank for s in sources]]
    for t_, s in sorted((t_ % x.rank, s % x.rank) for s, t_ in zip(sources, targets, strict=True)):
        order.insert(t_, s)
    return walk.permute(x, order)


@RULES.op("aten.expand", "aten.expand_as", "aten.broadcast_to", even_given=True)
def expand(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """Repetition along an axis of size one."""
    return walk.expand(x, _shape_of(node))


@RULES.op("aten.repeat", "aten.tile")
def repeat(walk: Walk, node: Any, x: Value, times: list[int]) -> Value:
    """x repeated along an axis is a new outer factor along which it is constant."""
    lead = len(times) - x.rank
    base = [1] * lead + list(x.shape)
    out = walk.reshape(x, base)
    wide: list[int] = []
    shape: list[int] = []
    for n, size in zip(times, base, strict=True):
        wide += [1, size]
        shape += [n, size]
    out = walk.expand(walk.reshape(out, wide), shape)
    return walk.reshape(out, _shape_of(node))


@RULES.op("aten.repeat_interleave")
def repeat_interleave(walk: Walk, node: Any, x: Value, times: Any, dim: Any = None, **kwargs: Any) -> Any:
    """Every entry repeated in place: a new inner factor along which it is constant."""
    if isinstance(times, Value) or dim is None:
        return walk.opaque([x], [_shape_of(node)], "repeats entries by data")[0]
    dim %= x.rank
    wide = [*x.shape[: dim + 1], 1, *x.shape[dim + 1 :]]
    shape = [*x.shape[: dim + 1], int(times), *x.shape[dim + 1 :]]
    return walk.reshape(walk.expand(walk.reshape(x, wide), shape), _shape_of(node))


@RULES.op("aten.slice")
def slice_(
    walk: Walk, node: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """Part of an axis: the axis becomes a sum of segments."""
    size = x.shape[dim]
    return walk.slice(x, dim, 0 if start is None else start, size if end is None else min(end, size), step)


@RULES.op("aten.slice_scatter")
def slice_scatter(walk: Walk, node: Any, x: Value, src: Value, dim: int = 0, start: Any = None,
                  end: Any = None, step: int = 1) -> Value:  # fmt: skip
    """x with a part of an axis replaced: the parts before, the new one, the parts after."""
    size = x.shape[dim]
    low = 0 if start is None else (start + size if start < 0 else min(start, size))
    high = size if end is None else (end + size if end < 0 else min(end, size))
    if step != 1:
        raise ValueError("every second entry replaced")
    parts = [walk.slice(x, dim, 0, low), src, walk.slice(x, dim, high, size)]
    return walk.concat([part for part in parts if part.shape[dim]], dim)


@RULES.op("aten.select_scatter")
def select_scatter(walk: Walk, node: Any, x: Value, src: Value, dim: int, index: int) -> Value:
    """x with one index of an axis replaced."""
    dim, index = dim % x.rank, index % x.shape[dim]
    wide = walk.reshape(src, [*x.shape[:dim], 1, *x.shape[dim + 1 :]])
    return slice_scatter(walk, node, x, wide, dim, index, index + 1)


@RULES.op("aten.narrow")
def narrow(walk: Walk, node: Any, x: Value, dim: int, start: int, length: int) -> Value:
    """Part of an axis."""
    return walk.slice(x, dim, start, start + length)


@RULES.op("aten.select")
def select(walk: Walk, node: Any, x: Value, dim: int, index: int) -> Value:
    """One index of an axis."""
    return walk.select(x, dim, index)


@RULES.op("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
def split(walk: Walk, node: Any, x: Value, size: Any, dim: int = 0) -> list[Value]:
    """Consecutive parts of an axis."""
    sizes = [int(item.shape[dim]) for item in node.meta["val"]]
    out: list[Value] = []
    start = 0
    for n in sizes:
        out.append(walk.slice(x, dim, start, start + n))
        start += n
    return out


@RULES.op("aten.unbind")
def unbind(walk: Walk, node: Any, x: Value, dim: int = 0) -> list[Value]:
    """Every index of an axis."""
    return [walk.select(x, dim, i) for i in range(x.shape[dim])]


@RULES.op("getitem")
def getitem(walk: Walk, node: Any, items: Any, index: int) -> Any:
    """One of several results."""
    return items[index]


@RULES.op("aten.cat", "aten.concat", "aten.concatenate")
def cat(walk: Walk, node: Any, items: list[Value], dim: int = 0) -> Value:
    """An axis that is the sum of its segments."""
    return walk.concat(items, dim)


@RULES.op("aten.stack")
def stack(walk: Walk, node: Any, items: list[Value], dim: int = 0) -> Value:
    """Segments of size one along a new axis."""
    rank = items[0].rank + 1
    dim %= rank
    wide = [walk.reshape(x, [*x.shape[:dim], 1, *x.shape[dim:]]) for x in items]
    return walk.concat(wide, dim)


@RULES.op("aten.flip", "aten.roll")
def moved(walk: Walk, node: Any, x: Value, *rest: Any) -> Value:
    """Entries in another order along some axes by a fixed rule: those axes are stopped."""
    name = node.target.overloadpacket.__name__
    dims = rest[0] if name == "flip" else (rest[1] if len(rest) > 1 else [])
    dims = [dims] if isinstance(dims, int) else list(dims)
    touched = [d % x.rank for d in dims] or list(range(x.rank))
    axes = _stopped(walk, x, touched, x.shape, f"{name} moves entries along this axis")
    return walk.remap(x, axes, _same(x.rank))


def _same(rank: int) -> list[Link]:
    return [Link((i,), (i,)) for i in range(rank)]


def _stopped(walk: Walk, x: Value, touched: Sequence[int], shape: Sequence[int], reason: str) -> list[Axis]:
    """Axes of ``x`` with the touched ones made data of the new sizes."""
    axes = list(x.axes)
    for d in touched:
        if not x.given and not walk.structure.is_data(axes[d]):
            walk.stop(x, reason, [d])
            walk.structure.rigid(axes[d])
        axes[d] = walk.structure.axis(shape[d], True)
    return axes


@RULES.op("aten.tril", "aten.triu")
def triangle(walk: Walk, node: Any, x: Value, *rest: Any) -> Value:
    """x times a triangle of ones."""
    return walk.pointwise([x, walk.given(x.shape[-2:])], Law.PRODUCT, [1.0, 1.0])


@RULES.op("aten.unfold")
def unfold(walk: Walk, node: Any, x: Value, dim: int, size: int, step: int) -> Value:
    """Windows of an axis: two axes of data in its place, the second one last."""
    dim %= x.rank
    axes = _stopped(walk, x, [dim], _shape_of(node), "cut into windows along this axis")
    axes.append(walk.structure.axis(size, True))
    return walk.remap(x, axes, [link for link in _same(x.rank) if link.src != (dim,)])


@RULES.op("aten.im2col")
def im2col(walk: Walk, node: Any, x: Value, *rest: Any) -> Value:
    """Windows of positions: every channel becomes channel × offset, offsets innermost and stopped."""
    n, wide, windows = _shape_of(node)
    if x.rank != 4:
        raise ValueError("im2col without a batch axis")
    channels = x.shape[1]
    axes = _stopped(walk, x, [2, 3], x.shape, "cut into windows along this axis")[:2]
    axes += [walk.structure.axis(wide // channels, True), walk.structure.axis(windows, True)]
    out = walk.remap(x, axes, _same(2))
    return walk.reshape(out, (n, wide, windows))


@RULES.op("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(walk: Walk, node: Any, x: Value, r: int) -> Value:
    """Channels (c, r, r) become positions; the r × r part of the channel axis is stopped."""
    shape = _shape_of(node)
    *lead, c, h, w = shape if node.target.overloadpacket.__name__ == "pixel_unshuffle" else x.shape
    k = len(lead)
    if node.target.overloadpacket.__name__ == "pixel_unshuffle":
        wide = walk.reshape(x, (*lead, c // r**2, h, r, w, r))
        wide = walk.permute(wide, [*range(k), k, k + 2, k + 4, k + 1, k + 3])
        return walk.reshape(_fixed(walk, wide, range(k + 1, k + 5)), shape)
    wide = _fixed(walk, walk.reshape(x, (*lead, c // r**2, r, r, h, w)), range(k + 1, k + 5))
    wide = walk.permute(wide, [*range(k), k, k + 3, k + 1, k + 4, k + 2])
    return walk.reshape(wide, shape)


def _fixed(walk: Walk, x: Value, axes: Iterable[int]) -> Value:
    for d in axes:
        if not x.given and not walk.structure.is_data(x.axes[d]):
            walk.stop(x, "becomes positions", [d])
            walk.structure.rigid(x.axes[d])
    return x


@RULES.op("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d",
          "aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d",
          "aten.reflection_pad3d")  # fmt: skip
def pad(walk: Walk, node: Any, x: Value, amounts: list[int], *rest: Any) -> Value:
    """Zeros around data axes pass every linear map; any other constant is a shift. Entries repeated
    from the axis itself are a rearrangement."""
    shape = _shape_of(node)
    name = node.target.overloadpacket.__name__
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    touched = [x.rank - 1 - i for i, pair in enumerate(pairs) if tuple(pair) != (0, 0)]
    axes = _stopped(walk, x, touched, shape, "is padded along this axis")
    mode = (
        (rest[0] if rest else "constant")
        if name == "pad"
        else ("constant" if name == "constant_pad_nd" else "")
    )
    value = (rest[1] if len(rest) > 1 else 0.0) if name == "pad" else (rest[0] if rest else 0.0)
    walk.use(x)
    out = walk.remap(x, axes, _same(x.rank))
    out.range_of = None
    if mode != "constant":
        return out
    kept = walk.given([shape[d] if d in touched else 1 for d in range(x.rank)])
    if value in (0, 0.0, None):
        return walk.pointwise([out, kept], Law.PRODUCT, [1.0, 1.0])
    return walk.pointwise([out, kept], Law.SHIFT)
