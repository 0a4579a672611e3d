"""What an operation reads of its inputs, beyond what its fact says."""

from __future__ import annotations

from regauge.facts import (
    AlignPermutation,
    Center,
    Concat,
    Contract,
    Fact,
    Law,
    Normalise,
    Pointwise,
    Reduce,
    Remap,
    Rotary,
    Stop,
    Value,
)
from regauge.solve.layout import Block, Layout

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose1d",
                "aten.conv_transpose2d", "aten.conv_transpose3d")  # fmt: skip
MASKING = ("aten.masked_fill", "aten.masked_fill_", "aten.where")
"""Operations whose SHIFT replaces entries instead of adding to them."""
UNEVEN = ("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad1d", "aten.reflection_pad2d",
          "aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad2d",
          "aten.replication_pad3d", "aten.im2col")  # fmt: skip
"""Rearrangements that do not keep a tensor constant along the (data) axes they touch."""
PLAIN_SUMS = ("aten.sum", "aten.mean", "aten.var_mean", "aten.std_mean", "aten.avg_pool1d",
              "aten.avg_pool2d", "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d",
              "aten._adaptive_avg_pool2d")  # fmt: skip
"""Reductions whose weights do not vary along the axes they keep."""
PARTIAL = ("aten.log", "aten.log2", "aten.log10", "aten.log1p", "aten.logit", "aten.acos", "aten.arccos",
           "aten.asin", "aten.arcsin", "aten.acosh", "aten.atanh", "aten.erfinv", "aten.xlogy", "aten.pow",
           "aten.lgamma", "aten.digamma")  # fmt: skip
"""Functions without a value on a whole range of numbers: a change into it is not invisible."""


def defined_everywhere(fact: Pointwise, k: int) -> bool:
    """Does the function keep a value under (almost) any change of its argument ``k``?"""
    if fact.law is Law.POWER:
        return fact.exponents[k] == int(fact.exponents[k])
    return fact.op not in PARTIAL


def sources(fact: Fact) -> tuple[Value, ...]:
    """The values a fact reads."""
    if isinstance(fact, (Pointwise, Concat)):
        return tuple(dict.fromkeys(fact.ins))
    if isinstance(fact, Contract):
        return (fact.a,) if fact.a is fact.b else (fact.a, fact.b)
    if isinstance(fact, (Remap, Reduce, Center, Normalise, Rotary)):
        return (fact.inp,)
    if isinstance(fact, AlignPermutation):
        return (fact.b,)
    if isinstance(fact, Stop):
        return (fact.value,)
    raise TypeError(f"unknown fact {type(fact).__name__}")


def shows(layout: Layout, fact: Remap, block: Block) -> bool:
    """Does the output of a rearrangement hold any entry of this block of its input?"""
    for link in fact.links:
        if len(link.src) != 1 or len(link.dst) != 1:
            continue
        axis = link.src[0]
        length = fact.out.shape[link.dst[0]]
        if length == fact.inp.shape[axis] or len(layout.pieces(fact.inp, axis)) == 1:
            continue
        position = block.offsets[axis] - link.start
        if position % link.step or not 0 <= position < length * link.step:
            return False
    return True
