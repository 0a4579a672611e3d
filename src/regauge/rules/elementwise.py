"""Functions applied entry by entry: ``f`` commutes with permutations always, with more if it is
homogeneous, odd, even or a power."""

from __future__ import annotations

from typing import Any

from regauge.facts import Law, Value
from regauge.interpret import Walk
from regauge.rules.table import Table

RULES = Table()


@RULES.op(
    "aten.to", "aten._to_copy", "aten.type_as", "aten.contiguous", "aten.clone", "aten.alias", "aten.detach",
    "aten.dropout", "aten.native_dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.lift_fresh_copy",
    "aten.lift_fresh", "aten.detach_", "aten.float", "aten.positive", "aten.conj", "aten.resolve_conj",
    "aten.copy", "aten.dropout_", "aten._autocast_to_full_precision", "aten._autocast_to_reduced_precision",
    "aten.bernoulli_", "aten.real",
)  # fmt: skip
def transparent(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Any:
    """y = x (casts, copies, dropout in eval mode)."""
    if node.target.overloadpacket.__name__ == "copy":
        source = rest[0]
        return walk.expand(source, x.shape) if isinstance(source, Value) else walk.given(x.shape)
    if node.target.overloadpacket.__name__ == "native_dropout":
        return [x, walk.given(x.shape)]
    return x


@RULES.op("aten._assert_tensor_metadata", "aten._assert_async", "aten.sym_constrain_range_for_size",
          "aten._assert_scalar", "aten.sym_constrain_range")  # fmt: skip
def assertion(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> None:
    """Nothing is computed."""


@RULES.op("aten.neg", "aten.deg2rad", "aten.rad2deg")
def scaled(walk: Walk, node: Any, x: Value) -> Value:
    """y = c x for a constant c: linear."""
    return walk.pointwise([x], Law.SUM)


def _chart(walk: Walk, x: Value, constant: float) -> Value | None:
    """A scalar added to a stored parameter: act on the sum, store the difference."""
    if x.parameter is not None and x.chart == 0.0 and constant != 0.0:
        return walk.parameter(x.parameter, float(constant))
    return None


@RULES.op("aten.add", "aten.sub", "aten.rsub", "aten.add_", "aten.sub_")
def add(walk: Walk, node: Any, x: Any, y: Any, alpha: float = 1, **kwargs: Any) -> Value:
    """z = x ± c y: both transform alike; what is broadcast along an axis adds a multiple of the
    ones vector there. x − mean(x) is centring."""
    name = node.target.overloadpacket.__name__.rstrip("_")
    if not isinstance(x, Value):
        x, y = y, x
    if not isinstance(y, Value):
        constant = float(y) * float(alpha) * (-1 if name == "sub" else 1)
        if float(y) == 0.0:
            return x
        if name == "rsub":
            return walk.shifted(walk.pointwise([x], Law.SUM))
        return _chart(walk, x, constant) or walk.shifted(x)
    if name == "sub" and y.mean_of is not None and y.mean_of[0] is x and alpha == 1:
        return walk.center(x, y.mean_of[1])
    return walk.pointwise([x, y], Law.SUM)


@RULES.op("aten.mul", "aten.mul_")
def mul(walk: Walk, node: Any, x: Any, y: Any) -> Value:
    """z = x y: scales and signs multiply; a value constant along an axis scales it as a whole.
    x · x is a square: summed, it is the squared length, which rotations keep."""
    if not isinstance(x, Value):
        x, y = y, x
    if not isinstance(y, Value):
        return walk.pointwise([x], Law.SUM) if float(y) != 0.0 else _zero(walk, x)
    if y is x:
        return walk.square(x)
    return walk.product(x, y)


def _zero(walk: Walk, x: Value) -> Value:
    out = walk.given(x.shape)
    out.zero = True
    return out


@RULES.op("aten.div", "aten.true_divide", "aten.div_")
def div(walk: Walk, node: Any, x: Any, y: Any, rounding_mode: Any = None) -> Value:
    """z = x / y: scales divide."""
    if rounding_mode is not None:
        values = [v for v in (x, y) if isinstance(v, Value)]
        return walk.pointwise(values, Law.GENERIC)
    if not isinstance(y, Value):
        return walk.pointwise([x], Law.SUM)
    if not isinstance(x, Value):
        return walk.pointwise([y], Law.POWER, [-1.0])
    return walk.product(x, y, (1.0, -1.0))


@RULES.op("aten.addcmul")
def addcmul(walk: Walk, node: Any, x: Value, a: Value, b: Value, value: float = 1) -> Value:
    """y = x + c a b."""
    return walk.pointwise([x, walk.product(a, b)], Law.SUM)


@RULES.op("aten.lerp")
def lerp(walk: Walk, node: Any, x: Value, y: Value, w: Any) -> Value:
    """z = x + w (y − x)."""
    if not isinstance(w, Value):
        return walk.pointwise([x, y], Law.SUM)
    return walk.pointwise([x, walk.product(walk.pointwise([x, y], Law.SUM), w)], Law.SUM)


@RULES.op("aten.pow")
def pow_(walk: Walk, node: Any, x: Any, p: Any) -> Value:
    """y = x ** p: scales are raised to p; (−x) ** p = ± x ** p for integer p."""
    if isinstance(p, Value) or not isinstance(x, Value):
        return walk.pointwise([v for v in (x, p) if isinstance(v, Value)], Law.GENERIC)
    if float(p) == 2.0:
        return walk.square(x)
    if float(p) == 1.0:
        return x
    return walk.unary(x, Law.POWER, float(p))


@RULES.op("aten.square")
def square(walk: Walk, node: Any, x: Value) -> Value:
    """y = x²."""
    return walk.square(x)


@RULES.op("aten.sqrt", "aten.rsqrt", "aten.reciprocal")
def root(walk: Walk, node: Any, x: Value) -> Value:
    """y = x ** p with p = 1/2, −1/2 or −1."""
    powers = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
    return walk.unary(x, Law.POWER, powers[node.target.overloadpacket.__name__])


@RULES.op("aten.relu", "aten.leaky_relu", "aten.relu_", "aten.leaky_relu_", "aten.rrelu")
def relu(walk: Walk, node: Any, x: Value, *rest: Any) -> Value:
    """f(s x) = s f(x) for s > 0."""
    return walk.unary(x, Law.HOMOGENEOUS)


@RULES.op("aten.prelu")
def prelu(walk: Walk, node: Any, x: Value, slope: Value) -> Value:
    """f(x) = max(x, 0) + a min(x, 0): homogeneous in x; the slope is permuted along, not scaled."""
    if slope.shape not in ((), (1,)):
        slope = walk.reshape(slope, [n if i == 1 else 1 for i, n in enumerate(x.shape)])
    kept = walk.unary(x, Law.HOMOGENEOUS)
    return walk.pointwise([kept, walk.product(slope, walk.unary(x, Law.HOMOGENEOUS))], Law.SUM)


@RULES.op("aten.threshold")
def threshold(walk: Walk, node: Any, x: Value, limit: float, value: float) -> Value:
    """Homogeneous when both numbers are zero."""
    return walk.unary(x, Law.HOMOGENEOUS if limit == 0 and value == 0 else Law.GENERIC)


@RULES.op("aten.abs")
def absolute(walk: Walk, node: Any, x: Value) -> Value:
    """|s x| = |s| |x|."""
    return walk.unary(x, Law.ABSOLUTE)


@RULES.op("aten.tanh", "aten.sin", "aten.erf", "aten.asinh", "aten.atan", "aten.sinh", "aten.tan",
          "aten.sign", "aten.softsign", "aten.arctan", "aten.round", "aten.asin", "aten.tanh_")  # fmt: skip
def odd(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """f(−x) = −f(x)."""
    return walk.unary(x, Law.ODD)


@RULES.op("aten.cos", "aten.cosh")
def even(walk: Walk, node: Any, x: Value) -> Value:
    """f(−x) = f(x)."""
    return walk.unary(x, Law.EVEN)


@RULES.op("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh", "aten.clip", "aten.clamp_")
def clamp(walk: Walk, node: Any, x: Value, low: Any = None, high: Any = None, **kwargs: Any) -> Value:
    """clamp(x, 0, ∞) is relu; other bounds are fixed numbers."""
    name = node.target.overloadpacket.__name__
    if isinstance(low, Value) or isinstance(high, Value):
        return walk.pointwise([v for v in (x, low, high) if isinstance(v, Value)], Law.GENERIC)
    if name == "clamp_max":
        low, high = None, low
    if name in ("clamp", "clamp_", "clip", "clamp_min", "clamp_max") and (
        (low == 0 and high is None) or (high == 0 and low is None)
    ):
        return walk.unary(x, Law.HOMOGENEOUS)
    return walk.unary(x, Law.GENERIC)


@RULES.op("aten.maximum", "aten.minimum", "aten.max.other", "aten.fmax", "aten.fmin")
def extreme(walk: Walk, node: Any, x: Value, y: Value) -> Value:
    """Entrywise max or min: no scale is claimed."""
    return walk.pointwise([x, y], Law.GENERIC)


@RULES.op(
    "aten.gelu", "aten.silu", "aten.sigmoid", "aten.exp", "aten.exp2", "aten.expm1", "aten.log", "aten.log1p",
    "aten.log2", "aten.softplus", "aten.elu", "aten.selu", "aten.celu", "aten.mish", "aten.hardswish",
    "aten.hardsigmoid", "aten.relu6", "aten.log_sigmoid", "aten.logit", "aten.floor", "aten.ceil", "aten.eq",
    "aten.ne", "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.logical_not", "aten.logical_and",
    "aten.logical_or", "aten.bitwise_not", "aten.bitwise_and", "aten.bitwise_or", "aten.isnan", "aten.isinf",
    "aten.nan_to_num", "aten.__and__", "aten.__or__", "aten.remainder", "aten.fmod", "aten.floor_divide",
    "aten.silu_", "aten.sigmoid_", "aten.exp_", "aten.elu_", "aten.hardswish_", "aten.xlogy", "aten.frac",
    "aten.isfinite", "aten.trunc", "aten.logaddexp", "aten.atan2", "aten.erfc", "aten.softshrink",
    "aten.special_expit", "aten.erfinv", "aten.special_log_ndtr", "aten.hardshrink", "aten.logical_xor",
)  # fmt: skip
def generic(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """Entrywise, nothing but permutations is claimed."""
    values = [arg for arg in args if isinstance(arg, Value)]
    ranged = [value for value in values if value.range_of is not None]
    for value in ranged:
        walk.stop(value, "its selected indices are compared or computed with")
    values = [walk.given(v.shape) if v in ranged else v for v in values]
    return walk.pointwise(values, Law.GENERIC)


@RULES.op("aten.masked_fill", "aten.masked_fill_")
def masked_fill(walk: Walk, node: Any, x: Value, mask: Value, fill: Any) -> Value:
    """Entries under the mask become a constant: with zero it is a product, else a shift."""
    zero = not isinstance(fill, Value) and float(fill) == 0.0
    if mask.given and zero:
        return walk.pointwise([x, mask], Law.PRODUCT, [1.0, 1.0])
    if not mask.given:
        return walk.pointwise([x, mask], Law.GENERIC)
    return walk.pointwise([x, mask], Law.SHIFT)


@RULES.op("aten.where")
def where(walk: Walk, node: Any, mask: Value, x: Any = None, y: Any = None) -> Any:
    """z = x where the mask, else y. A mask that no parameter changes chooses between equals."""
    if not (isinstance(x, Value) or isinstance(y, Value)):
        return walk.opaque([mask], [], "where with one argument")
    live = [v for v in (x, y) if isinstance(v, Value)]
    scalars = [v for v in (x, y) if not isinstance(v, Value)]
    zero = all(float(v) == 0.0 for v in scalars if v is not None)
    if not mask.given:
        return walk.pointwise([mask, *live], Law.GENERIC)
    dead = [v for v in live if v.given]
    live = [v for v in live if not v.given]
    if not live:
        return walk.pointwise([mask, *dead], Law.GENERIC)
    if scalars or dead:
        zero = zero and all(v.zero for v in dead)
        return walk.pointwise([*live, mask], Law.PRODUCT if zero else Law.SHIFT, [1.0] * 2)
    return walk.pointwise([*live, mask], Law.SUM if mask.shape == () else Law.SHIFT)


@RULES.op("aten.zeros_like", "aten.zeros", "aten.new_zeros", even_given=True)
def zeros(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """Zeros transform as anything."""
    out = walk.given(tuple(int(n) for n in node.meta["val"].shape))
    out.zero = True
    return out


@RULES.op("aten.ones_like", "aten.full_like", "aten.empty_like", "aten.new_ones", "aten.new_full",
          "aten.new_empty", "aten.randn_like", "aten.rand_like", "aten.new_tensor")  # fmt: skip
def filled(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """A constant tensor; only the shape of the argument is used."""
    return walk.given(tuple(int(n) for n in node.meta["val"].shape))
