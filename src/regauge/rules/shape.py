"""Rearrangements: the same entries at other places. Index maps only."""

from __future__ import annotations

from typing import Any

from regauge.facts import Value
from regauge.interpret import Walk
from regauge.rules.table import Table

RULES = Table()


def _shape_of(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


@RULES.op("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten",
          "aten.unsqueeze", "aten.squeeze", "aten.view_as", "aten.reshape_as", "aten._reshape_alias",
          "aten.unsqueeze_", "aten.squeeze_", even_given=True)  # fmt: skip
def view(walk: Walk, node: Any, x: Value, *rest: Any) -> Value:
    """Row-major regrouping: an axis splits into factors, or factors merge into an axis."""
    return walk.reshape(x, _shape_of(node))


@RULES.op("aten.permute", even_given=True)
def permute(walk: Walk, node: Any, x: Value, order: list[int]) -> Value:
    """Axes in another order."""
    return walk.permute(x, order)


@RULES.op("aten.transpose", "aten.transpose_", "aten.swapaxes", even_given=True)
def transpose(walk: Walk, node: Any, x: Value, a: int, b: int) -> Value:
    """Two axes change places."""
    order = list(range(x.rank))
    a, b = a % x.rank, b % x.rank
    order[a], order[b] = order[b], order[a]
    return walk.permute(x, order)


@RULES.op("aten.t", "aten.numpy_T", "aten.mT", even_given=True)
def t(walk: Walk, node: Any, x: Value) -> Value:
    """Matrix transpose."""
    order = list(range(x.rank))
    order[-2:] = reversed(order[-2:])
    return walk.permute(x, order)


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
def slice_(walk: Walk, node: Any, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """Part of an axis: the axis becomes a sum of segments."""
    size = x.shape[dim]
    return walk.slice(x, dim, 0 if start is None else start, size if end is None else min(end, size), step)


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


@RULES.op("aten.flip", "aten.roll", "aten.tril", "aten.triu", "aten.rot90", "aten.diagonal", "aten.unfold",
          "aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.im2col", "aten.as_strided", "aten.diag_embed",
          "aten.channel_shuffle")  # fmt: skip
def positions(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """Moves entries along some axes by a fixed rule: those are stopped; axes that only carry data
    already need nothing."""
    name = node.target.overloadpacket.__name__
    shape = _shape_of(node)
    if name in ("flip", "roll"):
        dims = rest[0] if name == "flip" else (rest[1] if len(rest) > 1 else list(range(x.rank)))
        dims = [dims] if isinstance(dims, int) else list(dims) or list(range(x.rank))
        touched = [d % x.rank for d in dims]
    elif name in ("tril", "triu"):
        touched = [x.rank - 2, x.rank - 1]
    else:
        return walk.opaque([x], [shape], f"{name} moves entries across axes")[0]
    axes = list(x.axes)
    for d in touched:
        if not walk.structure.is_data(axes[d]):
            walk.stop(x, f"{name} moves entries along this axis", [d])
            walk.structure.rigid(axes[d])
        axes[d] = walk.structure.axis(shape[d], True)
    from regauge.facts import Link

    return walk.remap(x, axes, [Link((i,), (i,)) for i in range(x.rank)])


@RULES.op("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d",
          "aten.replication_pad1d", "aten.replication_pad2d")  # fmt: skip
def pad(walk: Walk, node: Any, x: Value, amounts: list[int], *rest: Any) -> Value:
    """Zeros around data axes pass every linear map; any other constant is a shift."""
    from regauge.facts import Link

    shape = _shape_of(node)
    name = node.target.overloadpacket.__name__
    axes = list(x.axes)
    for d in range(x.rank):
        if shape[d] != x.shape[d]:
            if not walk.structure.is_data(axes[d]):
                walk.stop(x, "padding on this axis", [d])
                walk.structure.rigid(axes[d])
            axes[d] = walk.structure.axis(shape[d], True)
    mode = rest[0] if name == "pad" and rest else "constant"
    value = (rest[1] if len(rest) > 1 else 0.0) if name == "pad" else (rest[0] if rest else 0.0)
    out = walk.remap(x, axes, [Link((i,), (i,)) for i in range(x.rank)])
    if name in ("constant_pad_nd", "pad") and mode == "constant" and value not in (0, 0.0, None):
        return walk.shifted(out)
    return out
