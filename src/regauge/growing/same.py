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
        pairs = list(zip(_numbers(a, old), _numbers(b, new), strict=False))
        different = [(x, y) for x, y in pairs if x != y]
        if different or len(list(_numbers(a, old))) != len(list(_numbers(b, new))):
            found[a.name] = different
    return found


def _calls(trace: Trace, replaced: Set[str]) -> list[fx.Node]:
    nodes = [node for node in trace.graph.nodes if node.op == "call_function"]
    return [node for node in nodes if module_path(node) not in replaced]


def _what(node: fx.Node) -> tuple[str, str]:
    return op_name(node), module_path(node)


def _numbers(node: fx.Node, trace: Trace) -> Iterator[float]:
    """Floating-point arguments of an operation, and constants of one element."""
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, float):
            yield argument
        elif isinstance(argument, fx.Node) and argument.name in trace.constants:
            held = trace.constants[argument.name]
            if held.numel() == 1 and held.is_floating_point() and held.device.type != "meta":
                yield float(held.to(torch.float64))


def _grown(leaf: Leaf) -> Place:
    return leaf.grown_offset, tuple((m, wide) for _, _, _, m, wide in leaf.factors)


def _flat(
    leaves: list[tuple[int, tuple[tuple[int, int], ...]]],
) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """Leaves without factors of one index."""
    return sorted((offset, tuple(f for f in factors if f[0] > 1)) for offset, factors in leaves)
