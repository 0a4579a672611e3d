"""Abstract values, and the state of one walk that makes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch._ops import OpOverload

from regauge.atlas import Refusal
from regauge.atoms import Atom, Axis
from regauge.facts import Fact, Facts, Stop, Value
from regauge.structure import Structure
from regauge.trace import Trace, module_path


class Abstract:
    """State of one walk, beneath the primitives that rules are written in.

    Every primitive returns new values, unifies the index structure of the axes it aligns, and
    records one fact. ``None`` stands for a Python scalar where a value may stand.
    """

    def __init__(self, trace: Trace, untied: bool = False) -> None:
        self.trace = trace
        self.untied = untied
        self.result = Facts()
        self.refusals: list[Refusal] = []
        self.node: fx.Node | None = None
        self.structure = Structure(self.on_rigid)
        self.selections: dict[tuple[int, int, int, int], Atom] = {}
        self.orders: dict[int, int] = {}
        self.uniform: set[int] = set()
        self.repeated: dict[int, Value] = {}

    def on_rigid(self, reason: str) -> None:
        self.refusals.append(Refusal(self.name, self.module, f"{self.op}: {reason}"))

    @property
    def name(self) -> str:
        return self.node.name if self.node is not None else ""

    @property
    def module(self) -> str:
        return module_path(self.node) if self.node is not None else ""

    @property
    def op(self) -> str:
        return op_name(self.node) if self.node is not None else ""

    @property
    def where(self) -> tuple[str, str, str]:
        return self.name, self.module, self.op

    def value(self, axes: list[Axis], given: bool = False) -> Value:
        value = Value(len(self.result.values), axes, self.name, self.module, given)
        self.result.values.append(value)
        return value

    def given(self, shape: Sequence[int]) -> Value:
        return self.value([self.structure.axis(n, True) for n in shape], given=True)

    def record(self, fact: Fact) -> None:
        self.result.facts.append(fact)

    def use(self, *values: Value) -> None:
        """Read values by their entries: materialise the deferred fact of a product; indices that
        were selected from an axis and are computed with stop that axis."""
        for value in values:
            self.materialise(value)
            if value.range_of is not None:
                source, axis = value.range_of
                self.record(Stop(*self.where, source, "its selected indices are computed with", (axis,)))

    def materialise(self, value: Value) -> None:
        if value.pending is not None:
            fact, value.pending = value.pending, None
            self.record(fact)

    def consume(self, index: Value, reason: str) -> None:
        """Indices taken from a live value by a rule: their own axes and scales are stopped."""
        if not index.given:
            self.materialise(index)
            self.record(Stop(*self.where, index, reason))

    def order(self, index: Value) -> int:
        """Two values of indices with the same number hold the same entries in the same order."""
        return self.orders.setdefault(index.id, index.id)

    def parameter(self, name: str, chart: float = 0.0) -> Value:
        key = (name, chart)
        if key not in self.result.parameters:
            if chart:
                axes = self.parameter(name).axes
            else:
                axes = [self.structure.axis(n) for n in self._shape(name)]
            value = self.value(axes)
            value.parameter, value.chart = name, chart
            value.module = name
            self.result.parameters[key] = value
        return self.result.parameters[key]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.trace.shapes[self.trace.canonical[name]]

    def align(self, first: Axis, second: Axis) -> Axis:
        """Unify two axes; where one is data, prefer one that remembers what it selects."""
        if self.structure.is_data(first) and self.structure.is_data(second):
            return second if _selects(second) and not _selects(first) else first
        if _selects(first) or _selects(second):
            self.structure.rigid(second if _selects(first) else first)
            return first if _selects(first) else second
        self.structure.unify(first, second)
        return first


def op_name(node: fx.Node) -> str:
    """``aten.add`` for every overload of it; other targets by their own name."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def _selects(axis: Axis) -> bool:
    return any(isinstance(atom, Selection) for atom in axis)


class Selection(Atom):
    """Data that says which index of another axis was chosen (the experts of a token)."""

    __slots__ = ("stands_for",)

    def __init__(self, id: int, size: int, stands_for: Axis) -> None:
        super().__init__(id, size, True)
        self.stands_for = stands_for
