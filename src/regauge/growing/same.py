"""Whether a rebuilt model is the old one but for the sizes of some index sets, and what constants changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import fx

from regauge.growing.sizes import GrownAxis, Leaf
from regauge.interpret import op_name
from regauge.solve.layout import Layout
from regauge.trace import Trace, module_path

_ARITHMETIC = frozenset(
    f"aten.{name}"
    for name in (
        *("add", "sub", "rsub", "mul", "div", "pow"),
        *("full", "full_like", "fill", "scalar_tensor", "linspace", "logspace"),
    )
)
"""Operations whose whole numbers are values; those of others are sizes, axes and positions."""
Place = tuple[int, tuple[tuple[int, int], ...]]
"""Offset of a leaf, and size and stride of its factors."""


def same_but_for_sizes(
    old: Trace,
    new: Trace,
    layout: Layout,
    axes: Mapping[str, tuple[GrownAxis, ...]],
    shared: Mapping[str, str],
    replaced: Set[str],
) -> bool:
    """The same operations of the same modules in the same order, and every parameter laid out as planned.

    Args:
        old, new: the traces.
        layout: of the new one.
        axes: parameter of the old model -> its axes after growth.
        shared: parameter of the new model -> parameter of the old one.
        replaced: paths of modules that were replaced by ones that compute the same.
    """
    if [_what(node) for node in _calls(old, replaced)] != [_what(node) for node in _calls(new, replaced)]:
        return False
    pairs = zip(_calls(old, replaced), _calls(new, replaced), strict=True)
    if not all(_tables(a, old, b, new) for a, b in pairs):
        return False
    for (name, _), value in layout.facts.parameters.items():
        planned = axes.get(shared.get(name, name))
        if planned is None or len(planned) != value.rank:
            return False
        for number, axis in enumerate(planned):
            found = [
                (piece.offset, tuple((atom.size, stride) for atom, stride in piece.factors))
                for piece in layout.pieces(value, number)
            ]
            if _flat(found) != _flat([_grown(leaf) for leaf in axis.leaves]):
                return False
    return True


def changed_constants(old: Trace, new: Trace, replaced: Set[str]) -> dict[str, list[tuple[Any, Any]]]:
    """Operation of the old trace -> numbers with a fraction that differ in the new one."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for a, b in zip(_calls(old, replaced), _calls(new, replaced), strict=True):
        before, after = list(_numbers(a, old)), list(_numbers(b, new))
        different = [(x, y) for x, y in zip(before, after, strict=False) if x != y]
        if different or len(before) != len(after):
            found[a.name] = different
    return found


def _calls(trace: Trace, replaced: Set[str]) -> list[fx.Node]:
    nodes = [node for node in trace.graph.nodes if node.op == "call_function"]
    return [node for node in nodes if module_path(node) not in replaced]


def _what(node: fx.Node) -> tuple[str, str]:
    return op_name(node), module_path(node)


def _numbers(node: fx.Node, trace: Trace) -> Iterator[float]:
    """Numbers that an operation computes with: arguments, constants of one element, and the scale that
    attention takes from the size of a query where it is given none."""
    name = op_name(node)
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, float) or (type(argument) is int and name in _ARITHMETIC):
            yield float(argument)
        elif isinstance(argument, fx.Node) and argument.name in trace.constants:
            held = trace.constants[argument.name]
            if held.numel() == 1 and not held.is_complex() and held.device.type != "meta":
                yield float(held.to(torch.float64))
    if name.startswith("aten.scaled_dot_product") and node.kwargs.get("scale") is None:
        query: Any = node.args[0]
        yield query.meta["val"].shape[-1] ** -0.5


def _tables(a: fx.Node, old: Trace, b: fx.Node, new: Trace) -> bool:
    """Whether constants of several elements that kept their shape hold what they held."""
    for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=False):
        one, other = old.constants.get(x.name), new.constants.get(y.name)
        if one is None or other is None or one.shape != other.shape or one.numel() == 1:
            continue
        if "meta" not in (one.device.type, other.device.type) and not torch.equal(one, other):
            return False
    return True


def _grown(leaf: Leaf) -> Place:
    return leaf.grown_offset, tuple((m, wide) for _, _, _, m, wide in leaf.factors)


def _flat(leaves: list[Place]) -> list[Place]:
    """Leaves without factors of one index."""
    return sorted((offset, tuple(f for f in factors if f[0] > 1)) for offset, factors in leaves)
