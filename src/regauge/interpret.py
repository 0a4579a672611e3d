"""The walk: run the traced graph over abstract values, one small rule per operation.

An operation without a rule makes every axis it touches rigid and leaves a refusal. Nothing is
guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from regauge.atlas import Refusal
from regauge.errors import RegaugeError, TraceError
from regauge.facts import (
    Center,
    Concat,
    Contract,
    Fact,
    Facts,
    Law,
    Link,
    Normalise,
    Pointwise,
    Reduce,
    Remap,
    Stop,
    Value,
)
from regauge.structure import Atom, Axis, Conflict, Group, Structure, total
from regauge.trace import Trace, module_path, role

Rule = Callable[..., Any]


class Walk:
    """State of one walk, and the primitives that rules are written in.

    Every primitive returns new values, unifies the index structure of the axes it aligns, and
    records one fact. ``None`` stands for a Python scalar where a value may stand.
    """

    def __init__(self, trace: Trace, untied: bool = False) -> None:
        self.trace = trace
        self.untied = untied
        self.result = Facts()
        self.refusals: list[Refusal] = []
        self.node: fx.Node | None = None
        self.structure = Structure(self._on_rigid)
        self.selections: dict[tuple[int, int, int, int], Atom] = {}
        self.orders: dict[int, int] = {}
        self.uniform: set[int] = set()
        self.repeated: dict[int, Value] = {}

    # --- bookkeeping ---------------------------------------------------------------------------

    def _on_rigid(self, reason: str) -> None:
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
            self._materialise(value)
            if value.range_of is not None:
                source, axis = value.range_of
                self.record(Stop(*self.where, source, "its selected indices are computed with", (axis,)))

    def _materialise(self, value: Value) -> None:
        if value.pending is not None:
            fact, value.pending = value.pending, None
            self.record(fact)

    def consume(self, index: Value, reason: str) -> None:
        """Indices taken from a live value by a rule: their own axes and scales are stopped."""
        if not index.given:
            self._materialise(index)
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

    # --- primitives ----------------------------------------------------------------------------

    def pointwise(
        self, ins: Sequence[Value], law: Law, exponents: Sequence[float] = (), defer: bool = False
    ) -> Value:
        """Elementwise function with broadcasting. Given tensors only fix the axes they span, unless
        they hold one number everywhere."""
        ins = self._broadcast(ins)
        if all(value.given for value in ins):
            return self.given(_broadcast([value.shape for value in ins]))
        shape = _broadcast([value.shape for value in ins])
        live = [value for value in ins if not value.given]
        powers = [e for value, e in zip(ins, exponents, strict=False) if not value.given]
        fixed: set[int] = set()
        axes: list[Axis] = []
        for j, size in enumerate(shape):
            chosen: Axis | None = None
            for value in live:
                i = j - len(shape) + value.rank
                if i < 0 or total(value.axes[i]) != size or size == 1:
                    continue
                if chosen is None:
                    chosen = value.axes[i]
                else:
                    chosen = self._align(chosen, value.axes[i])
            if size > 1:
                for value in ins:
                    i = j - len(shape) + value.rank
                    alike = value.zero or value.id in self.uniform
                    if value.given and i >= 0 and value.shape[i] == size and not alike:
                        fixed.add(j)
            axes.append(chosen if chosen is not None else self.structure.axis(size, size > 1))
        self.use(*live)
        out = self.value(axes)
        maps = tuple(
            tuple(
                (i if i >= 0 and value.shape[i] == shape[j] else None)
                for j in range(len(shape))
                for i in [j - len(shape) + value.rank]
            )
            for value in live
        )
        if law is Law.SUM and len(live) < len(ins):
            zero = all(value.zero for value in ins if value.given)
            law = Law.SUM if zero else Law.SHIFT
        fact = Pointwise(*self.where, out, tuple(live), maps, law, tuple(powers), tuple(sorted(fixed)))
        if defer:
            out.pending = fact
        else:
            self.record(fact)
        return out

    def _broadcast(self, ins: Sequence[Value]) -> list[Value]:
        """Arguments that were repeated along axes, without the repetition where broadcasting repeats them."""
        shape = _broadcast([value.shape for value in ins])
        out = list(ins)
        for k, value in enumerate(ins):
            base = self.repeated.get(value.id)
            if base is not None:
                changed = [*out[:k], base, *out[k + 1 :]]
                if _broadcast([other.shape for other in changed]) == shape:
                    out = changed
        return out

    def _align(self, first: Axis, second: Axis) -> Axis:
        """Unify two axes; where one is data, prefer one that remembers what it selects."""
        if self.structure.is_data(first) and self.structure.is_data(second):
            return second if _selects(second) and not _selects(first) else first
        if _selects(first) or _selects(second):
            self.structure.rigid(second if _selects(first) else first)
            return first if _selects(first) else second
        self.structure.unify(first, second)
        return first

    def scaled(self, value: Value) -> Value:
        """Multiplication by a constant: the same value for every kind of group."""
        return value

    def shifted(self, value: Value) -> Value:
        """A constant, equal everywhere, is added."""
        if value.given:
            return self.given(value.shape)
        self.use(value)
        out = self.value(value.axes)
        self.record(Pointwise(*self.where, out, (value,), (tuple(range(value.rank)),), Law.SHIFT))
        return out

    def unary(self, value: Value, law: Law, power: float = 1.0) -> Value:
        return self.pointwise([value], law, [power])

    def remap(self, value: Value, axes: list[Axis], links: Sequence[Link]) -> Value:
        """The same entries in another arrangement; entries may be left out or repeated."""
        if value.given:
            return self._ranged(self.given([total(axis) for axis in axes]), value)
        self._materialise(value)
        out = self.value(axes)
        self.record(Remap(*self.where, out, value, tuple(links)))
        return self._ranged(out, value)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        if value.given:
            return self._ranged(self.given(shape), value)
        if tuple(shape) == value.shape:
            return value
        axes, groups = self.structure.regroup(value.axes, shape)
        out = self.remap(value, axes, [_link(group) for group in groups])
        if value.range_of is not None:
            self.orders[out.id] = self.order(value)
        return out

    def _ranged(self, out: Value, value: Value) -> Value:
        out.range_of = value.range_of
        out.zero = value.zero
        if value.id in self.uniform:
            self.uniform.add(out.id)
        return out

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        order = [d % value.rank for d in order]
        if value.given:
            return self._ranged(self.given([value.shape[d] for d in order]), value)
        out = self.remap(
            value,
            [value.axes[d] for d in order],
            [Link((d,), (j,)) for j, d in enumerate(order)],
        )
        if value.normalised is not None:
            out.normalised = order.index(value.normalised)
        return out

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        lead = len(shape) - value.rank
        shape = [value.shape[j - lead] if n == -1 else n for j, n in enumerate(shape)]
        if value.given:
            return self._ranged(self.given(shape), value)
        axes: list[Axis] = []
        links: list[Link] = []
        for j, size in enumerate(shape):
            i = j - lead
            if i >= 0 and value.shape[i] == size:
                axes.append(value.axes[i])
                links.append(Link((i,), (j,)))
            else:
                axes.append(self.structure.axis(size))
        out = self.remap(value, axes, links)
        self.repeated[out.id] = value
        return out

    def slice(self, value: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        axis %= value.rank
        size = value.shape[axis]
        start = max(0, min(size, start + size if start < 0 else start))
        stop = max(start, min(size, stop + size if stop < 0 else stop))
        length = max(0, -(-(stop - start) // step))
        shape = list(value.shape)
        shape[axis] = length
        if value.given:
            return self._ranged(self.given(shape), value)
        if length == size:
            return value
        if length == 0:
            return self.given(shape)
        kept = self._slice_axis(value.axes[axis], start, length, step)
        axes = [*value.axes[:axis], kept, *value.axes[axis + 1 :]]
        links = [Link((i,), (i,)) for i in range(value.rank) if i != axis]
        links.append(Link((axis,), (axis,), start, step))
        return self.remap(value, axes, links)

    def _slice_axis(self, axis: Axis, start: int, length: int, step: int) -> Axis:
        if self.structure.is_data(axis):
            return self.structure.axis(length, True)
        try:
            if step == 1:
                points = sorted({start, start + length} - {0, total(axis)})
                pieces = self.structure.cut(axis, points)
                position = 0
                for piece in pieces:
                    if position == start:
                        return list(piece)
                    position += total(piece)
                raise Conflict("empty slice")
            if total(axis) % step or length * step != total(axis):
                raise Conflict("strided slice that does not cover the axis evenly")
            outer, inner = self.structure.split_axis(axis, step)
            self.structure.cut(inner, list(range(1, step)))
            return outer
        except Conflict as conflict:
            self._on_rigid(str(conflict))
            self.structure.rigid(axis)
            return self.structure.axis(length, True)

    def select(self, value: Value, axis: int, index: int) -> Value:
        axis %= value.rank
        index %= value.shape[axis]
        piece = self.slice(value, axis, index, index + 1)
        return self.reshape(piece, [n for i, n in enumerate(piece.shape) if i != axis])

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        axis %= max(value.rank for value in values)
        values = [value for value in values if 0 not in value.shape] or list(values[:1])
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        if all(value.given for value in values):
            return self.given(shape)
        values = [self._ungiven(value, axis) for value in values]
        axes: list[Axis] = []
        for j in range(len(shape)):
            if j == axis:
                axes.append([self.structure.sum([value.axes[axis] for value in values])])
                continue
            chosen = values[0].axes[j]
            for value in values[1:]:
                chosen = self._align(chosen, value.axes[j])
            axes.append(chosen)
        self.use(*values)
        out = self.value(axes)
        self.record(Concat(*self.where, out, tuple(values), axis))
        return out

    def _ungiven(self, value: Value, axis: int) -> Value:
        """A given tensor inside a concatenation: a value whose axes are stopped."""
        if not value.given:
            return value
        out = self.value([self.structure.axis(n) for n in value.shape])
        if not value.zero:
            self.record(Stop(*self.where, out, "is joined with a tensor that no parameter changes"))
        return out

    def contract(self, a: Value, b: Value, la: Sequence[str], lb: Sequence[str], lo: Sequence[str]) -> Value:
        """Einsum of two values. A letter whose axis has size one in one of them is broadcast."""
        sizes: dict[str, int] = {}
        for labels, value in ((la, a), (lb, b)):
            for letter, n in zip(labels, value.shape, strict=True):
                sizes[letter] = max(sizes.get(letter, 1), n)
        if a.given and b.given:
            return self.given([sizes[letter] for letter in lo])
        for given, other, lg, lv in ((a, b, la, lb), (b, a, lb, la)):
            if given.given:
                return self._contract_given(given, other, lg, lv, lo, sizes)
        axes: dict[str, Axis] = {}
        for labels, value in ((la, a), (lb, b)):
            for letter, axis in zip(labels, value.axes, strict=True):
                if total(axis) != sizes[letter] or not axis:
                    continue
                axes[letter] = self._align(axes[letter], axis) if letter in axes else axis
        for j, letter in enumerate(la):
            if total(a.axes[j]) != sizes[letter] and letter not in lo:
                raise RegaugeError("a contracted axis is broadcast", node=self.name)
        if a is not b:
            self.use(a)
        self.use(b)
        out = self.value([axes.get(letter, []) for letter in lo])
        self.record(Contract(*self.where, out, a, b, tuple(la), tuple(lb), tuple(lo)))
        return out

    def _contract_given(
        self,
        given: Value,
        other: Value,
        lg: Sequence[str],
        lv: Sequence[str],
        lo: Sequence[str],
        sizes: dict[str, int],
    ) -> Value:
        """Contraction with a tensor no parameter changes: linear in the other one; every axis of
        it that the given tensor spans is fixed."""
        spanned = [
            i for i, letter in enumerate(lv) if letter in lg and given.shape[list(lg).index(letter)] > 1
        ]
        live = [i for i in spanned if other.shape[i] > 1 and not self.structure.is_data(other.axes[i])]
        self.use(other)
        if live:
            self.record(
                Stop(
                    *self.where,
                    other,
                    "is multiplied with a tensor that no parameter changes",
                    tuple(live),
                    whole=False,
                )
            )
        axes = [
            other.axes[list(lv).index(letter)]
            if letter in lv and total(other.axes[list(lv).index(letter)]) == sizes[letter]
            else self.structure.axis(sizes[letter], sizes[letter] > 1)
            for letter in lo
        ]
        out = self.value(axes)
        keep = tuple((list(lv).index(letter), j) for j, letter in enumerate(lo) if letter in lv)
        over = tuple(i for i, letter in enumerate(lv) if letter not in lo)
        self.record(Reduce(*self.where, out, other, keep, over, Law.SUM))
        return out

    def reduce(self, value: Value, over: Sequence[int], keepdim: bool, law: Law) -> Value:
        over = sorted({d % value.rank for d in over}) if value.rank else []
        shape: list[int] = []
        axes: list[Axis] = []
        keep: list[tuple[int, int]] = []
        for i, axis in enumerate(value.axes):
            if i in over:
                if keepdim:
                    axes.append([])
                    shape.append(1)
                continue
            keep.append((i, len(axes)))
            axes.append(axis)
            shape.append(total(axis))
        if value.given:
            return self.given(shape)
        if law is Law.SUM and value.product_of is not None:
            return self._sum_of_product(value, over, keepdim)
        self.use(value)
        out = self.value(axes)
        self.record(Reduce(*self.where, out, value, tuple(keep), tuple(over), law))
        return out

    def _sum_of_product(self, value: Value, over: Sequence[int], keepdim: bool) -> Value:
        assert value.product_of is not None
        a, b = value.product_of
        letters = [f"x{j}" for j in range(value.rank)]
        labels: list[list[str]] = []
        for factor in (a, b):
            lead = value.rank - factor.rank
            labels.append(letters[lead:])
        squeezed: list[Value] = []
        names: list[list[str]] = []
        for factor, names_of in zip((a, b), labels, strict=True):
            drop = [
                i
                for i, letter in enumerate(names_of)
                if factor.shape[i] == 1 and value.shape[letters.index(letter)] > 1
            ]
            if drop:
                shape = [n for i, n in enumerate(factor.shape) if i not in drop]
                squeezed.append(self.reshape(factor, shape))
                names.append([letter for i, letter in enumerate(names_of) if i not in drop])
            else:
                squeezed.append(factor)
                names.append(names_of)
        lo = [letter for j, letter in enumerate(letters) if j not in over]
        out = self.contract(squeezed[0], squeezed[1], names[0], names[1], lo)
        if keepdim:
            shape = [1 if j in over else n for j, n in enumerate(value.shape)]
            return self.reshape(out, shape)
        return out

    def product(self, a: Value, b: Value, exponents: tuple[float, float] = (1.0, 1.0)) -> Value:
        if a.given and b.given:
            return self.pointwise([a, b], Law.PRODUCT, exponents)
        a, b = self._broadcast([a, b])
        summable = exponents == (1.0, 1.0) and not a.given and not b.given
        out = self.pointwise([a, b], Law.PRODUCT, exponents, defer=summable)
        if summable:
            out.product_of = (a, b)
        return out

    def square(self, value: Value) -> Value:
        if value.given:
            return self.given(value.shape)
        out = self.pointwise([value], Law.POWER, [2.0], defer=True)
        out.product_of = (value, value)
        return out

    def center(self, value: Value, over: Sequence[int]) -> Value:
        if value.given:
            return self.given(value.shape)
        self.use(value)
        out = self.value(value.axes)
        self.record(Center(*self.where, out, value, tuple(sorted(d % value.rank for d in over))))
        return out

    def softmax(self, value: Value, axis: int) -> Value:
        if value.given:
            return self.given(value.shape)
        self.use(value)
        axis %= value.rank
        out = self.value(value.axes)
        out.normalised = axis
        self.record(Normalise(*self.where, out, value, axis))
        return out

    def stop(self, value: Value, reason: str, axes: Sequence[int] | None = None) -> None:
        """Nothing passes along the given axes, or anywhere."""
        if not value.given:
            self._materialise(value)
            self.record(Stop(*self.where, value, reason, None if axes is None else tuple(axes)))
            if value.range_of is not None and axes is None:
                source, axis = value.range_of
                self.record(Stop(*self.where, source, reason, (axis,)))

    def opaque(self, ins: Sequence[Value], shapes: Sequence[Sequence[int]], reason: str) -> list[Value]:
        """An operation nobody explained: stop everything that goes in; outputs are fresh data."""
        live = [value for value in ins if not value.given]
        for value in live:
            self.use(value)
            self.stop(value, reason)
        outs = [self.given(shape) for shape in shapes]
        return outs


def op_name(node: fx.Node) -> str:
    """``aten.add`` for every overload of it; other targets by their own name."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def _link(group: Group) -> Link:
    return Link(group.source, group.target)


def _selects(axis: Axis) -> bool:
    return any(isinstance(atom, Selection) for atom in axis)


class Selection(Atom):
    """Data that says which index of another axis was chosen (the experts of a token)."""

    __slots__ = ("stands_for",)

    def __init__(self, id: int, size: int, stands_for: Axis) -> None:
        super().__init__(id, size, True)
        self.stands_for = stands_for


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    return list(torch.broadcast_shapes(*shapes))


def interpret(trace: Trace, untied: bool = False) -> Walk:
    """Walk the whole graph.

    Args:
        trace: a traced model.
        untied: give every state-dict alias of a tied parameter its own value, as after untying.

    Returns:
        the walk: facts, structure and refusals.
    """
    from regauge.rules import RULES
    from regauge.rules.rotary import find_rotary

    walk = Walk(trace, untied)
    env: dict[fx.Node, Any] = {}
    rotary = find_rotary(trace.graph)
    for node in trace.graph.nodes:
        walk.node = node
        if node.op == "placeholder":
            env[node] = _placeholder(walk, node)
        elif node in rotary.hidden:
            continue
        elif node.op == "call_function":
            if node in rotary:
                env[node] = rotary[node].apply(walk, env)
            else:
                env[node] = _call(walk, node, env, RULES)
        elif node.op == "output":
            for out in trace.outputs:
                value = env[out]
                if isinstance(value, str) and out.name in trace.parameters:
                    value = walk.parameter(role(trace, node, value) if untied else value)
                if isinstance(value, Value):
                    walk.stop(value, "is the output of the network")
        else:
            raise RegaugeError(f"unexpected node kind {node.op}", node=node.name)
    _one_chart(walk)
    return walk


def _one_chart(walk: Walk) -> None:
    """A parameter used both as it is and with a constant added has no common action: stop it."""
    used: dict[str, dict[int, Value]] = {}
    for fact in walk.result.facts:
        for slot in ("ins", "inp", "a", "b", "value"):
            item = getattr(fact, slot, ())
            for value in item if isinstance(item, tuple) else (item,):
                if isinstance(value, Value) and value.parameter is not None:
                    used.setdefault(value.parameter, {})[value.id] = value
    for values in used.values():
        if len(values) > 1:
            for value in values.values():
                reason = "is used both as stored and with a constant added"
                walk.record(Stop("", str(value.parameter), "", value, reason))


def _placeholder(walk: Walk, node: fx.Node) -> Any:
    trace = walk.trace
    if node.name in trace.parameters:
        return trace.parameters[node.name]
    example = node.meta.get("val")
    if isinstance(example, torch.Tensor):
        return walk.given(tuple(int(n) for n in example.shape))
    return example


def _argument(walk: Walk, node: fx.Node, env: dict[fx.Node, Any], arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        found = env[arg]
        if isinstance(found, str) and arg.name in walk.trace.parameters:
            return walk.parameter(role(walk.trace, node, found) if walk.untied else found)
        return found
    if isinstance(arg, (list, tuple)):
        return type(arg)(_argument(walk, node, env, item) for item in arg)
    return arg


RULE_FAILURES = (
    Conflict,
    RegaugeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ZeroDivisionError,
)
"""What a rule may raise on arguments it was not written for; the operation is then refused."""


def _call(walk: Walk, node: fx.Node, env: dict[fx.Node, Any], rules: dict[str, Rule]) -> Any:
    name = op_name(node)
    example = node.meta.get("val")
    _shapes(example)
    plain, named = _positional(node)
    args = [_argument(walk, node, env, arg) for arg in plain]
    kwargs = {key: _argument(walk, node, env, arg) for key, arg in named.items()}
    tensors = _values([*args, *kwargs.values()])
    rule = rules.get(name)
    if name != "getitem" and all(value.given for value in tensors):
        if rule is not None and getattr(rule, "even_given", False):
            return _guarded(walk, node, rule, args, kwargs)
        return _given(walk, example)
    if rule is None:
        return _refuse(walk, node, tensors, f"{name} is an operation without a rule")
    return _guarded(walk, node, rule, args, kwargs)


def _positional(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in the order of the operator's schema; only keyword-only ones stay keywords."""
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = getattr(node.target, "_schema", None)
    if schema is None or not kwargs:
        return args, kwargs
    order = [argument for argument in schema.arguments if not argument.kwarg_only]
    last = max((i for i, argument in enumerate(order) if argument.name in kwargs), default=-1)
    for argument in order[len(args) : last + 1]:
        args.append(kwargs.pop(argument.name, argument.default_value))
    return args, kwargs


def _guarded(walk: Walk, node: fx.Node, rule: Rule, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run a rule; if it fails or gives another shape than was traced, refuse the operation."""
    tensors = _values([*args, *kwargs.values()])
    try:
        if any(not value.given for value in _values(list(kwargs.values()))):
            raise ValueError("a tensor given by keyword")
        out = rule(walk, node, *args, **kwargs)
        expected, found = _shapes(node.meta.get("val")), [value.shape for value in _values(out)]
        if op_name(node) != "getitem" and expected != found:
            raise ValueError(f"a result of shape {found} where {expected} was traced")
        return out
    except RULE_FAILURES as error:
        return _refuse(walk, node, tensors, f"{op_name(node)}: its rule failed ({_brief(error)})")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _refuse(walk: Walk, node: fx.Node, tensors: list[Value], reason: str) -> Any:
    walk.refusals.append(Refusal(node.name, walk.module, reason))
    example = node.meta.get("val")
    return _pack(example, iter(walk.opaque(tensors, _shapes(example), reason)))


def _values(args: Any) -> list[Value]:
    if isinstance(args, Value):
        return [args]
    if isinstance(args, (list, tuple)):
        return [value for item in args for value in _values(item)]
    return []


def _shapes(example: Any) -> list[tuple[int, ...]]:
    if isinstance(example, torch.Tensor):
        return [_sizes(example)]
    if isinstance(example, (list, tuple)):
        return [shape for item in example for shape in _shapes(item)]
    return []


def _sizes(example: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a traced tensor. Raises ``TraceError`` if one of them depends on the values of the inputs."""
    if all(type(n) is int for n in example.shape):
        return tuple(example.shape)
    try:
        return tuple(int(n) for n in example.shape)
    except Exception as error:
        raise TraceError(
            "the size of a tensor depends on the values of the inputs",
            expected="sizes that follow from the shapes of the inputs",
            found=str(tuple(example.shape)),
            way_out="another implementation of the layer, such as batched_mm for experts",
        ) from error


def _given(walk: Walk, example: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return walk.given(_sizes(example))
    if isinstance(example, (list, tuple)):
        return [_given(walk, item) for item in example]
    return example


def _pack(example: Any, values: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return next(values)
    if isinstance(example, (list, tuple)):
        return [_pack(item, values) for item in example]
    return example
