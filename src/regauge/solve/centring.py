"""Where a stream must be centred once, in the forward pass, so that what reads it finds mean zero.

A stream that something other than a linear map writes to (a GELU, a gain) cannot be centred in the weights
alone. Where nobody sees its mean, ``x ← x − mean_c x[…, c]`` at the entrance of the module that reads it
changes nothing, and everything after it is centred.
"""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from regauge.facts import Value
from regauge.interpret import Walk, op_name
from regauge.solve.blind import Blind
from regauge.solve.layout import Layout
from regauge.solve.zero_mean import zero_mean_inputs
from regauge.trace import module_path, plain_path


def entrances(
    walk: Walk, layout: Layout, folded: Set[int], centred: Set[tuple[str, int]], graph: fx.Graph
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Modules whose input is to be centred, and the LayerNorms whose input then has mean zero.

    Args:
        walk, layout: of the model.
        folded: ids of parameter values that are one.
        centred: (parameter, axis) pairs whose mean along the axis is zero.
        graph: the traced graph.

    Returns:
        path of each module, in order of use -> (id of its input, axis of the mean), and names of operations.
    """
    norms = {node.name for node in graph.nodes if op_name(node) == "aten.layer_norm"}
    found = [name for name in zero_mean_inputs(walk.result, centred) if name in norms]
    paths: dict[str, tuple[int, int]] = {}
    if len(found) == len(norms):
        return paths, tuple(found)
    blind = Blind(walk, layout, folded).solve()
    calls = _calls(graph)
    taken: dict[int, int] = {}
    for node in graph.nodes:
        value = walk.results.get(node.name)
        path = _entered(node)
        if not isinstance(value, Value) or value.rank < 2 or not path or len(calls.get(path, ())) != 1:
            continue
        if any(user.name in norms and module_path(user) == path for user in node.users):
            continue
        axis = value.rank - 1
        if not all(any(s <= {axis} for s in blind.of(block)) for block in layout.blocks(value)):
            continue
        more = [n for n in zero_mean_inputs(walk.result, centred, {**taken, value.id: axis}) if n in norms]
        if len(more) > len(found):
            taken[value.id], found = axis, more
            paths[path] = (value.id, axis)
    return paths, tuple(found)


def _entered(node: fx.Node) -> str:
    """The innermost module that holds every use of a value made outside it; empty if there is none."""
    paths = [module_path(user).split(".") for user in node.users if user.op == "call_function"]
    if node.op != "call_function" or len(paths) != len(node.users) or not paths:
        return ""
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    path = ".".join(common)
    return "" if f"{module_path(node)}.".startswith(f"{path}.") else path


def _calls(graph: fx.Graph) -> dict[str, set[str]]:
    """Path of a module -> its calls."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        for call, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            found.setdefault(plain_path(path), set()).add(str(call))
    return found
