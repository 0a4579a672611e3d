"""Reading the halves of an axis: which signed sums of halves times tables a node of the graph is.

Shared by every spelling of rotary position embedding; knows nothing of what is done with the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from regauge.interpret import op_name

_SAME = ("aten.to", "aten._to_copy", "aten.contiguous", "aten.clone", "aten.alias", "aten.type_as")
_TABLE_SCALE = ("aten.mul", "aten.div")


def is_call(node: Any, *names: str) -> bool:
    """True for an operation of the graph, of one of these names if any are given."""
    return isinstance(node, fx.Node) and node.op == "call_function" and (not names or op_name(node) in names)


@dataclass(frozen=True)
class Half:
    """Entries of a node's last axis: start, number and step of the positions taken."""

    node: fx.Node
    start: int
    length: int
    step: int


Form = dict[tuple[Half, str], int]  # (part of x, table key) -> sign


@dataclass
class Reader:
    memo: dict[fx.Node, list[tuple[int, int, int, Form]] | None] = field(default_factory=dict)
    tables: dict[str, fx.Node] = field(default_factory=dict)


def shape_of(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(n) for n in value.shape) if hasattr(value, "shape") else ()


def strip(node: Any) -> Any:
    while is_call(node, *_SAME):
        node = node.args[0]
    return node


def _pair_slices(node: Any) -> Half | None:
    """node = part of the last axis of another node."""
    node = strip(node)
    if not is_call(node):
        return None
    name = op_name(node)
    if name == "aten.slice":
        base = node.args[0]
        rank = len(shape_of(base))
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim not in (rank - 1, -1):
            return None
        size = shape_of(base)[-1]
        start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
        step = node.args[4] if len(node.args) > 4 else 1
        start = start + size if start < 0 else start
        return Half(strip(base), start, shape_of(node)[-1], step)
    if name == "getitem" and op_name(node.args[0]) in ("aten.split", "aten.chunk", "aten.split_with_sizes"):
        split = node.args[0]
        base = split.args[0]
        rank = len(shape_of(base))
        dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        if dim not in (rank - 1, -1):
            return None
        sizes = [int(item.shape[-1]) for item in split.meta["val"]]
        return Half(strip(base), sum(sizes[: node.args[1]]), sizes[node.args[1]], 1)
    if name == "aten.select":
        base, dim, index = node.args
        rank = len(shape_of(base))
        if dim in (rank - 1, -1) and op_name(base) in ("aten.view", "aten.reshape", "aten.unflatten"):
            inner = strip(base.args[0])
            if shape_of(base)[-1] == 2 and shape_of(inner)[-1] == 2 * shape_of(base)[-2]:
                return Half(inner, index % 2, shape_of(base)[-2], 2)
    return None


def _table_key(node: Any, half: tuple[int, int, int]) -> str | None:
    """A name for the entries of a table used against one half, equal for equal entries."""
    node = strip(node)
    if not isinstance(node, fx.Node):
        return None
    return _entries(node, half)


def _entries(node: Any, half: tuple[int, int, int]) -> str | None:
    start, length, step = half
    shape = shape_of(node)
    if node.op == "call_function":
        name = op_name(node)
        if name in ("aten.unsqueeze", "aten.expand") and shape and shape[-1] == shape_of(node.args[0])[-1]:
            return _table_key(node.args[0], half)
        if name in ("aten.cos", "aten.sin", "aten.neg"):
            inner = _table_key(node.args[0], half)
            return None if inner is None else f"{name}({inner})"
        if name in _TABLE_SCALE and not isinstance(node.args[1], fx.Node):
            inner = _table_key(node.args[0], half)
            return None if inner is None else f"{name}({inner},{node.args[1]})"
        if name in ("aten.index", "aten.embedding", "aten.index_select") and _keeps_last_axis(node):
            inner = _table_key(node.args[0], half)
            return None if inner is None else f"{name}({inner}|{node.args[1:]})"
        if name == "aten.cat" and isinstance(node.args[0], (list, tuple)):
            parts = [strip(p) for p in node.args[0]]
            dim = node.args[1] if len(node.args) > 1 else 0
            if dim in (-1, len(shape) - 1) and step == 1 and all(shape_of(p)[-1] == length for p in parts):
                return f"all({parts[start // length].name})" if start % length == 0 else None
        if name in ("aten.flatten", "aten.view", "aten.reshape") and step == 2:
            inner = strip(node.args[0])
            if is_call(inner, "aten.stack") and shape_of(inner)[-1] == 2:
                parts = [strip(p) for p in inner.args[0]]
                return f"all({parts[start].name})"
            if is_call(inner, "aten.expand") and shape_of(inner)[-1] == 2:
                return f"all({inner.args[0].name})"
        if name == "aten.repeat_interleave" and step == 2 and node.args[1] == 2 and start < 2:
            base = node.args[0]
            if shape_of(base)[-1] * 2 == shape[-1]:
                return f"all({strip(base).name})"
        if (
            name == "aten.repeat"
            and step == 1
            and list(node.args[1])[-1] == 2
            and all(n == 1 for n in node.args[1][:-1])
        ):
            return f"all({strip(node.args[0]).name})"
    if shape and shape[-1] == length:
        return f"all({node.name})"
    return None


def _label(table: Any, half: tuple[int, int, int]) -> str | None:
    """Equal for equal tables that meet the same positions of the other axes."""
    key = _table_key(table, half)
    lead = list(shape_of(table)[:-1])
    while lead and lead[0] == 1:
        lead.pop(0)
    return None if key is None else f"{key}@{lead}"


def forms_of(reader: Reader, node: Any, depth: int = 0) -> list[tuple[int, int, int, Form]] | None:
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


def _read(reader: Reader, node: Any, depth: int) -> list[tuple[int, int, int, Form]] | None:
    node = strip(node)
    if not is_call(node) or depth > 12:
        return None
    leaf = _leaf(node)
    if leaf is not None:
        return leaf
    name = op_name(node)
    if name == "aten.neg":
        inner = forms_of(reader, node.args[0], depth + 1)
        return None if inner is None else [(a, n, s, {k: -v for k, v in f.items()}) for a, n, s, f in inner]
    if name == "aten.mul" and all(isinstance(arg, fx.Node) for arg in node.args):
        for x, table in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            inner = forms_of(reader, x, depth + 1)
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
        if dim not in (-1, len(shape_of(node)) - 1):
            return None
        parts = [forms_of(reader, p, depth + 1) for p in node.args[0]]
        if any(p is None or len(p) != 1 for p in parts):
            return None
        n = parts[0][0][1]  # type: ignore[index]
        return [(0, n, 1, parts[0][0][3]), (n, parts[1][0][1], 1, parts[1][0][3])]  # type: ignore[index]
    if name in ("aten.flatten", "aten.view", "aten.reshape"):
        inner = strip(node.args[0])
        if is_call(inner, "aten.stack"):
            parts = [forms_of(reader, p, depth + 1) for p in inner.args[0]]
            if shape_of(inner)[-1] != 2 or any(p is None or len(p) != 1 for p in parts):
                return None
            n = parts[0][0][1]  # type: ignore[index]
            if shape_of(node)[-1] != 2 * n:
                return None
            return [(0, n, 2, parts[0][0][3]), (1, n, 2, parts[1][0][3])]  # type: ignore[index]
    return None


_Side = tuple[list[tuple[int, int, int, Form]] | None, fx.Node | None, Any]


def _side(reader: Reader, node: Any, depth: int) -> _Side:
    """Forms of a summand; x · table with whole x is kept open until the other summand tells the halves."""
    forms = forms_of(reader, node, depth + 1)
    bare = strip(node)
    whole = None
    if is_call(bare, "aten.mul"):
        whole = bare
    return forms, whole, node


def _combine(reader: Reader, left: _Side, right: _Side, sign: int) -> list[tuple[int, int, int, Form]] | None:
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
        if strip(x) is not source or not isinstance(table, fx.Node):
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


def _keeps_last_axis(node: fx.Node) -> bool:
    """A lookup that takes whole rows: every other axis may be indexed, the last one stays as it is."""
    base = node.args[0]
    if not isinstance(base, fx.Node) or not shape_of(base) or shape_of(base)[-1] != shape_of(node)[-1]:
        return False
    rank = len(shape_of(base))
    if op_name(node) == "aten.index_select":
        return isinstance(node.args[1], int) and node.args[1] % rank != rank - 1
    if op_name(node) == "aten.index":
        return isinstance(node.args[1], (list, tuple)) and len(node.args[1]) < rank
    return True
