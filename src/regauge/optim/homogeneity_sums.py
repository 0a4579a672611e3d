"""The same for sums of products, and for norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from regauge.interpret import op_name
from regauge.optim.degrees import Arg, Degrees, Key, Mixed, Tag, placed
from regauge.optim.homogeneity import Result, only_first, rule, shape_of, with_offset

# --- sums of products ---------------------------------------------------------------------------------


def contract(s: Degrees, key: Key, a: Arg, b: Arg, la: Sequence[str], lb: Sequence[str],
             out: Sequence[str]) -> Tag | None:  # fmt: skip
    """out = Σ a b: what is summed over scales as one in both."""
    tags: list[Tag | None] = []
    for arg, letters in ((a, la), (b, lb)):
        if arg.tag is None:
            tags.append(None)
            continue
        tag = s.merge(key, s.plain(arg), [i for i, letter in enumerate(letters) if letter not in out])
        tags.append(Tag(placed(tag.units, letters, out), tag.degree))
    return s.product(key, *tags)


def biased(tag: Tag | None, bias: Arg | None, rank: int, axis: int) -> Tag | None:
    """A vector along one axis is added."""
    if bias is None:
        return tag
    if bias.tag is not None:
        raise Mixed("is added to what does not scale")
    return None if tag is None else with_offset(tag, frozenset(range(rank)) - {axis % rank})


@rule("aten.linear")
def _linear(s: Degrees, node: fx.Node, key: Key, x: Arg, w: Arg, b: Arg | None = None) -> Result:
    lead = [f"b{i}" for i in range(x.rank - 1)]
    out = [*lead, "o"] if w.rank == 2 else lead
    tag = contract(s, key, x, w, [*lead, "i"], ["o", "i"] if w.rank == 2 else ["i"], out)
    return biased(tag, b, len(out), -1)


@rule("aten.mm", "aten.matmul", "aten.bmm", "aten.mv", "aten.dot")
def _matmul(s: Degrees, node: fx.Node, key: Key, a: Arg, b: Arg) -> Result:
    la = ["k"] if a.rank == 1 else ["i", "k"]
    lb = ["k"] if b.rank == 1 else ["k", "j"]
    depth = max(a.rank, b.rank, 2) - 2
    names = [f"b{i}" for i in range(depth)]
    out = [*names, *[letter for letter in (*la, *lb) if letter != "k"]]
    lead = [names[depth - max(x.rank - 2, 0) :] for x in (a, b)]
    return contract(s, key, a, b, [*lead[0], *la], [*lead[1], *lb], out)


@rule("aten.addmm")
def _addmm(s: Degrees, node: fx.Node, key: Key, bias: Arg, a: Arg, b: Arg, *rest: Any) -> Result:
    tag = contract(s, key, a, b, ["i", "k"], ["k", "j"], ["i", "j"])
    if bias.rank != 1:
        raise Mixed("a matrix is added")
    return biased(tag, bias, 2, 1)


@rule("aten.einsum")
def _einsum(s: Degrees, node: fx.Node, key: Key, equation: str, operands: list[Arg]) -> Result:
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != 2 or any(len(set(t)) < len(t) for t in terms):
        raise Mixed("einsum of another form than two operands and plain letters")
    return contract(s, key, operands[0], operands[1], list(terms[0]), list(terms[1]), list(out))


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose1d",
      "aten.conv_transpose2d")  # fmt: skip
def _convolution(s: Degrees, node: fx.Node, key: Key, x: Arg, w: Arg, b: Arg | None = None,
                 *rest: Any) -> Result:  # fmt: skip
    """Output channels scale with the rows of the kernel; positions and what is summed over as one."""
    name = op_name(node)
    transposed = "transpose" in name or (name == "aten.convolution" and bool(rest[3]))
    place = 5 if name == "aten.convolution" else 3
    groups = int(rest[place]) if len(rest) > place else 1
    if x.rank != w.rank:
        raise Mixed("a convolution without a batch axis")
    channels = shape_of(node)[1]
    tags: list[Tag | None] = [None, None]
    if x.tag is not None:
        tag = s.merge(key, s.plain(x), range(2, x.rank))
        if groups == 1 or tag.units.shape[1] == 1:
            tags[0] = s.merge(key, tag, [1])
        else:
            split = tag.units.reshape(tag.units.shape[0], groups, -1)
            merged = s.merge(key, Tag(split), [2]).units.repeat_interleave(channels // groups, 1)
            tags[0] = Tag(merged.reshape(-1, channels, *[1] * (x.rank - 2)), tag.degree)
    if w.tag is not None:
        axis = 1 if transposed else 0
        over = [i for i in range(w.rank) if i != axis] + ([1] if transposed and groups > 1 else [])
        tag = s.merge(key, s.plain(w), over)
        tags[1] = Tag(tag.units.reshape(1, -1, *[1] * (w.rank - 2)), tag.degree)
    return biased(s.product(key, *tags), b, x.rank, 1)


@rule("aten.scaled_dot_product_attention")
def _attention(s: Degrees, node: fx.Node, key: Key, q: Arg, k: Arg, v: Arg, *rest: Any) -> Result:
    """Linear in the values; not homogeneous in the rest."""
    if any(isinstance(a, Arg) and a.tag is not None for a in (q, k, *rest)):
        raise Mixed("passes through a softmax")
    tag = s.merge(key, s.plain(v), [v.rank - 2])
    heads = shape_of(node)[-3] if v.rank > 2 else 1
    units = tag.units
    if v.rank > 2 and units.shape[-3] not in (1, heads):
        units = units.repeat_interleave(heads // units.shape[-3], -3)
    return Tag(units, tag.degree)


# --- norms --------------------------------------------------------------------------------------------


def standardised(s: Degrees, key: Key, x: Arg, axes: Sequence[int], *, centred: bool) -> None:
    """What is divided by its length over these axes does not scale with them; a mean that is subtracted
    takes with it every summand that is constant along the axes."""
    if x.tag is None:
        return
    tag = x.tag
    if tag.offset is not None and not (centred and set(axes) <= tag.offset):
        raise Mixed("a sum of what scales and what does not")
    s.merge(key, tag, axes)


def affine(s: Degrees, key: Key, rank: int, axes: Sequence[int], gain: Arg | None,
           bias: Arg | None) -> Tag | None:  # fmt: skip
    """A gain, and a bias, along some axes of a value that does not scale."""
    tag: Tag | None = None
    if gain is not None and gain.tag is not None:
        held = s.plain(gain)
        sizes = iter(held.units.shape)
        tag = Tag(held.units.reshape([next(sizes) if i in axes else 1 for i in range(rank)]), held.degree)
    if bias is None:
        return tag
    if bias.tag is not None:
        raise Mixed("is added to what does not scale")
    return None if tag is None else with_offset(tag, frozenset(range(rank)) - set(axes))


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def _layer_norm(s: Degrees, node: fx.Node, key: Key, x: Arg, shape: Sequence[int], gain: Arg | None = None,
                bias: Any = None, *rest: Any) -> Result:  # fmt: skip
    axes = list(range(x.rank - len(shape), x.rank))
    centred = "layer_norm" in op_name(node)
    standardised(s, key, x, axes, centred=centred)
    return only_first(node, affine(s, key, x.rank, axes, gain, bias if centred else None))


@rule("aten.group_norm")
def _group_norm(s: Degrees, node: fx.Node, key: Key, x: Arg, groups: int, gain: Arg | None = None,
                bias: Arg | None = None, *rest: Any) -> Result:  # fmt: skip
    if x.tag is not None:
        tag = s.plain(x)
        units = tag.units.expand(-1, x.shape[1], *tag.units.shape[2:])
        wide = units.reshape(units.shape[0], groups, -1, *units.shape[2:])
        s.merge(key, Tag(wide), range(2, wide.dim()))
    return affine(s, key, x.rank, [1], gain, bias)


@rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm")
def _batch_norm(s: Degrees, node: fx.Node, key: Key, x: Arg, gain: Arg | None, bias: Arg | None,
                mean: Arg | None, var: Arg | None, *rest: Any) -> Result:  # fmt: skip
    """Over the batch and positions, or positions alone; with stored statistics not homogeneous in x."""
    single = op_name(node) == "aten.instance_norm"
    stored = not bool(rest[0]) if single else (not s.batch_training and mean is not None)
    if x.tag is not None and stored and mean is not None:
        raise Mixed("a batch norm with stored statistics")
    standardised(s, key, x, [*([] if single else [0]), *range(2, x.rank)], centred=True)
    return only_first(node, affine(s, key, x.rank, [1], gain, bias))


@rule("aten._weight_norm", "aten._weight_norm_interface")
def _weight_norm(s: Degrees, node: fx.Node, key: Key, v: Arg, g: Arg, dim: int = 0) -> Result:
    standardised(s, key, v, [i for i in range(v.rank) if i != dim % v.rank], centred=False)
    return only_first(node, None if g.tag is None else s.plain(g))
