"""RMS norms that a module spells out in primitive operations: x · rsqrt(mean(x²) + eps), times a gain.

The operations of one module are followed from its input; a norm is only recognised if every operation has a
place in the pattern and exactly one value leaves it. Casts between floating-point types have none: they
round, and the replacement computes in float32 or better whatever the input is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from regauge.interpret import op_name

CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.alias")
PRODUCTS = ("aten.mul", "aten.multiply")
SILENT = ("aten._assert_tensor_metadata",)


@dataclass(frozen=True)
class PrimitiveNorm:
    """One call: y[…, c] = (chart + w[c]) · x[…, c] · rsqrt(mean_c(x²) + eps).

    Attributes:
        node: the operation whose value leaves the module.
        size: entries of the last axis.
        eps: added to the mean of squares.
        weight: state-dict name of w; None without a gain.
        chart: constant added to w; 0 without a gain.
    """

    node: str
    size: int
    eps: float
    weight: str | None
    chart: float


@dataclass(frozen=True)
class _Seen:
    """What a value is: a ``stage`` of the norm of ``source``, or a gain."""

    stage: str
    source: Any = None
    eps: float = 0.0
    weight: str | None = None
    chart: float = 0.0


class _Other(Exception):
    """An operation without a place in the pattern."""


def primitive_norms(nodes: list[fx.Node], own: Callable[[Any], str | None]) -> list[PrimitiveNorm]:
    """The norms that the operations of a module make up, one for each call; none if they are anything else.

    Args:
        nodes: all operations of the module, in order.
        own: name of the parameter that a value is, if it belongs to the module alone.
    """
    seen: dict[fx.Node, _Seen] = {}
    found: list[PrimitiveNorm] = []
    inside = set(nodes)
    try:
        for node in nodes:
            if op_name(node) in SILENT:
                continue
            seen[node] = _follow(node, seen, inside, own)
            if any(user not in inside for user in node.users) and not _same_as_input(node, seen[node]):
                found.append(_leaving(node, seen[node]))
    except _Other:
        return []
    # One value leaves for each one that enters, and every operation leads to it.
    sources = [value.source for value in seen.values() if value.source is not None]
    idle = any(not node.users for node in seen)
    return [] if idle or len(set(sources)) != len(found) else found


def gain_of(node: fx.Node, own: Callable[[Any], str | None]) -> str | None:
    """The parameter g of an operation y[…] = g[…] · x[…], where y has the shape and dtype of x."""
    if op_name(node) not in PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    for x, gain in (node.args, node.args[::-1]):
        name = own(gain)
        if name is not None and isinstance(x, fx.Node) and own(x) is None:
            before, after = x.meta["val"], node.meta["val"]
            return name if (before.shape, before.dtype) == (after.shape, after.dtype) else None
    return None


def _same_as_input(node: fx.Node, value: _Seen) -> bool:
    """A cast that changed nothing: the tracer takes it for its argument, and others read it in its place."""
    return value.stage == "input" and value.source.meta["val"].dtype == node.meta["val"].dtype


def _leaving(node: fx.Node, value: _Seen) -> PrimitiveNorm:
    x, y = value.source, node.meta["val"]
    if value.stage != "normed" or x.meta["val"].dtype != y.dtype or not x.meta["val"].shape:
        raise _Other
    return PrimitiveNorm(node.name, int(y.shape[-1]), value.eps, value.weight, value.chart)


def _follow(
    node: fx.Node, seen: dict[fx.Node, _Seen], inside: set[fx.Node], own: Callable[[Any], str | None]
) -> _Seen:
    """What an operation gives: the one place where the pattern is written down."""
    name = op_name(node)
    example = node.meta.get("val")
    if not isinstance(example, torch.Tensor) or not example.dtype.is_floating_point:
        raise _Other
    if name in CASTS:
        return _value(node.args[0], seen, inside, own)
    values = [_value(arg, seen, inside, own) for arg in node.args if isinstance(arg, fx.Node)]
    stages = tuple(sorted(value.stage for value in values))
    plain = [arg for arg in node.args if not isinstance(arg, fx.Node)]
    kwargs = dict(node.kwargs)
    first = values[0] if values else _Seen("")
    rank = example.dim()
    if kwargs:
        raise _Other
    if name == "aten.pow" and stages == ("input",) and plain == [2]:
        return replace(first, stage="square")
    if name == "aten.square" and stages == ("input",):
        return replace(first, stage="square")
    if name in PRODUCTS and stages == ("input", "input") and values[0] == values[1]:
        return replace(first, stage="square")
    if name == "aten.mean" and stages == ("square",) and plain in ([[-1], True], [[rank - 1], True]):
        return replace(first, stage="mean")
    if name == "aten.add" and stages == ("mean",) and len(plain) == 1:
        if first.eps or not 0 <= _number(plain[0]) < 1:
            raise _Other
        return replace(first, eps=_number(plain[0]))
    if name == "aten.rsqrt" and stages == ("mean",):
        return replace(first, stage="inverse")
    if name == "aten.pow" and stages == ("mean",) and plain == [-0.5]:
        return replace(first, stage="inverse")
    if name == "aten.sqrt" and stages == ("mean",):
        return replace(first, stage="root")
    if name == "aten.div" and len(values) == 2 and [v.stage for v in values] == ["input", "root"]:
        return _normed(values[0], values[1])
    if name in PRODUCTS and stages == ("input", "inverse"):
        return _normed(*sorted(values, key=lambda value: value.stage))
    if name == "aten.add" and stages == ("gain",) and len(plain) == 1 and not first.chart:
        return replace(first, chart=_number(plain[0]))
    if name in PRODUCTS and stages == ("gain", "normed"):
        gain, normed = sorted(values, key=lambda value: value.stage)
        if normed.weight is None:
            return replace(normed, weight=gain.weight, chart=gain.chart)
    raise _Other


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _Other
    return float(value)


def _normed(x: _Seen, inverse: _Seen) -> _Seen:
    if x.source is not inverse.source:
        raise _Other
    return replace(inverse, stage="normed")


def _value(
    arg: Any, seen: dict[fx.Node, _Seen], inside: set[fx.Node], own: Callable[[Any], str | None]
) -> _Seen:
    if arg in seen:
        return seen[arg]
    if not isinstance(arg, fx.Node) or arg in inside:
        raise _Other
    name = own(arg)
    if name is not None:
        return _Seen("gain", weight=name)
    return _Seen("input", source=arg)
