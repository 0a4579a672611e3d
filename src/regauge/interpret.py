"""The walk: run the traced graph over abstract values, one small rule per operation.

An operation without a rule makes every axis it touches rigid and leaves a refusal. Nothing is
guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from regauge.abstract import Selection, op_name
from regauge.atoms import Conflict
from regauge.errors import RegaugeError, TraceError
from regauge.facts import Stop, Value
from regauge.trace import Trace, role
from regauge.unseen import unseen
from regauge.walk import Walk

__all__ = ["RULE_FAILURES", "Rule", "Selection", "Walk", "interpret", "op_name"]

Rule = Callable[..., Any]


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
    elsewhere = unseen(trace)
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
            if node in elsewhere:
                for value in _values(env[node]):
                    walk.stop(
                        value, f"may meet {elsewhere[node]} on other inputs, which is not read on these"
                    )
        elif node.op == "output":
            for out in trace.outputs:
                value = env[out]
                if isinstance(value, str) and out.name in trace.parameters:
                    value = walk.parameter(role(trace, node, value) if untied else value)
                if isinstance(value, Value):
                    walk.stop(value, "is the output of the network")
        else:
            raise RegaugeError(f"unexpected node kind {node.op}", node=node.name)
    walk.results = {node.name: result for node, result in env.items()}
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
        out = walk.given(tuple(int(n) for n in example.shape))
        out.varies = node.name in trace.inputs
        return out
    return example


def _argument(walk: Walk, node: fx.Node, env: dict[fx.Node, Any], arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        found = env[arg]
        if isinstance(found, str) and arg.name in walk.trace.parameters:
            if 0 in walk.trace.shapes[walk.trace.canonical[found]]:
                return walk.given(walk.trace.shapes[walk.trace.canonical[found]])
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
        even = rule is not None and getattr(rule, "even_given", False)
        out = _guarded(walk, node, rule, args, kwargs) if rule is not None and even else _given(walk, example)
        for value in _values(out):
            value.varies = any(tensor.varies for tensor in tensors)
        return out
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
