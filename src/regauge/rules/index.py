"""Entries chosen by data: the axis looked up is stopped, unless the indices themselves come from
an axis that is permuted along with it (the experts a router picked)."""

from __future__ import annotations

from typing import Any

import torch

from regauge.atoms import total
from regauge.facts import AlignPermutation, Law, Link, Reduce, Remap, Value
from regauge.interpret import Selection, Walk, op_name
from regauge.rules.table import Table

RULES = Table()


def _shape_of(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _lookup(walk: Walk, x: Value, axis: int, index: Value, shape: tuple[int, ...]) -> Value:
    """``x`` with ``axis`` replaced by the axes of ``index``."""
    if index.range_of is None or x.given:
        walk.stop(index, "its entries are used as indices")
    if x.given:
        return walk.given(shape)
    walk.consume(index, "its entries are used as indices")
    picked = [walk.structure.axis(n, True) for n in index.shape]
    if index.range_of is not None:
        source, source_axis = index.range_of
        walk.structure.unify(x.axes[axis], source.axes[source_axis])
        walk.record(AlignPermutation(*walk.where, x, axis, source, source_axis))
        large = [i for i, n in enumerate(index.shape) if n > 1]
        if len(large) == 1:
            key = (source.id, source_axis, walk.order(index), index.shape[large[0]])
            if key not in walk.selections:
                walk.selections[key] = Selection(
                    -len(walk.selections) - 1, index.shape[large[0]], x.axes[axis]
                )
            picked[large[0]] = [walk.selections[key]]
    elif not walk.structure.is_data(x.axes[axis]):
        walk.stop(x, "rows are looked up by the input", [axis])
        walk.structure.rigid(x.axes[axis])
    axes = [*x.axes[:axis], *picked, *x.axes[axis + 1 :]]
    links = [Link((i,), (i,)) for i in range(axis)]
    links += [Link((i,), (i + index.rank - 1,)) for i in range(axis + 1, x.rank)]
    walk.use(x)
    out = walk.value(axes)
    if index.range_of is not None:
        links.append(Link((axis,), tuple(range(axis, axis + index.rank)), picks=True))
    walk.record(Remap(*walk.where, out, x, tuple(links)))
    return out


@RULES.op("aten.embedding")
def embedding(walk: Walk, node: Any, w: Value, index: Value, *rest: Any, **kwargs: Any) -> Value:
    """y[…, :] = w[index[…], :]."""
    return _lookup(walk, w, 0, index, _shape_of(node))


@RULES.op("aten.index_select")
def index_select(walk: Walk, node: Any, x: Value, dim: int, index: Value) -> Value:
    """Entries of one axis."""
    return _lookup(walk, x, dim % x.rank, index, _shape_of(node))


_COPIES = ("aten.lift_fresh_copy", "aten.clone", "aten._to_copy", "aten.to", "aten.detach", "aten.alias")


def _run(walk: Walk, node: Any, size: int) -> tuple[int, int] | None:
    """First and last-plus-one of an index that is a constant run of consecutive positions."""
    while node.op == "call_function" and op_name(node) in _COPIES:
        node = node.args[0]
    constant = walk.trace.constants.get(node.name)
    if (
        constant is None
        or constant.device.type == "meta"
        or constant.dim() != 1
        or constant.dtype != torch.int64
    ):
        return None
    entries = [int(i) % size for i in constant]
    if entries and entries == list(range(entries[0], entries[0] + len(entries))):
        return entries[0], entries[0] + len(entries)
    return None


@RULES.op("aten.index")
def index(walk: Walk, node: Any, x: Value, indices: list[Value | None]) -> Value:
    """Advanced indexing: one index tensor is a lookup; several stop the axes they index."""
    shape = _shape_of(node)
    places = [d for d, i in enumerate(indices) if i is not None]
    if len(places) == 1:
        run = _run(walk, node.args[1][places[0]], x.shape[places[0]])
        if run is not None:
            return walk.slice(x, places[0], *run)
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(used) == 1 and used[0][1].rank + x.rank - 1 == len(shape):
        return _lookup(walk, x, used[0][0], used[0][1], shape)
    if any(i.range_of is not None for _, i in used):
        return walk.opaque([x, *[i for _, i in used]], [shape], "several selections at once")[0]
    for _, i in used:
        walk.stop(i, "its entries are used as indices")
    dims = [d for d, _ in used]
    for d in dims:
        if not x.given and not walk.structure.is_data(x.axes[d]):
            walk.stop(x, "entries are looked up by the input", [d])
            walk.structure.rigid(x.axes[d])
    rest = [d for d in range(x.rank) if d not in dims]
    wide = len(shape) - len(rest)
    start = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    before = rest[:start] if start else []
    after = rest[len(before) :]
    axes = [x.axes[d] for d in before]
    axes += [walk.structure.axis(n, True) for n in shape[len(before) : len(before) + wide]]
    axes += [x.axes[d] for d in after]
    links = [Link((d,), (j,)) for j, d in enumerate(before)]
    links += [Link((d,), (len(before) + wide + j,)) for j, d in enumerate(after)]
    return walk.remap(x, axes, links)


@RULES.op("aten.gather", "aten.take_along_dim")
def gather(walk: Walk, node: Any, x: Value, dim: int, index: Value, *rest: Any, **kwargs: Any) -> Value:
    """Entries of one axis chosen for every position of the others."""
    shape = _shape_of(node)
    dim %= x.rank
    others = [i for i in range(x.rank) if i != dim]
    if x.given or any(not walk.structure.is_data(x.axes[i]) for i in others):
        return walk.opaque([x, index], [shape], "gather across axes that carry parameters")[0]
    walk.consume(index, "its entries are used as indices")
    if index.range_of is not None:
        source, axis = index.range_of
        walk.structure.unify(x.axes[dim], source.axes[axis])
        walk.record(AlignPermutation(*walk.where, x, dim, source, axis))
    elif not walk.structure.is_data(x.axes[dim]):
        walk.stop(x, "entries are gathered by the input", [dim])
        walk.structure.rigid(x.axes[dim])
    axes = [walk.structure.axis(n, True) for n in shape]
    walk.use(x)
    out = walk.value(axes)
    walk.record(Reduce(*walk.where, out, x, (), tuple(range(x.rank)), Law.GENERIC))
    return out


@RULES.op("aten.one_hot")
def one_hot(walk: Walk, node: Any, index: Value, classes: int = -1) -> Value:
    """The chosen index as a unit vector: permuted with the axis it indexes."""
    shape = _shape_of(node)
    if index.range_of is None:
        return walk.opaque([index], [shape], "one-hot of indices of unknown origin")[0]
    source, axis = index.range_of
    walk.consume(index, "its entries are used as indices")
    if total(source.axes[axis]) != shape[-1]:
        return walk.opaque([index], [shape], "one-hot of another length than the axis chosen from")[0]
    out = walk.value([*[walk.structure.axis(n, True) for n in shape[:-1]], source.axes[axis]])
    walk.record(AlignPermutation(*walk.where, out, len(shape) - 1, source, axis))
    return out


@RULES.op("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(
    walk: Walk, node: Any, x: Value, dim: int, index: Value, src: Any = 0.0, *rest: Any, **kwargs: Any
) -> Value:
    """Values written at chosen indices of a tensor of one number: permuted with the axis they index."""
    shape = _shape_of(node)
    dim %= len(shape)
    values = [v for v in (x, index, src) if isinstance(v, Value)]
    source = index.range_of
    live_src = isinstance(src, Value) and not src.given
    if (
        source is None
        or x.id not in walk.uniform
        or total(source[0].axes[source[1]]) != shape[dim]
        or (live_src and any(not walk.structure.is_data(axis) for axis in src.axes))
    ):
        return walk.opaque(values, [shape], "scatter into a tensor that carries parameters")[0]
    walk.consume(index, "its entries are used as indices")
    axes = [walk.structure.axis(n, True) for n in shape]
    axes[dim] = source[0].axes[source[1]]
    if live_src:
        walk.unary(src, Law.GENERIC)
    out = walk.value(axes)
    walk.record(AlignPermutation(*walk.where, out, dim, source[0], source[1]))
    return out
