"""By which power of a parameter's scale every operation scales its result: one small rule each.

A rule is called for one parameter at a time, as ``rule(state, node, key, *args)``, with :class:`Arg` in
place of tensors, and only if one of them scales. It gives the tag of the result, None if the result does not
scale, a list for several results; or raises ``Mixed``. An operation without a rule scales nothing it can
answer for: whatever reaches it is not invariant, unless it does not scale any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import fx

from regauge.interpret import op_name
from regauge.optim.degrees import Arg, Degrees, Key, Mixed, Tag, padded

GUARD = 1e-2
"""The largest number that is taken for a guard against division by zero when it is added to squares."""

Result = Tag | None | list[Tag | None]
Rule = Callable[..., Result]
DEGREE_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        for name in names:
            if name in DEGREE_RULES:
                raise ValueError(f"two rules for {name}")
            DEGREE_RULES[name] = function
        return function

    return add


def shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(int(n) for n in (value[0] if isinstance(value, (list, tuple)) else value).shape)


def only_first(node: fx.Node, tag: Tag | None) -> Result:
    """Of several results only the first may be used."""
    if not isinstance(node.meta["val"], (list, tuple)):
        return tag
    if any(user.users and int(user.args[1]) > 0 for user in node.users):  # type: ignore[arg-type]
        raise Mixed("another result of the operation is used")
    return [tag, *[None] * (len(node.meta["val"]) - 1)]


@rule("getitem")
def _getitem(s: Degrees, node: fx.Node, key: Key, items: list[Tag | None], index: int) -> Result:
    return items[index]


# --- entry by entry -----------------------------------------------------------------------------------


@rule("aten.contiguous", "aten.clone", "aten.alias", "aten.detach", "aten.to", "aten._to_copy",
      "aten.type_as", "aten.lift_fresh_copy", "aten.positive", "aten.dropout", "aten.native_dropout",
      "aten.feature_dropout")  # fmt: skip
def _same(s: Degrees, node: fx.Node, key: Key, x: Arg, *rest: Any) -> Result:
    """y = x; dropout multiplies by numbers that do not scale."""
    value = node.meta["val"]
    if not isinstance(value, (list, tuple)) and not (value.is_floating_point() or value.is_complex()):
        raise Mixed("rounded to integers")
    return only_first(node, x.tag)


@rule("aten.relu", "aten.leaky_relu", "aten.abs", "aten.neg", "aten.relu_")
def _homogeneous(s: Degrees, node: fx.Node, key: Key, x: Arg, *rest: Any) -> Result:
    """f(s x) = s f(x) for s > 0."""
    return s.plain(x)


@rule("aten.prelu")
def _prelu(s: Degrees, node: fx.Node, key: Key, x: Arg, slope: Arg) -> Result:
    """Homogeneous in x; not in its slope."""
    if slope.tag is not None:
        raise Mixed("the slope scales half of the entries")
    return s.plain(x)


@rule("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.threshold")
def _clamp(s: Degrees, node: fx.Node, key: Key, x: Arg, low: Any = None, high: Any = None) -> Result:
    """Homogeneous with bounds of zero; a small lower bound of a length is a guard."""
    name = op_name(node)
    if name == "aten.clamp_max":
        low, high = None, low
    if name == "aten.threshold":
        return s.plain(x) if low == 0 and high == 0 else _refuse()
    if isinstance(low, (int, float)) and 0 < low <= GUARD and high is None and x.node in s.squares:
        s.guards.add(node)
        return s.plain(x)
    return s.plain(x) if {low, high} <= {0, None} else _refuse()


def _refuse(reason: str = "not homogeneous") -> Result:
    raise Mixed(reason)


@rule("aten.pow", "aten.square", "aten.sqrt", "aten.rsqrt", "aten.reciprocal")
def _power(s: Degrees, node: fx.Node, key: Key, x: Any, p: Any = None) -> Result:
    """(s x) ** p = s ** p · x ** p."""
    powers = {"aten.square": 2, "aten.sqrt": 0.5, "aten.rsqrt": -0.5, "aten.reciprocal": -1}
    power = powers.get(op_name(node), p)
    if not isinstance(x, Arg) or not isinstance(power, (int, float)):
        raise Mixed("a power that is no number")
    tag = s.plain(x)
    return replace(tag, degree=tag.degree * Fraction(power).limit_denominator(10**6)) if power else None


@rule("aten.mul", "aten.multiply", "aten.div", "aten.true_divide", "aten.divide")
def _product(s: Degrees, node: fx.Node, key: Key, x: Any, y: Any) -> Result:
    """Degrees add; those of a divisor count negative."""
    rank = len(shape_of(node))
    tags = [padded(s.plain(a), rank) if isinstance(a, Arg) and a.tag is not None else None for a in (x, y)]
    if "div" in op_name(node) and tags[1] is not None:
        tags[1] = replace(tags[1], degree=-tags[1].degree)
    return s.product(key, *tags)


@rule("aten.add", "aten.sub", "aten.rsub")
def _sum(s: Degrees, node: fx.Node, key: Key, x: Any, y: Any, *rest: Any) -> Result:
    """Summands scale alike; or one does not, and is constant along some axes: then it is an offset."""
    rank = len(shape_of(node))
    found = [a for a in (x, y) if isinstance(a, Arg) and a.tag is not None]
    tags = [padded(a.tag, rank) for a in found if a.tag is not None]
    if len(tags) == 2:
        return s.same(key, tags)
    other = y if found[0] is x else x
    if not isinstance(other, Arg):
        if other == 0 or (op_name(node) == "aten.add" and _guards(s, node, found[0], other)):
            return tags[0]
        raise Mixed("a constant is added")
    lead = rank - other.rank
    flat = {i for i in range(rank) if i < lead or other.shape[i - lead] == 1}
    return with_offset(tags[0], frozenset(flat))


def _guards(s: Degrees, node: fx.Node, x: Arg, number: Any) -> bool:
    small = isinstance(number, (int, float)) and 0 < number <= GUARD and x.node in s.squares
    if small:
        s.guards.add(node)
    return small


def with_offset(tag: Tag, flat: frozenset[int]) -> Tag:
    flat = flat if tag.offset is None else flat & tag.offset
    if not flat:
        raise Mixed("a sum of what scales and what does not")
    return replace(tag, offset=flat)


@rule("aten.masked_fill", "aten.where")
def _chosen(s: Degrees, node: fx.Node, key: Key, *args: Any) -> Result:
    """Zeros in some places scale as anything."""
    if op_name(node) == "aten.where":
        mask, *values = args
    else:
        values, mask = [args[0], args[2]], args[1]
    rank = len(shape_of(node))
    tags = [padded(s.plain(v), rank) for v in values if isinstance(v, Arg) and v.tag is not None]
    rest = [v for v in values if not (isinstance(v, Arg) and v.tag is not None)]
    if mask.tag is not None or any(isinstance(v, Arg) or v != 0 for v in rest):
        raise Mixed("some entries are replaced")
    return s.same(key, tags)


# --- what is known never to be negative ---------------------------------------------------------------

_LENGTHS = ("aten.square", "aten.abs", "aten.var", "aten.std", "aten.linalg_vector_norm", "aten.norm")
_KEEPS = ("aten.mean", "aten.sum", "aten.sqrt", "aten.to", "aten._to_copy", "aten.clamp_min",
          "aten.clamp", "aten.view", "aten.unsqueeze", "aten.reshape", "aten.expand",
          "aten.amax", "aten.clone", "aten.expand_as")  # fmt: skip


def note_squares(s: Degrees, node: fx.Node) -> None:
    """Remember operations whose values are squares, lengths, or sums of them."""
    name, args = op_name(node), node.args
    even = name == "aten.pow" and isinstance(args[1], (int, float)) and float(args[1]) % 2 == 0
    squared = name in ("aten.mul", "aten.multiply") and args[0] is args[1]
    if name in _LENGTHS or even or squared or (name in _KEEPS and args[0] in s.squares) or node in s.guards:
        s.squares.add(node)
    if name == "getitem" and args[1] == 0 and op_name(args[0]) == "aten.var_mean":  # type: ignore[arg-type]
        s.squares.add(node)
