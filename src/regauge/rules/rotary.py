"""Rotary position embedding, recognised by what it computes, in any of its spellings.

Two halves (or interleaved entries) a, b of an axis become ``a c − b s`` and ``b c + a s`` with the
same tables c and s: multiplication of the pair a + ib by the complex number c + is, which commutes
with every complex number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from regauge.facts import Rotary, Value
from regauge.interpret import Walk, op_name
from regauge.rules.pairs import Form, Reader, forms_of, is_call, shape_of, strip

_RESULTS = ("aten.add", "aten.sub", "aten.cat", "aten.flatten", "aten.view", "aten.reshape")


@dataclass
class Match:
    source: fx.Node
    interleaved: bool
    tables: tuple[fx.Node, ...]
    output: fx.Node

    def apply(self, walk: Walk, env: dict[fx.Node, Any]) -> Value:
        """y = x with every pair multiplied by a fixed complex number."""
        x = env[self.source]
        tables = [t for table in self.tables if isinstance(t := env.get(table), Value)]
        if any(not table.given for table in tables):
            for value in (x, *tables):
                walk.stop(value, "is rotated by angles that depend on parameters")
            return walk.given(shape_of(self.output))
        if x.given or x.shape != shape_of(self.output):
            walk.stop(x, "is rotated into another shape")
            return walk.given(shape_of(self.output))
        for table in self.tables:
            sizes = shape_of(table)[:-1]
            for axis in range(max(0, x.rank - 1 - len(sizes)), x.rank - 1):
                if sizes[axis - (x.rank - 1)] > 1 and not walk.structure.is_data(x.axes[axis]):
                    walk.stop(x, "is rotated by angles of its own at every index", [axis])
        axis = x.rank - 1
        size = x.shape[axis]
        wide = (size // 2, 2) if self.interleaved else (2, size // 2)
        probe, _ = walk.structure.regroup([x.axes[axis]], wide)
        two, pairs = (probe[1], probe[0]) if self.interleaved else (probe[0], probe[1])
        if len(two) != 1 or walk.structure.is_data(two):
            walk.stop(x, "is rotated in pairs that do not match its layout")
            return walk.given(x.shape)
        walk.use(x)
        out = walk.value(list(x.axes))
        walk.record(Rotary(*walk.where, out, x, axis, two[0], list(pairs)))
        return out


class Matches(dict[fx.Node, Match]):
    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[fx.Node] = set()


def find_rotary(graph: fx.Graph) -> Matches:
    """All nodes that rotate the last axis of one other node, pair by pair."""
    matches = Matches()
    reader = Reader()
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) not in _RESULTS:
            continue
        turned = _complex(node)
        if turned is not None:
            matches[node] = turned
            continue
        forms = forms_of(reader, node)
        if forms is None or len(forms) != 2:
            continue
        match = _rotation(reader, node, forms)
        if match is not None:
            matches[node] = match
    matches.hidden = _unneeded(graph, matches)
    return matches


def _complex(node: Any) -> Match | None:
    """Pairs viewed as complex numbers, multiplied by a table, and viewed as pairs again."""

    back = node.args[0]
    if not is_call(back, "aten.view_as_real") or not is_call(strip(back.args[0]), "aten.mul"):
        return None
    product = strip(back.args[0])
    for pairs, table in (product.args, tuple(reversed(product.args))):
        pairs = strip(pairs)
        if not is_call(pairs, "aten.view_as_complex") or not isinstance(table, fx.Node):
            continue
        split = strip(pairs.args[0])
        if not is_call(split, "aten.view", "aten.reshape", "aten.unflatten"):
            continue
        source = strip(split.args[0])
        if not isinstance(source, fx.Node) or shape_of(source) != shape_of(node):
            continue
        if shape_of(split) == (*shape_of(source)[:-1], shape_of(source)[-1] // 2, 2) and shape_of(
            product
        ) == shape_of(pairs):
            return Match(source, True, (table,), node)
    return None


def _unneeded(graph: fx.Graph, matches: Matches) -> set[fx.Node]:
    """Operations that only served inside a recognised rotation, and dead code."""
    needed: set[fx.Node] = set()
    stack = [node for node in graph.nodes if node.op == "output"]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        match = matches.get(node)
        stack.extend(node.all_input_nodes if match is None else [match.source, *match.tables])
    return {node for node in graph.nodes if node.op == "call_function" and node not in needed}


def _rotation(reader: Reader, node: Any, forms: list[tuple[int, int, int, Form]]) -> Match | None:
    (_, n0, s0, f0), (_, n1, s1, f1) = forms
    if n0 != n1 or s0 != s1 or len(f0) != 2 or len(f1) != 2:
        return None
    first = {half: (label, sign) for (half, label), sign in f0.items()}
    second = {half: (label, sign) for (half, label), sign in f1.items()}
    if len(first) != 2 or set(first) != set(second):
        return None
    halves = sorted(first, key=lambda h: h.start)
    x0, x1 = halves
    if x0.node is not x1.node or x0.step != x1.step or x0.length != n0 or x1.length != n0:
        return None
    if x0.start != 0 or shape_of(x0.node)[-1] != 2 * n0 or x1.start != (1 if x0.step == 2 else n0):
        return None
    if x0.step != s0 and not (x0.step == 1 and s0 == 1):
        return None
    (c0, p0), (t0, q0) = first[x0], first[x1]
    (t1, q1), (c1, p1) = second[x0], second[x1]
    if c0 != c1 or t0 != t1 or p0 != p1 or q0 != -q1 or c0 == t0:
        return None
    tables = tuple(reader.tables[label] for label in (c0, t0))
    return Match(x0.node, s0 == 2, tables, node)
