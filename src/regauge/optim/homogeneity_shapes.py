"""The same for rearrangements, and for functions along axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from regauge.interpret import op_name
from regauge.optim.degrees import UNSCALED, Arg, Degrees, Key, Mixed, Tag, compact, padded
from regauge.optim.homogeneity import Result, only_first, rule, shape_of


def _axes(x: Arg, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(x.rank))
    return sorted(d % x.rank for d in ([dim] if isinstance(dim, int) else dim))


# --- rearrangements: the operation itself, carried out on the units -----------------------------------


@rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.unsqueeze",
      "aten.squeeze", "aten.permute", "aten.transpose", "aten.t", "aten.mT", "aten.numpy_T", "aten.movedim",
      "aten.swapaxes", "aten.expand", "aten.broadcast_to", "aten.repeat", "aten.tile", "aten.slice",
      "aten.narrow", "aten.select", "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind",
      "aten.cat", "aten.concat", "aten.stack", "aten.flip", "aten.roll", "aten.repeat_interleave",
      "aten.unfold", "aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.diagonal")  # fmt: skip
def _rearranged(s: Degrees, node: fx.Node, key: Key, *args: Any) -> Result:
    if "dtype" in str(getattr(node.target, "_overloadname", "")):
        raise Mixed("bits read as another type")
    degrees: set[Fraction] = set()

    def units(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [units(item) for item in value]
        if not isinstance(value, Arg):
            return value
        if value.tag is None:
            return torch.full(value.shape, UNSCALED)
        degrees.add(s.plain(value).degree)
        return value.tag.units.expand(value.shape)

    given = [units(arg) for arg in args]
    if len(degrees) != 1:
        raise Mixed("parts that scale differently are joined")
    degree = degrees.pop()
    out = node.target(*given)  # type: ignore[operator]
    if isinstance(out, torch.Tensor):
        return Tag(compact(out), degree)
    return [Tag(compact(item), degree) if bool((item >= 0).any()) else None for item in out]


@rule("aten.expand_as", "aten.view_as", "aten.reshape_as")
def _shaped(s: Degrees, node: fx.Node, key: Key, x: Arg, like: Arg) -> Result:
    """Of the other tensor only the shape is used."""
    tag = s.plain(x)
    units = tag.units.expand(x.shape)
    shape = shape_of(node)
    return Tag(compact(units.expand(shape) if op_name(node) == "aten.expand_as" else units.reshape(shape)),
               tag.degree)  # fmt: skip


@rule("aten.constant_pad_nd", "aten.pad")
def _pad(s: Degrees, node: fx.Node, key: Key, x: Arg, amounts: Sequence[int], *rest: Any) -> Result:
    """Zeros scale as anything, along axes on which the units do not depend."""
    tag = s.plain(x)
    if any(value not in (0, 0.0, None, "constant") for value in rest):
        raise Mixed("padded with numbers other than zero")
    touched = [x.rank - 1 - i for i in range(len(amounts) // 2) if any(amounts[2 * i : 2 * i + 2])]
    return s.merge(key, tag, touched)


@rule("aten.embedding")
def _embedding(s: Degrees, node: fx.Node, key: Key, table: Arg, index: Arg, *rest: Any) -> Result:
    """Any row may be looked up."""
    tag = s.merge(key, s.plain(table), [0])
    return padded(Tag(tag.units[0], tag.degree), len(shape_of(node)))


@rule("aten.index", "aten.index_select", "aten.gather", "aten.take_along_dim")
def _indexed(s: Degrees, node: fx.Node, key: Key, x: Arg, *rest: Any) -> Result:
    """Any entry may be selected."""
    tag = s.merge(key, s.plain(x), range(x.rank))
    return Tag(tag.units.reshape([1] * len(shape_of(node))), tag.degree)


# --- along axes ---------------------------------------------------------------------------------------


def _keep(tag: Tag, axes: Sequence[int], keepdim: bool) -> Tag:
    units = tag.units
    return Tag(units if keepdim else units.reshape([n for i, n in enumerate(units.shape) if i not in axes]),
               tag.degree)  # fmt: skip


@rule("aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.nansum")
def _reduced(s: Degrees, node: fx.Node, key: Key, x: Arg, dim: Any = None, keepdim: bool = False) -> Result:
    """Homogeneous over axes that scale as one."""
    axes = _axes(x, dim)
    return _keep(s.merge(key, s.plain(x), axes), axes, keepdim)


@rule("aten.var", "aten.std", "aten.var_mean", "aten.linalg_vector_norm", "aten.norm")
def _spread(s: Degrees, node: fx.Node, key: Key, x: Arg, *rest: Any) -> Result:
    """Of degree two, or one."""
    name = op_name(node)
    rest = rest[1:] if name in ("aten.linalg_vector_norm", "aten.norm") else rest
    if name in ("aten.linalg_vector_norm", "aten.norm") and len(node.args) > 1 and not node.args[1]:
        raise Mixed("counts entries")
    axes = _axes(x, rest[0] if rest and not isinstance(rest[0], bool) else None)
    keepdim = len(shape_of(node)) == x.rank
    tag = _keep(s.merge(key, s.plain(x), axes), axes, keepdim)
    if name in ("aten.var", "aten.var_mean"):
        power = replace(tag, degree=2 * tag.degree)
        return [power, tag] if name == "aten.var_mean" else power
    return tag


@rule("aten.max", "aten.min", "aten.topk", "aten.sort")
def _ordered(s: Degrees, node: fx.Node, key: Key, x: Arg, *rest: Any) -> Result:
    """Order does not change under a positive scale, where the axis scales as one."""
    several = isinstance(node.meta["val"], (list, tuple))
    if not several:
        if rest:
            raise Mixed("the larger of two tensors")
        return _keep(s.merge(key, s.plain(x), range(x.rank)), range(x.rank), False)
    place = 1 if op_name(node) == "aten.topk" else 0
    dim = node.kwargs.get("dim", rest[place] if len(rest) > place else -1)
    axes = _axes(x, dim)
    tag = s.merge(key, s.plain(x), axes)
    return [_keep(tag, axes, len(shape_of(node)) == x.rank), None]


@rule("aten.argmax", "aten.argmin", "aten.argsort")
def _order(s: Degrees, node: fx.Node, key: Key, x: Arg, dim: Any = None, *rest: Any) -> Result:
    s.merge(key, s.plain(x), range(x.rank))
    return None


@rule("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d", "aten.adaptive_avg_pool1d",
      "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d", "aten.adaptive_avg_pool3d", "aten.max_pool1d",
      "aten.max_pool2d", "aten.max_pool3d", "aten.max_pool2d_with_indices", "aten.adaptive_max_pool2d",
      "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d",
      "aten.upsample_bicubic2d", "aten.cumsum")  # fmt: skip
def _pooled(s: Degrees, node: fx.Node, key: Key, x: Arg, *rest: Any) -> Result:
    """Homogeneous along positions that scale as one."""
    shape = shape_of(node)
    if op_name(node) == "aten.cumsum":
        return s.merge(key, s.plain(x), [rest[0] % x.rank])
    spatial = int(op_name(node).removesuffix("_with_indices")[-2])
    if len(shape) != x.rank:
        raise Mixed("pooling that changes the rank")
    return only_first(node, s.merge(key, s.plain(x), range(x.rank - spatial, x.rank)))
