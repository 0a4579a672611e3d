"""Rotary position embedding, recognised by what it computes, in any of its spellings.

Two halves (or interleaved entries) a, b of an axis become ``a c − b s`` and ``b c + a s`` with the
same tables c and s: multiplication of the pair a + ib by the complex number c + is, which commutes
with every complex number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from regauge.facts import Rotary, Value
from regauge.interpret import Walk, op_name

_SAME = ("aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.alias", "aten.type_as")
_TABLE_SCALE = ("aten.mul", "aten.div")
_RESULTS = ("aten.add", "aten.sub", "aten.cat", "aten.flatten", "aten.view", "aten.reshape")


@dataclass(frozen=True)
class Half:
    """Entries of a node's last axis: start, number and step of the positions taken."""

    node: fx.Node
    start: int
    length: int
    step: int


Form = dict[tuple[Half, str], int]  # (part of x, table key) -> sign


@dataclass
class Match:
    source: fx.Node
    interleaved: bool
    tables: tuple[fx.Node, ...]
    output: fx.Node

    def apply(self, walk: Walk, env: dict[fx.Node, Any]) -> Value:
        """y = x with every pair multiplied by a fixed complex number."""
        x = env[self.source]
        if x.given:
            return walk.given(x.shape)
        tables = [env[table] for table in self.tables if table in env]
        if any(isinstance(t, Value) and not t.given for t in tables):
            for value in (x, *tables):
                walk.stop(value, "is rotated by angles that depend on parameters")
            return walk.given(x.shape)
        for table in self.tables:
            sizes = _shape(table)[:-1]
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


@dataclass
class _Reader:
    memo: dict[fx.Node, list[tuple[int, int, int, Form]] | None] = field(default_factory=dict)
    tables: dict[str, fx.Node] = field(default_factory=dict)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(n) for n in value.shape) if hasattr(value, "shape") else ()


def _strip(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in _SAME:
        node = node.args[0]
    return node


def _pair_slices(node: Any) -> Half | None:
    """node = part of the last axis of another node."""
    node = _strip(node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name = op_name(node)
    if name == "aten.slice":
        base = node.args[0]
        rank = len(_shape(base))
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim not in (rank - 1, -1):
            return None
        size = _shape(base)[-1]
        start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
        step = node.args[4] if len(node.args) > 4 else 1
        start = start + size if start < 0 else start
        return Half(_strip(base), start, _shape(node)[-1], step)
    if name == "getitem" and op_name(node.args[0]) in ("aten.split", "aten.chunk", "aten.split_with_sizes"):
        split = node.args[0]
        base = split.args[0]
        rank = len(_shape(base))
        dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        if dim not in (rank - 1, -1):
            return None
        sizes = [int(item.shape[-1]) for item in split.meta["val"]]
        return Half(_strip(base), sum(sizes[: node.args[1]]), sizes[node.args[1]], 1)
    if name == "aten.select":
        base, dim, index = node.args
        rank = len(_shape(base))
        if dim in (rank - 1, -1) and op_name(base) in ("aten.view", "aten.reshape", "aten.unflatten"):
            inner = _strip(base.args[0])
            if _shape(base)[-1] == 2 and _shape(inner)[-1] == 2 * _shape(base)[-2]:
                return Half(inner, index % 2, _shape(base)[-2], 2)
    return None


def _table_key(node: Any, half: tuple[int, int, int]) -> str | None:
    """A name for the entries of a table used against one half, equal for equal entries."""
    start, length, step = half
    node = _strip(node)
    if not isinstance(node, fx.Node):
        return None
    shape = _shape(node)
    if node.op == "call_function":
        name = op_name(node)
        if name in ("aten.unsqueeze", "aten.expand") and shape and shape[-1] == _shape(node.args[0])[-1]:
            return _table_key(node.args[0], half)
        if name in ("aten.cos", "aten.sin", "aten.neg"):
            inner = _table_key(node.args[0], half)
            return None if inner is None else f"{name}({inner})"
        if name in _TABLE_SCALE and not isinstance(node.args[1], fx.Node):
            inner = _table_key(node.args[0], half)
            return None if inner is None else f"{name}({inner},{node.args[1]})"
        if name in (
            "aten.index",
            "aten.embedding",
            "aten.index_select",
            "aten.transpose",
            "aten.permute",
            "aten.select",
        ):
            base = node.args[0]
            if (
                isinstance(base, fx.Node)
                and _shape(base)
                and _shape(base)[-1] == shape[-1]
                and name in ("aten.index", "aten.index_select", "aten.embedding")
            ):
                inner = _table_key(base, half)
                return None if inner is None else f"{name}({inner}|{node.args[1:]})"
        if name == "aten.cat" and isinstance(node.args[0], (list, tuple)):
            parts = [_strip(p) for p in node.args[0]]
            dim = node.args[1] if len(node.args) > 1 else 0
            if dim in (-1, len(shape) - 1) and step == 1 and all(_shape(p)[-1] == length for p in parts):
                return f"all({parts[start // length].name})" if start % length == 0 else None
        if name in ("aten.flatten", "aten.view", "aten.reshape") and step == 2:
            inner = _strip(node.args[0])
            if isinstance(inner, fx.Node) and op_name(inner) == "aten.stack" and _shape(inner)[-1] == 2:
                parts = [_strip(p) for p in inner.args[0]]
                return f"all({parts[start].name})"
            if isinstance(inner, fx.Node) and op_name(inner) in ("aten.expand",) and _shape(inner)[-1] == 2:
                return f"all({inner.args[0].name})"
        if name == "aten.repeat_interleave" and step == 2 and node.args[1] == 2 and start < 2:
            base = node.args[0]
            if _shape(base)[-1] * 2 == shape[-1]:
                return f"all({_strip(base).name})"
        if (
            name == "aten.repeat"
            and step == 1
            and list(node.args[1])[-1] == 2
            and all(n == 1 for n in node.args[1][:-1])
        ):
            return f"all({_strip(node.args[0]).name})"
    if shape and shape[-1] == length:
        return f"all({node.name})"
    return None


def _label(table: Any, half: tuple[int, int, int]) -> str | None:
    """Equal for equal tables that meet the same positions of the other axes."""
    key = _table_key(table, half)
    lead = list(_shape(table)[:-1])
    while lead and lead[0] == 1:
        lead.pop(0)
    return None if key is None else f"{key}@{lead}"


def _forms(reader: _Reader, node: Any, depth: int = 0) -> list[tuple[int, int, int, Form]] | None:
    """Each part (start, length, step) of node's last axis as signed sums of halves times tables."""
    if node in reader.memo:
        return reader.memo[node]
    reader.memo[node] = None
    reader.memo[node] = out = _read(reader, node, depth)
    return out


def _leaf(node: Any) -> list[tuple[int, int, int, Form]] | None:
    half = _pair_slices(node)
    if half is None:
        return None
    return [(0, half.length, 1, {(half, ""): 1})]


def _read(reader: _Reader, node: Any, depth: int) -> list[tuple[int, int, int, Form]] | None:
    node = _strip(node)
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth > 12:
        return None
    leaf = _leaf(node)
    if leaf is not None:
        return leaf
    name = op_name(node)
    if name == "aten.neg":
        inner = _forms(reader, node.args[0], depth + 1)
        return None if inner is None else [(a, n, s, {k: -v for k, v in f.items()}) for a, n, s, f in inner]
    if name == "aten.mul" and all(isinstance(arg, fx.Node) for arg in node.args):
        for x, table in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            inner = _forms(reader, x, depth + 1)
            if inner is None:
                continue
            out: list[tuple[int, int, int, Form]] = []
            for a, n, s, form in inner:
                if any(key for _, key in form):
                    return None
                label = _label(table, (a, n, s))
                if label is None:
                    return None
                reader.tables.setdefault(label, table)
                out.append((a, n, s, {(half, label): v for (half, _), v in form.items()}))
            return out
        return None
    if name in ("aten.add", "aten.sub") and all(isinstance(arg, fx.Node) for arg in node.args):
        left, right = (_side(reader, arg, depth) for arg in node.args)
        return _combine(reader, left, right, -1 if name == "aten.sub" else 1)
    if name == "aten.cat" and isinstance(node.args[0], (list, tuple)) and len(node.args[0]) == 2:
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim not in (-1, len(_shape(node)) - 1):
            return None
        parts = [_forms(reader, p, depth + 1) for p in node.args[0]]
        if any(p is None or len(p) != 1 for p in parts):
            return None
        n = parts[0][0][1]  # type: ignore[index]
        return [(0, n, 1, parts[0][0][3]), (n, parts[1][0][1], 1, parts[1][0][3])]  # type: ignore[index]
    if name in ("aten.flatten", "aten.view", "aten.reshape"):
        inner = _strip(node.args[0])
        if isinstance(inner, fx.Node) and inner.op == "call_function" and op_name(inner) == "aten.stack":
            parts = [_forms(reader, p, depth + 1) for p in inner.args[0]]
            if _shape(inner)[-1] != 2 or any(p is None or len(p) != 1 for p in parts):
                return None
            n = parts[0][0][1]  # type: ignore[index]
            if _shape(node)[-1] != 2 * n:
                return None
            return [(0, n, 2, parts[0][0][3]), (1, n, 2, parts[1][0][3])]  # type: ignore[index]
    return None


_Side = tuple[list[tuple[int, int, int, Form]] | None, fx.Node | None, Any]


def _side(reader: _Reader, node: Any, depth: int) -> _Side:
    """Forms of a summand; x · table with whole x is kept open until the other summand tells the halves."""
    forms = _forms(reader, node, depth + 1)
    bare = _strip(node)
    whole = None
    if isinstance(bare, fx.Node) and bare.op == "call_function" and op_name(bare) == "aten.mul":
        whole = bare
    return forms, whole, node


def _combine(
    reader: _Reader, left: _Side, right: _Side, sign: int
) -> list[tuple[int, int, int, Form]] | None:
    matching = left[0] is not None and right[0] is not None
    if matching and [p[:3] for p in left[0] or ()] == [p[:3] for p in right[0] or ()]:
        assert left[0] is not None
        assert right[0] is not None
        out: list[tuple[int, int, int, Form]] = []
        for (a, n, s, f), (_, _, _, g) in zip(left[0], right[0], strict=True):
            merged = dict(f)
            for key, v in g.items():
                if key in merged:
                    return None
                merged[key] = sign * v
            out.append((a, n, s, merged))
        return out
    from_left = left[0] is not None and len(left[0]) == 2
    forms, whole, flip = (left[0], right[1], sign) if from_left else (right[0], left[1], 1)
    if forms is None or whole is None or len(forms) != 2:
        return None
    if not from_left and sign == -1:
        forms = [(a, n, s, {k: -v for k, v in f.items()}) for a, n, s, f in forms]
    sources = {half.node for _, _, _, f in forms for half, _ in f}
    if len(sources) != 1:
        return None
    source = next(iter(sources))
    for x, table in ((whole.args[0], whole.args[1]), (whole.args[1], whole.args[0])):
        if _strip(x) is not source or not isinstance(table, fx.Node):
            continue
        out = []
        for a, n, s, f in forms:
            label = _label(table, (a, n, s))
            if label is None:
                return None
            reader.tables.setdefault(label, table)
            merged = dict(f)
            merged[(Half(source, a, n, s), label)] = flip
            out.append((a, n, s, merged))
        return out
    return None


def find_rotary(graph: fx.Graph) -> Matches:
    """All nodes that rotate the last axis of one other node, pair by pair."""
    matches = Matches()
    reader = _Reader()
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) not in _RESULTS:
            continue
        turned = _complex(node)
        if turned is not None:
            matches[node] = turned
            continue
        forms = _forms(reader, node)
        if forms is None or len(forms) != 2:
            continue
        match = _rotation(reader, node, forms)
        if match is not None:
            matches[node] = match
    matches.hidden = _unneeded(graph, matches)
    return matches


def _complex(node: Any) -> Match | None:
    """Pairs viewed as complex numbers, multiplied by a table, and viewed as pairs again."""

    def is_call(found: Any, *names: str) -> bool:
        return isinstance(found, fx.Node) and found.op == "call_function" and op_name(found) in names

    back = node.args[0]
    if not is_call(back, "aten.view_as_real") or not is_call(_strip(back.args[0]), "aten.mul"):
        return None
    product = _strip(back.args[0])
    for pairs, table in (product.args, tuple(reversed(product.args))):
        pairs = _strip(pairs)
        if not is_call(pairs, "aten.view_as_complex") or not isinstance(table, fx.Node):
            continue
        split = _strip(pairs.args[0])
        if not is_call(split, "aten.view", "aten.reshape", "aten.unflatten"):
            continue
        source = _strip(split.args[0])
        if not isinstance(source, fx.Node) or _shape(source) != _shape(node):
            continue
        if _shape(split) == (*_shape(source)[:-1], _shape(source)[-1] // 2, 2) and _shape(product) == _shape(
            pairs
        ):
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


def _rotation(reader: _Reader, node: Any, forms: list[tuple[int, int, int, Form]]) -> Match | None:
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
    if x0.start != 0 or _shape(x0.node)[-1] != 2 * n0 or x1.start != (1 if x0.step == 2 else n0):
        return None
    if x0.step != s0 and not (x0.step == 1 and s0 == 1):
        return None
    (c0, p0), (t0, q0) = first[x0], first[x1]
    (t1, q1), (c1, p1) = second[x0], second[x1]
    if c0 != c1 or t0 != t1 or p0 != p1 or q0 != -q1 or c0 == t0:
        return None
    tables = tuple(reader.tables[label] for label in (c0, t0))
    return Match(x0.node, s0 == 2, tables, node)
