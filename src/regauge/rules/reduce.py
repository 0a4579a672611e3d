"""Reductions and functions along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regauge.facts import Law, Reduce, Value
from regauge.interpret import Walk
from regauge.rules.elementwise import first
from regauge.rules.table import Table

RULES = Table()


def _dims(x: Value, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(x.rank))
    return [dim] if isinstance(dim, int) else list(dim)


@RULES.op("aten.mean", "aten.sum")
def linear_reduce(
    walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Value:
    """y = Σ x (or the mean): linear along the other axes; along the reduced one only the ones
    vector must be fixed. The sum of a square is a squared length, that of a product a contraction."""
    dims = _dims(x, dim)
    out = walk.reduce(x, dims, keepdim, Law.SUM)
    if keepdim and node.target.overloadpacket.__name__ == "mean":
        out.mean_of = (x, tuple(sorted(d % x.rank for d in dims)))
    return out


@RULES.op("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def variance(walk: Walk, node: Any, x: Value, dim: Any = None, *rest: Any, **kwargs: Any) -> Any:
    """var = Σ (x − mean)² / n."""
    keep = bool(kwargs.get("keepdim", rest[1] if len(rest) > 1 else False))
    dims = _dims(x, dim if not isinstance(dim, bool) else None)
    out = walk.reduce(walk.square(walk.center(x, dims)), dims, keep, Law.SUM)
    name = node.target.overloadpacket.__name__
    if name.startswith("std"):
        out = walk.unary(out, Law.POWER, 0.5)
    return [out, walk.reduce(x, dims, keep, Law.SUM)] if name.endswith("mean") else out


@RULES.op("aten.linalg_vector_norm", "aten.norm")
def vector_norm(walk: Walk, node: Any, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False,
                *rest: Any, **kwargs: Any) -> Value:  # fmt: skip
    """‖x‖₂ = (Σ x²)^½: rotations keep it; other norms are homogeneous and even; p = 0 counts."""
    dims = _dims(x, dim)
    if p is None or float(p) == 2.0:
        return walk.unary(walk.reduce(walk.square(x), dims, keepdim, Law.SUM), Law.POWER, 0.5)
    if float(p) == 0.0:
        return walk.reduce(x, dims, keepdim, Law.GENERIC)
    return walk.reduce(walk.unary(x, Law.ABSOLUTE), dims, keepdim, Law.HOMOGENEOUS)


@RULES.op("aten.amax", "aten.amin")
def extreme(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """max or min over axes: positively homogeneous."""
    return walk.reduce(x, _dims(x, dim), keepdim, Law.HOMOGENEOUS)


@RULES.op("aten.max", "aten.min", "aten.aminmax")
def extreme_at(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Any:
    """max or min over one axis, and where it is; of two tensors, entry by entry."""
    if isinstance(dim, Value):
        return walk.pointwise([x, dim], Law.GENERIC)
    if not isinstance(node.meta["val"], (list, tuple)):
        return walk.reduce(x, _dims(x, dim), keepdim, Law.HOMOGENEOUS)
    if node.target.overloadpacket.__name__ == "aminmax":
        return [walk.reduce(x, _dims(x, dim), keepdim, Law.HOMOGENEOUS) for _ in range(2)]
    return [walk.reduce(x, [dim], keepdim, Law.HOMOGENEOUS), _index_of(walk, x, dim, keepdim)]


def _index_of(walk: Walk, x: Value, dim: int, keepdim: bool) -> Value:
    out = walk.reduce(x, [dim], keepdim, Law.GENERIC)
    if not x.given:
        out.range_of = (x, dim % x.rank)
    return out


def pool(walk: Walk, x: Value, shape: Sequence[int], spatial: int, law: Law) -> Value:
    """Windows over the trailing positions: those axes must be data; the others pass."""
    axes = list(x.axes)
    changed = list(range(x.rank - spatial, x.rank))
    if len(shape) != x.rank or spatial < 1 or any(shape[i] != x.shape[i] for i in range(x.rank - spatial)):
        raise ValueError("pooling that changes other axes than the last ones")
    for i in changed:
        if not walk.structure.is_data(axes[i]):
            walk.stop(x, "pooled over windows of this axis", [i])
            walk.structure.rigid(axes[i])
        axes[i] = walk.structure.axis(shape[i], True)
    walk.use(x)
    out = walk.value(axes)
    keep = tuple((i, i) for i in range(x.rank) if i not in changed)
    walk.record(Reduce(*walk.where, out, x, keep, tuple(changed), law))
    return out


def _spatial(node: Any) -> int:
    """Number of positions axes, from the name of the operation (avg_pool2d)."""
    return int(node.target.overloadpacket.__name__.removesuffix("_with_indices")[-2])


@RULES.op("aten.avg_pool1d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool1d",
          "aten._adaptive_avg_pool2d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d",
          "aten.upsample_bicubic2d", "aten.avg_pool3d", "aten.upsample_nearest1d", "aten.upsample_linear1d",
          "aten.adaptive_avg_pool3d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa",
          "aten.upsample_nearest3d", "aten.upsample_trilinear3d",
          "aten._upsample_nearest_exact2d")  # fmt: skip
def linear_pool(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """Linear along positions, channel by channel."""
    return pool(walk, x, tuple(int(n) for n in node.meta["val"].shape), _spatial(node), Law.SUM)


@RULES.op("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d", "aten.max_pool2d_with_indices",
          "aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d", "aten.max_pool3d_with_indices")  # fmt: skip
def max_pool(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Any:
    """Positively homogeneous, channel by channel."""
    example = node.meta["val"]
    several = isinstance(example, (list, tuple))
    shape = tuple(int(n) for n in (example[0] if several else example).shape)
    out = pool(walk, x, shape, _spatial(node), Law.HOMOGENEOUS)
    return first(walk, node, x, out) if several else out


@RULES.op("aten.logsumexp", "aten.any", "aten.all")
def symmetric(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """Symmetric in the entries of the axes: only permutations are claimed."""
    return walk.reduce(x, _dims(x, dim), keepdim, Law.GENERIC)


@RULES.op("aten.prod", "aten.median", "aten.count_nonzero")
def symmetric_one(
    walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    """Symmetric in the entries of one axis, or of all."""
    out = walk.reduce(x, _dims(x, dim), bool(keepdim), Law.GENERIC)
    if not isinstance(node.meta["val"], (list, tuple)):
        return out
    return [out, _index_of(walk, x, dim, keepdim)]


@RULES.op("aten.argmax", "aten.argmin")
def argmax(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """An index of the axis: permuted with it."""
    if dim is None:
        raise ValueError("an index into all axes at once")
    return _index_of(walk, x, dim, keepdim)


@RULES.op("aten.softmax", "aten._softmax", "aten._safe_softmax")
def softmax(walk: Walk, node: Any, x: Value, dim: int, *rest: Any, **kwargs: Any) -> Value:
    """Symmetric in the entries of the axis, blind to a constant added along it, sums to one (the safe
    form gives zero where every entry is masked)."""
    out = walk.softmax(x, dim)
    if node.target.overloadpacket.__name__ == "_safe_softmax":
        out.normalised = None
    return out


@RULES.op("aten.log_softmax", "aten._log_softmax")
def log_softmax(walk: Walk, node: Any, x: Value, dim: int, *rest: Any, **kwargs: Any) -> Value:
    """log of softmax."""
    return walk.unary(walk.softmax(x, dim), Law.GENERIC)


@RULES.op("aten.cumsum", "aten.cumprod", "aten.logcumsumexp")
def cumulative(walk: Walk, node: Any, x: Value, dim: int, **kwargs: Any) -> Value:
    """Mixes positions in order: the axis is stopped; cumsum is linear along the others."""
    dim %= x.rank
    name = node.target.overloadpacket.__name__
    walk.use(x)
    if not walk.structure.is_data(x.axes[dim]):
        walk.stop(x, f"{name} runs along this axis", [dim])
        walk.structure.rigid(x.axes[dim])
    axes = [walk.structure.axis(n, True) if i == dim else x.axes[i] for i, n in enumerate(x.shape)]
    out = walk.value(axes)
    law = Law.SUM if name == "cumsum" else Law.GENERIC
    keep = tuple((i, i) for i in range(x.rank) if i != dim)
    walk.record(Reduce(*walk.where, out, x, keep, (dim,), law))
    return out


@RULES.op("aten.topk")
def topk(walk: Walk, node: Any, x: Value, k: int, dim: int = -1, *rest: Any) -> list[Value]:
    """The largest entries in order: the same for every arrangement; the indices move along."""
    return _ordered(walk, node, x, dim)


@RULES.op("aten.sort")
def sort(walk: Walk, node: Any, x: Value, dim: int = -1, *rest: Any, **kwargs: Any) -> list[Value]:
    """All entries in order."""
    return _ordered(walk, node, x, kwargs.get("dim", dim))


@RULES.op("aten.argsort")
def argsort(walk: Walk, node: Any, x: Value, dim: int = -1, *rest: Any, **kwargs: Any) -> Value:
    """The indices that sort an axis."""
    return _ordered(walk, node, x, kwargs.get("dim", dim))[1]


def _ordered(walk: Walk, node: Any, x: Value, dim: int) -> list[Value]:
    example = node.meta["val"]
    size = int((example[0] if isinstance(example, (list, tuple)) else example).shape[dim])
    dim %= x.rank
    walk.use(x)
    axes = [axis if i != dim else walk.structure.axis(size, True) for i, axis in enumerate(x.axes)]
    keep = tuple((i, i) for i in range(x.rank) if i != dim)
    values, indices = walk.value(axes), walk.value(axes)
    walk.record(Reduce(*walk.where, values, x, keep, (dim,), Law.GENERIC))
    walk.record(Reduce(*walk.where, indices, x, keep, (dim,), Law.GENERIC))
    indices.range_of = (x, dim)
    return [values, indices]
