"""What is zero because some parameters are: forwards through the facts, and backwards to such parameters.

    0 · x = 0,   0 + 0 = 0,   Σ 0 = 0,   f(0) = 0 for f odd or positively homogeneous

for finite x. Values that could stop being finite because something is zero (1/0) are followed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from torch import fx

from regauge.abstract import op_name
from regauge.facts import (
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
    Value,
)
from regauge.walk import Walk

_KEEPS_ZERO = (Law.SUM, Law.HOMOGENEOUS, Law.ABSOLUTE, Law.ODD)
_POSITIVE = ("aten.add", "aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm", "aten.native_layer_norm")


_Choice = tuple[int, Mapping[str, float]]
"""Number of operations to the furthest parameter, and the parameters with what they must hold."""


class State(Enum):
    """What is known of a value."""

    ZERO = "zero in every entry"
    FINITE = "as finite as in the model before"
    WILD = "perhaps not finite: a function with a pole was taken of zeros"


class Zeros:
    """Which values of a walk are zero.

    Args:
        walk: facts of a traced model.
    """

    def __init__(self, walk: Walk) -> None:
        self._values = walk.result.values
        self._facts: dict[int, Fact] = {}
        self._nodes = {node.name: node for node in walk.trace.graph.nodes}
        for fact in walk.result.facts:
            out = getattr(fact, "out", None)
            if isinstance(out, Value):
                self._facts[out.id] = fact
        for value in self._values:
            if value.pending is not None:
                self._facts.setdefault(value.id, value.pending)

    def forward(self, stored: Mapping[str, float]) -> dict[int, State]:
        """Value id -> state, when these parameters hold these constants in every entry.

        A parameter that is read as p + c (a gain stored as w, read as 1 + w) is zero if it holds −c.
        """
        states: dict[int, State] = {}
        for value in self._values:
            if value.parameter is not None:
                zero = stored.get(value.parameter) == -value.chart
            elif value.given:
                zero = value.zero
            else:
                fact = self._facts.get(value.id)
                states[value.id] = State.FINITE if fact is None else self._state(fact, states)
                continue
            states[value.id] = State.ZERO if zero else State.FINITE
        return states

    def _state(self, fact: Fact, states: Mapping[int, State]) -> State:
        def of(value: Value) -> State:
            return states.get(value.id, State.FINITE)

        if isinstance(fact, Pointwise):
            return self._pointwise(fact, [of(value) for value in fact.ins])
        if isinstance(fact, Contract):
            return _product([of(fact.a), of(fact.b)])
        if isinstance(fact, Concat):
            return _all([of(value) for value in fact.ins])
        if isinstance(fact, Reduce):
            state = of(fact.inp)
            return state if fact.law in (Law.SUM, Law.HOMOGENEOUS) else _poles([state])
        if isinstance(fact, Normalise):  # softmax of zeros is 1/n
            return State.WILD if of(fact.inp) is State.WILD else State.FINITE
        if isinstance(fact, (Remap, Center, Rotary)):
            return of(fact.inp)
        return State.FINITE

    def _pointwise(self, fact: Pointwise, ins: list[State]) -> State:
        if fact.law is Law.PRODUCT:
            poles = [s for s, e in zip(ins, fact.exponents, strict=True) if e < 0]
            return State.WILD if State.ZERO in poles else _product(ins)
        if fact.law is Law.POWER:
            return ins[0] if fact.exponents[0] > 0 else _poles(ins)
        if fact.law in _KEEPS_ZERO:
            return _all(ins)
        if fact.law is Law.EVEN or (fact.law is Law.SHIFT and self._adds_positive(fact.node)):
            return State.WILD if State.WILD in ins else State.FINITE
        return _poles(ins)

    def _adds_positive(self, name: str) -> bool:
        """0 + c > 0: the constant of this operation is positive, or the eps of a norm that has one."""
        node = self._nodes.get(name)
        if node is None or op_name(node) not in _POSITIVE:
            return False
        given = [*node.args, *node.kwargs.values()]
        numbers = [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool)]
        return all(x > 0 for x in numbers)

    def writers(self, value: Value, own: frozenset[str], nodes: frozenset[str]) -> dict[str, float] | None:
        """The last parameters on the way to a value which make it zero: parameter -> what it must hold.

        Every term of a sum must be zero, and one factor of a product: the one that needs the fewest
        operations to be zero, so that the gain behind a norm is taken, not the map before it.

        Args:
            value: of the walk.
            own: parameters that may be changed.
            nodes: names of the operations that may be followed back.

        Returns:
            None if no choice of these parameters makes it zero by rule.
        """
        found = self._writers(value, own, nodes, {})
        return None if found is None else dict(found[1])

    def _writers(
        self, value: Value, own: frozenset[str], nodes: frozenset[str], known: dict[int, _Choice | None]
    ) -> _Choice | None:
        if value.parameter is not None:
            return (0, {value.parameter: 0.0 - value.chart}) if value.parameter in own else None
        if value.given:
            return (0, {}) if value.zero else None
        if value.id not in known:
            known[value.id] = None
            terms, factors = self._parts(value, nodes)
            parts = [self._writers(part, own, nodes, known) for part in (*terms, *factors)]
            found = _joined(parts) if terms else min(filter(None, parts), key=_steps, default=None)
            known[value.id] = None if found is None else (found[0] + 1, found[1])
        return known[value.id]

    def _parts(self, value: Value, nodes: frozenset[str]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        """(values that must all be zero, values of which one must be) for this one to be zero."""
        fact = self._facts.get(value.id)
        if fact is None or fact.node not in nodes:
            return (), ()
        if isinstance(fact, Contract):
            return (), (fact.b, fact.a)
        if isinstance(fact, Pointwise):
            if fact.law is Law.PRODUCT:
                return (), tuple(v for v, e in zip(fact.ins, fact.exponents, strict=True) if e > 0)
            power = fact.law is Law.POWER and fact.exponents[0] > 0
            return (fact.ins if power or fact.law in _KEEPS_ZERO else ()), ()
        if isinstance(fact, Concat):
            return fact.ins, ()
        if isinstance(fact, Reduce):
            return ((fact.inp,) if fact.law in (Law.SUM, Law.HOMOGENEOUS) else ()), ()
        return ((fact.inp,) if isinstance(fact, (Remap, Center, Rotary)) else ()), ()


def sums(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The terms of y = a + b, both tensors, neither multiplied by anything."""
    if op_name(node) != "aten.add" or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def reshaped(node: fx.Node) -> fx.Node | None:
    """What a node is but for its shape: the same entries in the same (row-major) order."""
    if op_name(node) not in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten"):
        return None
    source = node.args[0]
    same = isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype
    return source if same else None  # type: ignore[return-value]


def _product(ins: list[State]) -> State:
    if State.WILD in ins:
        return State.WILD
    return State.ZERO if State.ZERO in ins else State.FINITE


def _all(ins: list[State]) -> State:
    if State.WILD in ins:
        return State.WILD
    return State.ZERO if all(state is State.ZERO for state in ins) else State.FINITE


def _poles(ins: list[State]) -> State:
    return State.FINITE if all(state is State.FINITE for state in ins) else State.WILD


def _joined(parts: list[_Choice | None]) -> _Choice | None:
    steps, result = 0, dict[str, float]()
    for part in parts:
        if part is None or any(result.get(name, held) != held for name, held in part[1].items()):
            return None
        steps, result = max(steps, part[0]), {**result, **part[1]}
    return steps, result


def _steps(choice: _Choice) -> int:
    return choice[0]
