"""Functions applied entry by entry: ``f`` commutes with permutations always, with more if it is
homogeneous, odd, even or a power."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from regauge.facts import Law, Value
from regauge.interpret import Walk
from regauge.rules.table import Table

RULES = Table()


@RULES.op(
    "aten.to", "aten._to_copy", "aten.type_as", "aten.contiguous", "aten.clone", "aten.alias", "aten.detach",
    "aten.lift_fresh_copy", "aten.lift_fresh", "aten.positive", "aten._autocast_to_full_precision",
    "aten._autocast_to_reduced_precision", even_given=True,
)  # fmt: skip
def transparent(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Any:
    """y = x: copies, and casts between floating-point types. A cast to integers rounds."""
    return _cast(walk, x, _kind(node.args[0]), _kind(node))


def _kind(node: Any) -> str:
    """float, complex, integer or boolean."""
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else ("boolean" if str(dtype) == "torch.bool" else "integer")


_WIDER = ("boolean", "integer", "float", "complex")


def _cast(walk: Walk, x: Value, source: str, target: str) -> Value:
    if _WIDER.index(target) >= _WIDER.index(source) or x.given:
        return x
    return walk.unary(x, Law.GENERIC)


@RULES.op("aten.copy")
def copy(walk: Walk, node: Any, x: Value, source: Any, *rest: Any) -> Value:
    """The second tensor, in the shape and type of the first."""
    if not isinstance(source, Value):
        return walk.given(x.shape)
    return walk.expand(_cast(walk, source, _kind(node.args[1]), _kind(node)), x.shape)


@RULES.op("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout",
          "aten.native_dropout")  # fmt: skip
def dropout(walk: Walk, node: Any, x: Value, p: float = 0.5, train: Any = False) -> Any:
    """y = x in eval mode; a dropout that stays on is refused."""
    if train and p > 0:
        raise ValueError("dropout that is not switched off in eval mode")
    if isinstance(node.meta["val"], (list, tuple)):
        return first(walk, node, x, x)
    return x


def first(walk: Walk, node: Any, x: Value, out: Value) -> list[Value]:
    """An operation of several results of which only the first is explained: the others, if anything
    uses them, stop the argument."""
    rest = [tuple(int(n) for n in item.shape) for item in node.meta["val"][1:]]
    used = any(user.users and int(user.args[1]) > 0 for user in node.users if len(user.args) > 1)
    if used:
        return [out, *walk.opaque([x], rest, "another result of the operation is used")]
    return [out, *[walk.given(shape) for shape in rest]]


@RULES.op("aten._assert_tensor_metadata", "aten._assert_async", "aten.sym_constrain_range_for_size",
          "aten._assert_scalar", "aten.sym_constrain_range", "_set_grad_enabled")  # fmt: skip
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


@RULES.op("aten.add", "aten.sub", "aten.rsub")
def add(walk: Walk, node: Any, x: Any, y: Any, alpha: float = 1, **kwargs: Any) -> Value:
    """z = x ± c y: both transform alike; what is broadcast along an axis adds a multiple of the
    ones vector there. x − mean(x) is centring."""
    name = node.target.overloadpacket.__name__
    if not isinstance(x, Value):
        return walk.shifted(walk.pointwise([y], Law.SUM))
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


@RULES.op("aten.mul", "aten.multiply")
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


@RULES.op("aten.div", "aten.true_divide", "aten.divide")
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
    if abs(Fraction(float(p)).limit_denominator(64) - Fraction(float(p))) > Fraction(1, 10**14):
        return walk.unary(x, Law.GENERIC)
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


@RULES.op("aten.relu", "aten.leaky_relu")
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
          "aten.sign", "aten.arctan", "aten.round", "aten.asin", "aten.arcsin",
          "aten.sgn", "aten.erfinv", "aten.atanh", "aten.trunc", "aten.fix", "aten.hardshrink",
          "aten.softshrink", "aten.special_erf")  # fmt: skip
def odd(walk: Walk, node: Any, x: Value, *rest: Any, **kwargs: Any) -> Value:
    """f(−x) = −f(x)."""
    return walk.unary(x, Law.ODD)


@RULES.op("aten.cos", "aten.cosh", "aten.sinc")
def even(walk: Walk, node: Any, x: Value) -> Value:
    """f(−x) = f(x)."""
    return walk.unary(x, Law.EVEN)


@RULES.op("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh", "aten.clip")
def clamp(walk: Walk, node: Any, x: Value, low: Any = None, high: Any = None, **kwargs: Any) -> Value:
    """clamp(x, 0, ∞) is relu; other bounds are fixed numbers."""
    name = node.target.overloadpacket.__name__
    if isinstance(low, Value) or isinstance(high, Value):
        return walk.pointwise([v for v in (x, low, high) if isinstance(v, Value)], Law.GENERIC)
    if name == "clamp_max":
        low, high = None, low
    if name in ("clamp", "clip", "clamp_min", "clamp_max") and (
        (low == 0 and high is None) or (high == 0 and low is None)
    ):
        return walk.unary(x, Law.HOMOGENEOUS)
    return walk.unary(x, Law.GENERIC)


@RULES.op("aten.maximum", "aten.minimum", "aten.fmax", "aten.fmin")
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
    "aten.xlogy", "aten.frac", "aten.isfinite", "aten.logaddexp", "aten.atan2", "aten.erfc", "aten.acos",
    "aten.special_expit", "aten.special_log_ndtr", "aten.logical_xor", "aten.bitwise_xor", "aten.arccos",
    "aten.__rshift__", "aten.__lshift__", "aten.bitwise_left_shift", "aten.bitwise_right_shift",
    "aten.signbit", "aten.acosh", "aten.log10", "aten.digamma", "aten.lgamma", "aten.heaviside",
)  # fmt: skip
def generic(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """Entrywise, nothing but permutations is claimed."""
    return walk.pointwise([arg for arg in args if isinstance(arg, Value)], Law.GENERIC)


@RULES.op("aten.glu")
def glu(walk: Walk, node: Any, x: Value, dim: int = -1) -> Value:
    """y = a · σ(b) for the two halves a | b of an axis."""
    half = x.shape[dim] // 2
    value, gate = walk.slice(x, dim, 0, half), walk.slice(x, dim, half, 2 * half)
    return walk.product(value, walk.unary(gate, Law.GENERIC))


@RULES.op("aten.masked_fill")
def masked_fill(walk: Walk, node: Any, x: Value, mask: Value, fill: Any) -> Value:
    """Entries under the mask become a constant: with zero it is a product, else a shift."""
    if isinstance(fill, Value) and not fill.given:
        return walk.pointwise([x, mask, fill], Law.GENERIC)
    zero = fill.zero if isinstance(fill, Value) else float(fill) == 0.0
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
    values = [v for v in (x, y) if isinstance(v, Value)]
    if not mask.given:
        return walk.pointwise([mask, *values], Law.GENERIC)
    dead = [v for v in values if v.given]
    live = [v for v in values if not v.given]
    if len(live) == 2:
        return walk.pointwise([*live, mask], Law.SHIFT)
    zero = all(v.zero for v in dead) and all(float(v) == 0.0 for v in (x, y) if not isinstance(v, Value))
    if zero:
        return walk.pointwise([*live, mask, *dead], Law.PRODUCT, [1.0] * (2 + len(dead)))
    return walk.pointwise([*live, mask, *dead], Law.SHIFT)


@RULES.op("aten.zeros_like", "aten.zeros", "aten.new_zeros", even_given=True)
def zeros(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """Zeros transform as anything."""
    out = filled(walk, node)
    out.zero = True
    return out


@RULES.op("aten.ones_like", "aten.ones", "aten.new_ones", "aten.scalar_tensor", even_given=True)
def filled(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """One number in every entry; only the shape of the argument is used."""
    out = walk.given(tuple(int(n) for n in node.meta["val"].shape))
    walk.uniform.add(out.id)
    return out


@RULES.op("aten.full", "aten.full_like", "aten.new_full", even_given=True)
def full(walk: Walk, node: Any, x: Any, *args: Any, **kwargs: Any) -> Value:
    """The given number in every entry."""
    if any(isinstance(arg, Value) and not arg.given for arg in args):
        raise ValueError("filled with a number that depends on parameters")
    return filled(walk, node)


@RULES.op("aten.empty_like", "aten.new_empty", "aten.randn_like", "aten.rand_like")
def shaped(walk: Walk, node: Any, *args: Any, **kwargs: Any) -> Value:
    """Only the shape of the argument is used."""
    return walk.given(tuple(int(n) for n in node.meta["val"].shape))
