"""Reductions and functions along an axis."""

from __future__ import annotations

from typing import Any

from regauge.facts import Law, Value
from regauge.interpret import Walk
from regauge.rules.table import Table

RULES = Table()


def _dims(x: Value, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(x.rank))
    return [dim] if isinstance(dim, int) else list(dim)


@RULES.op("aten.mean", "aten.sum")
def linear_reduce(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
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
def vector_norm(walk: Walk, node: Any, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """‖x‖₂ = (Σ x²)^½: rotations keep it; other norms are homogeneous and even."""
    dims = _dims(x, dim)
    if p is None or float(p) == 2.0:
        return walk.unary(walk.reduce(walk.square(x), dims, keepdim, Law.SUM), Law.POWER, 0.5)
    return walk.reduce(walk.unary(x, Law.ABSOLUTE), dims, keepdim, Law.HOMOGENEOUS)


@RULES.op("aten.amax", "aten.amin", "aten.max", "aten.min", "aten.max_pool1d", "aten.max_pool2d")
def extreme(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False, *rest: Any, **kwargs: Any) -> Any:
    """max over an axis: positively homogeneous. Pooling: the same, over data positions."""
    name = node.target.overloadpacket.__name__
    if name.startswith("max_pool"):
        return pool(walk, node, x, Law.HOMOGENEOUS)
    if isinstance(dim, Value):
        return walk.pointwise([x, dim], Law.GENERIC)
    out = walk.reduce(x, _dims(x, dim), keepdim, Law.HOMOGENEOUS)
    if isinstance(node.meta["val"], (list, tuple)):
        indices = walk.given(out.shape)
        indices.range_of = (x, dim % x.rank)
        indices.given = False
        return [out, indices]
    return out


def pool(walk: Walk, node: Any, x: Value, law: Law) -> Value:
    """Windows over trailing positions: those axes must be data; the others pass."""
    from regauge.facts import Reduce

    shape = tuple(int(n) for n in node.meta["val"].shape)
    axes = list(x.axes)
    changed = [i for i in range(x.rank) if shape[i] != x.shape[i] or i >= 2 + (x.rank == 2) - (x.rank == 3)]
    changed = [i for i in range(x.rank) if i >= x.rank - (len(shape) - 2) or shape[i] != x.shape[i]]
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


@RULES.op("aten.avg_pool1d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool1d",
          "aten._adaptive_avg_pool2d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d",
          "aten.upsample_bicubic2d", "aten.avg_pool3d", "aten.upsample_nearest1d", "aten.upsample_linear1d")  # fmt: skip
def linear_pool(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """Linear along positions, channel by channel."""
    return pool(walk, node, x, Law.SUM)


@RULES.op("aten.max_pool2d_with_indices", "aten.adaptive_max_pool2d")
def max_pool(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Any:
    """Positively homogeneous, channel by channel."""
    import copy

    view = copy.copy(node.meta)
    view["val"] = node.meta["val"][0]
    fake = type("Node", (), {"meta": view})
    out = pool(walk, fake, x, Law.HOMOGENEOUS)
    return [out, walk.given(out.shape)]


@RULES.op("aten.logsumexp", "aten.prod", "aten.median", "aten.any", "aten.all", "aten.quantile")
def generic_reduce(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Symmetric in the entries of the axis: only permutations are claimed."""
    return walk.reduce(x, _dims(x, dim), keepdim, Law.GENERIC)


@RULES.op("aten.argmax", "aten.argmin")
def argmax(walk: Walk, node: Any, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    """An index of the axis: permuted with it."""
    if dim is None:
        return walk.opaque([x], [tuple(int(n) for n in node.meta["val"].shape)], "argmax over all axes")[0]
    out = walk.reduce(x, [dim], keepdim, Law.GENERIC)
    out.range_of = (x, dim % x.rank)
    return out


@RULES.op("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(walk: Walk, node: Any, x: Value, dim: int, *rest: Any, **kwargs: Any) -> Value:
    """Symmetric in the entries of the axis, blind to a constant added along it, sums to one."""
    out = walk.softmax(x, dim)
    if "log" in node.target.overloadpacket.__name__:
        out.normalised = None
    return out


@RULES.op("aten.cumsum", "aten.cumprod", "aten.logcumsumexp")
def cumulative(walk: Walk, node: Any, x: Value, dim: int, **kwargs: Any) -> Value:
    """Mixes positions in order: the axis is stopped; cumsum is linear along the others."""
    from regauge.facts import Link

    dim %= x.rank
    name = node.target.overloadpacket.__name__
    axes = list(x.axes)
    if not walk.structure.is_data(axes[dim]):
        walk.stop(x, f"{name} runs along this axis", [dim])
        walk.structure.rigid(axes[dim])
        axes[dim] = walk.structure.axis(x.shape[dim], True)
    if name != "cumsum":
        x = walk.unary(x, Law.GENERIC)
    return walk.remap(x, axes, [Link((i,), (i,)) for i in range(x.rank)])


@RULES.op("aten.topk", "aten.sort")
def topk(walk: Walk, node: Any, x: Value, *args: Any, **kwargs: Any) -> list[Value]:
    """The largest entries in order: the same for every arrangement; the indices move along."""
    from regauge.facts import Reduce

    name = node.target.overloadpacket.__name__
    shape = tuple(int(n) for n in node.meta["val"][0].shape)
    dim = kwargs.get("dim", (args[1] if len(args) > 1 else -1) if name == "topk" else (args[0] if args else -1))
    dim %= x.rank
    walk.use(x)
    axes = [axis if i != dim else walk.structure.axis(shape[dim], True) for i, axis in enumerate(x.axes)]
    keep = tuple((i, i) for i in range(x.rank) if i != dim)
    values, indices = walk.value(axes), walk.value(axes)
    walk.record(Reduce(*walk.where, values, x, keep, (dim,), Law.GENERIC))
    walk.record(Reduce(*walk.where, indices, x, keep, (dim,), Law.GENERIC))
    indices.range_of = (x, dim)
    if name == "sort":
        indices.range_of = (x, dim)
    return [values, indices]
