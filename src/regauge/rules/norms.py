"""Normalisation: centring, squared lengths, gains and shifts, composed from the primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regauge.facts import Law, Value
from regauge.interpret import Walk
from regauge.rules.elementwise import first
from regauge.rules.table import Table

RULES = Table()


def _standardise(walk: Walk, x: Value, over: Sequence[int], eps: float, centre: bool = True) -> Value:
    """x / sqrt(mean(x²) + eps), x centred first if asked."""
    if centre:
        x = walk.center(x, over)
    power = walk.reduce(walk.square(x), over, True, Law.SUM)
    if eps:
        power = walk.shifted(power)
    return walk.product(x, walk.unary(power, Law.POWER, -0.5))


def _affine(walk: Walk, x: Value, gain: Value | None, shift: Value | None) -> Value:
    if gain is not None:
        x = walk.product(x, gain)
    if shift is not None:
        x = walk.pointwise([x, shift], Law.SUM)
    return x


@RULES.op("aten.layer_norm", "aten.native_layer_norm")
def layer_norm(walk: Walk, node: Any, x: Value, shape: Sequence[int], gain: Value | None = None,
               shift: Value | None = None, eps: float = 1e-5, *rest: Any) -> Any:  # fmt: skip
    """y = g · (x − mean) / sqrt(var + eps) + b over the trailing axes."""
    over = list(range(x.rank - len(shape), x.rank))
    y = _affine(walk, _standardise(walk, x, over, eps), gain, shift)
    return first(walk, node, x, y) if isinstance(node.meta["val"], (list, tuple)) else y


@RULES.op("aten.rms_norm", "aten._fused_rms_norm")
def rms_norm(
    walk: Walk, node: Any, x: Value, shape: Sequence[int], gain: Value | None = None, eps: Any = None
) -> Any:
    """y = g · x / sqrt(mean(x²) + eps) over the trailing axes."""
    over = list(range(x.rank - len(shape), x.rank))
    y = _affine(walk, _standardise(walk, x, over, 1.0, centre=False), gain, None)
    return first(walk, node, x, y) if isinstance(node.meta["val"], (list, tuple)) else y


@RULES.op("aten.native_group_norm")
def native_group_norm(walk: Walk, node: Any, x: Value, gain: Value | None, shift: Value | None, n: int,
                      channels: int, positions: int, groups: int, eps: float) -> Any:  # fmt: skip
    """The same with its arguments in another order."""
    return group_norm(walk, node, x, groups, gain, shift, eps)


@RULES.op("aten.group_norm")
def group_norm(walk: Walk, node: Any, x: Value, groups: int, gain: Value | None = None,
               shift: Value | None = None, eps: float = 1e-5, cudnn: bool = True) -> Any:  # fmt: skip
    """LayerNorm over each group of channels and all positions."""
    channels = x.shape[1]
    wide = walk.reshape(x, (x.shape[0], groups, channels // groups, *x.shape[2:]))
    y = walk.reshape(_standardise(walk, wide, range(2, wide.rank), eps or 1.0), x.shape)
    y = _affine(walk, y, _channel(walk, gain, x), _channel(walk, shift, x))
    return first(walk, node, x, y) if isinstance(node.meta["val"], (list, tuple)) else y


def _channel(walk: Walk, vector: Value | None, x: Value) -> Value | None:
    """A vector over axis 1, shaped to broadcast against x."""
    if vector is None:
        return None
    return walk.reshape(vector, (vector.shape[0], *[1] * (x.rank - 2)))


@RULES.op("aten.batch_norm", "aten.native_batch_norm", "aten._native_batch_norm_legit_no_training",
          "aten.cudnn_batch_norm")  # fmt: skip
def batch_norm(walk: Walk, node: Any, x: Value, gain: Value | None, shift: Value | None,
               mean: Value | None, var: Value | None, *rest: Any) -> Any:  # fmt: skip
    """y = g · (x − m) / sqrt(v + eps) + b with stored statistics m and v, which are parameters."""
    training = not node.target.overloadpacket.__name__.endswith("no_training") and bool(rest[0])
    if mean is None or var is None or training:
        y = _standardise(walk, x, [0, *range(2, x.rank)], 1.0)
    else:
        y = _stored(walk, x, mean, var)
    y = _affine(walk, y, _channel(walk, gain, x), _channel(walk, shift, x))
    return first(walk, node, x, y) if isinstance(node.meta["val"], (list, tuple)) else y


def _stored(walk: Walk, x: Value, mean: Value, var: Value) -> Value:
    """(x − m) / sqrt(v + eps), channel by channel."""
    m, v = _channel(walk, mean, x), _channel(walk, var, x)
    assert m is not None
    assert v is not None
    y = walk.pointwise([x, m], Law.SUM)
    return walk.product(y, walk.unary(walk.shifted(v), Law.POWER, -0.5))


@RULES.op("aten.instance_norm")
def instance_norm(walk: Walk, node: Any, x: Value, gain: Value | None, shift: Value | None,
                  mean: Value | None, var: Value | None, from_input: bool, *rest: Any) -> Value:  # fmt: skip
    """LayerNorm over the positions of each channel."""
    if from_input or mean is None or var is None:
        y = _standardise(walk, x, range(2, x.rank), 1.0)
    else:
        y = _stored(walk, x, mean, var)
    return _affine(walk, y, _channel(walk, gain, x), _channel(walk, shift, x))


@RULES.op("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(walk: Walk, node: Any, v: Value, g: Value, dim: int = 0) -> Any:
    """w = g v / ‖v‖, a length for every index of one axis."""
    over = [d for d in range(v.rank) if d != dim % v.rank]
    length = walk.unary(walk.reduce(walk.square(v), over, True, Law.SUM), Law.POWER, -0.5)
    w = walk.product(walk.product(v, length), g)
    return first(walk, node, v, w) if isinstance(node.meta["val"], (list, tuple)) else w
