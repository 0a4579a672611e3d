"""What the walk over the graph records: abstract values, and facts that relate their axes.

A fact says how one value depends on others, axis by axis. The solvers in :mod:`regauge.solve` read
facts; the rules in :mod:`regauge.rules` write them. Neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from regauge.atoms import Atom, Axis, total


class Law(StrEnum):
    """How a pointwise function treats scales and signs of its argument."""

    SUM = "sum"  # y = x1 + x2 + ...
    PRODUCT = "product"  # y = prod x_i ** e_i, e_i = +1 or -1
    POWER = "power"  # y = x ** p
    HOMOGENEOUS = "homogeneous"  # f(s x) = s f(x) for s > 0
    ABSOLUTE = "absolute"  # homogeneous and even
    ODD = "odd"  # f(-x) = -f(x)
    EVEN = "even"  # f(-x) = f(x)
    GENERIC = "generic"
    SHIFT = "shift"  # y = x + constant that no parameter changes


class Value:
    """An abstract tensor: its axes, and where it came from.

    ``given`` values (inputs, buffers, anything computed from them alone) never change; all their
    axes are data. ``parameter`` names the state-dict entry a value is, ``chart`` the constant that
    was added to it. ``varies``: a given value that depends on the inputs, not on constants alone.
    """

    __slots__ = (
        "axes",
        "chart",
        "given",
        "id",
        "mean_of",
        "module",
        "node",
        "normalised",
        "parameter",
        "pending",
        "product_of",
        "range_of",
        "varies",
        "zero",
    )

    def __init__(self, id: int, axes: list[Axis], node: str, module: str, given: bool = False) -> None:
        self.id = id
        self.axes = axes
        self.node = node
        self.module = module
        self.given = given
        self.parameter: str | None = None
        self.chart = 0.0
        self.pending: Fact | None = None
        self.product_of: tuple[Value, Value] | None = None
        self.mean_of: tuple[Value, tuple[int, ...]] | None = None
        self.normalised: int | None = None
        self.range_of: tuple[Value, int] | None = None
        self.zero = False
        self.varies = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(total(axis) for axis in self.axes)

    @property
    def rank(self) -> int:
        return len(self.axes)


@dataclass(slots=True)
class Fact:
    node: str
    module: str
    op: str


@dataclass(slots=True)
class Pointwise(Fact):
    """``out[i] = f(ins[..., i, ...])`` elementwise; ``maps[k][j]`` is the axis of ``ins[k]`` that
    axis ``j`` of ``out`` reads, or None where ``ins[k]`` is broadcast along it.

    ``fixed`` lists the axes of ``out`` along which a given tensor took part.
    """

    out: Value
    ins: tuple[Value, ...]
    maps: tuple[tuple[int | None, ...], ...]
    law: Law
    exponents: tuple[float, ...] = ()
    fixed: tuple[int, ...] = ()


@dataclass(slots=True)
class Link:
    """Positions of ``dst`` axes of the output are positions ``start + step * i`` of ``src`` axes.

    If it ``picks``, they are positions that an index names: any number of times each, in any order.
    """

    src: tuple[int, ...]
    dst: tuple[int, ...]
    start: int = 0
    step: int = 1
    picks: bool = False


@dataclass(slots=True)
class Remap(Fact):
    """``out`` holds entries of ``inp`` in another arrangement. Output axes in no link are repeats;
    input axes in no link have size one or are data that the input selects from."""

    out: Value
    inp: Value
    links: tuple[Link, ...]


@dataclass(slots=True)
class Concat(Fact):
    out: Value
    ins: tuple[Value, ...]
    axis: int


@dataclass(slots=True)
class Contract(Fact):
    """``out[lo] = sum a[la] * b[lb]``: einsum with one letter for each axis. ``b`` may be ``a``."""

    out: Value
    a: Value
    b: Value
    la: tuple[str, ...]
    lb: tuple[str, ...]
    lo: tuple[str, ...]


@dataclass(slots=True)
class Reduce(Fact):
    """``out = reduce(inp)`` over axes; ``keep`` pairs (input axis, output axis) of the survivors."""

    out: Value
    inp: Value
    keep: tuple[tuple[int, int], ...]
    over: tuple[int, ...]
    law: Law  # SUM, HOMOGENEOUS or GENERIC


@dataclass(slots=True)
class Center(Fact):
    """``out = inp - mean(inp, over)``."""

    out: Value
    inp: Value
    over: tuple[int, ...]


@dataclass(slots=True)
class Normalise(Fact):
    """``out = softmax(inp, axis)``: unchanged by a constant added along the axis; sums to one."""

    out: Value
    inp: Value
    axis: int


@dataclass(slots=True)
class Rotary(Fact):
    """``out`` rotates each pair of ``inp``; ``axis`` holds the pair factor ``two`` and the
    frequencies. Every pair is multiplied by a complex number that no parameter changes."""

    out: Value
    inp: Value
    axis: int
    two: Atom
    pairs: Axis


@dataclass(slots=True)
class AlignPermutation(Fact):
    """A permutation of ``a`` along ``axis_a`` is the same permutation of ``b`` along ``axis_b``."""

    a: Value
    axis_a: int
    b: Value
    axis_b: int


@dataclass(slots=True)
class Stop(Fact):
    """Nothing passes: every kind is stopped on the axes (all axes if None)."""

    value: Value
    reason: str
    axes: tuple[int, ...] | None = None
    whole: bool = True  # also stop scales of the whole tensor


@dataclass(slots=True)
class Facts:
    """The result of a walk."""

    values: list[Value] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    parameters: dict[tuple[str, float], Value] = field(default_factory=dict)


def used_values(facts: Facts) -> frozenset[int]:
    """Ids of the values that some fact reads."""
    used: set[int] = set()
    for fact in facts.facts:
        for slot in ("ins", "inp", "a", "b", "value"):
            item = getattr(fact, slot, ())
            for value in item if isinstance(item, tuple) else (item,):
                if isinstance(value, Value):
                    used.add(value.id)
    return frozenset(used)
