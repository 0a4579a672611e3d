"""Which axes of which parameters count tokens: read off the traced graph, never from names of parameters.

The rows of a table that a user input looks up; and what makes the last axis of the logits: the outputs of the
last product, its bias, and what is added to them entry by entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regauge.trace import Trace

LOGITS = "logits"
"""The output whose last axis has an entry for each token, where it is long enough."""

_PLAIN = frozenset({"alias", "clone", "contiguous", "detach", "to", "_to_copy", "type_as"})
_SHAPE = frozenset({"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "slice", "select"})
_SAME = _PLAIN | _SHAPE
_CHOICE = {"masked_fill": (0,), "where": (1, 2)}
_ENTRYWISE = _SAME | {"add", "sub", "mul", "div", "neg", "tanh", "sigmoid"}


@dataclass(frozen=True)
class Axes:
    """Where a model counts tokens.

    Attributes:
        tables: parameter -> axis, of those that an input looks up.
        heads: parameter -> axis, of those that make the logits.
        inputs: user inputs that hold ids of tokens.
        sizes: sizes of all these axes.
        logits: size of the last axis of the logits; None if they do not count tokens.
    """

    tables: dict[str, int]
    heads: dict[str, int]
    inputs: tuple[str, ...]
    sizes: tuple[int, ...]
    logits: int | None

    @property
    def parameters(self) -> dict[str, int]:
        return {**self.heads, **self.tables}


def vocabulary_axes(trace: Trace, tokens: int) -> Axes:
    """The axes of a model that count tokens.

    Args:
        trace: of the model.
        tokens: the largest id of a token, plus one; shorter axes do not count tokens.
    """
    tables: dict[str, int] = {}
    inputs: list[str] = []
    for node in trace.graph.nodes:
        found = _lookup(node)
        if found is None:
            continue
        table, index = found
        held, ids = _parameter(trace, table, 0), _origin(trace, index)
        if held is not None and ids is not None and trace.shapes[held[0]][held[1]] >= tokens:
            tables[held[0]] = held[1]
            inputs.append(ids)
    heads: dict[str, int] = {}
    logits = None
    for name, node in zip(trace.output_names, trace.outputs, strict=False):
        size = _last(node)
        if name == LOGITS and tables and size is not None and size >= tokens:
            logits = size
            _follow(trace, node, size, heads)
    sizes = {trace.shapes[name][axis] for name, axis in (*tables.items(), *heads.items())}
    return Axes(tables, heads, tuple(dict.fromkeys(inputs)), tuple(sorted(sizes)), logits)


def _lookup(node: fx.Node) -> tuple[Any, Any] | None:
    """(table, index) of a lookup of rows."""
    operation = _operation(node)
    if operation == "embedding":
        return node.args[0], node.args[1]
    if operation == "index_select" and node.args[1] == 0:
        return node.args[0], node.args[2]
    if operation == "index" and isinstance(node.args[1], (list, tuple)) and len(node.args[1]) == 1:
        return node.args[0], node.args[1][0]
    return None


def _origin(trace: Trace, node: Any) -> str | None:
    """The user input of integers whose entries these are."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.name in trace.inputs:
            value = node.meta.get("val")
            whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
            return node.name if whole else None
        operation = _operation(node)
        if operation in _SAME:
            waiting.append(node.args[0])
        elif operation in _CHOICE:
            waiting += [node.args[place] for place in reversed(_CHOICE[operation])]
    return None


def _follow(trace: Trace, node: Any, size: int, found: dict[str, int]) -> None:
    """Parameters whose axis becomes the last axis of the node."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen or _last(node) != size:
            continue
        seen.add(node)
        held = _parameter(trace, node, -1)
        if held is not None:
            found.setdefault(*held)
            continue
        for factor, axis in _factors(node):
            made = _parameter(trace, factor, axis)
            if made is not None:
                found.setdefault(*made)
        if _operation(node) in _ENTRYWISE:
            waiting += node.all_input_nodes


def _factors(node: fx.Node) -> list[tuple[Any, int]]:
    """(factor, axis) of a product's last axis."""
    operation, args = _operation(node), node.args
    if operation == "linear":
        return [(args[1], 0), *((bias, 0) for bias in (*args[2:], *node.kwargs.values()))]
    if operation == "addmm":
        return [(args[0], -1), (args[2], -1)]
    if operation in ("mm", "matmul", "bmm"):
        return [(args[1], -1)]
    return []


def _parameter(trace: Trace, node: Any, axis: int) -> tuple[str, int] | None:
    """The parameter whose axis this axis of the node is."""
    while isinstance(node, fx.Node):
        if node.name in trace.parameters:
            name = trace.parameters[node.name]
            return name, axis % len(trace.shapes[name])
        operation = _operation(node)
        if operation in ("t", "transpose"):
            i, j = (node.args[1], node.args[2]) if len(node.args) == 3 else (0, 1)
            rank = len(node.meta["val"].shape)
            i, j, axis = int(i) % rank, int(j) % rank, axis % rank  # type: ignore[call-overload]
            axis = j if axis == i else i if axis == j else axis
        elif operation == "permute":
            order = list(node.args[1])  # type: ignore[call-overload]
            axis = int(order[axis]) % len(order)
        elif operation not in _PLAIN:
            return None
        node = node.args[0]
    return None


def _last(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.ndim else None


def _operation(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
