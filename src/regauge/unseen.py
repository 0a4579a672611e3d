"""Values that code can reach which the trace does not show: where a parameter lies that no operation reads.

A model of text and images, traced on text, has a vision tower that no operation reads, and whose result takes
the place of embeddings where there is an image. What the traced path computes says nothing of that.

A module's code can use what the modules below it hold, and nothing else. So a parameter that is not read can
only meet values that pass through the code of a module above it: what stays inside other modules is safe.
"""

from __future__ import annotations

from torch import fx

from regauge.trace import Trace, plain_path


def unseen(trace: Trace) -> dict[fx.Node, str]:
    """Operation -> a parameter that no operation reads, and that other code may join with its result."""
    read = {trace.parameters[n.name] for n in trace.graph.nodes if n.name in trace.parameters and n.users}
    read |= {trace.parameters[n.name] for n in trace.outputs if n.name in trace.parameters}
    above: dict[str, str] = {}
    for name in trace.parameters.values():
        if name not in read:
            parts = name.split(".")
            for count in range(len(parts)):
                above.setdefault(".".join(parts[:count]), name)
    if not above:
        return {}
    frames = {node: _frames(node) for node in trace.graph.nodes if node.op == "call_function"}
    found: dict[fx.Node, str] = {}
    for node, stack in frames.items():
        for user in node.users:
            other = frames.get(user, ("",))
            shared = next((i for i, (a, b) in enumerate(zip(stack, other, strict=False)) if a != b), None)
            start = max(0, (min(len(stack), len(other)) if shared is None else shared) - 1)
            name = next((above[p] for p in (*stack[start:], *other[start:]) if p in above), None)
            if name is not None:
                found[node] = name
                break
    return found


def _frames(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose code is running, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return ("", *dict.fromkeys(path for path in (plain_path(raw) for raw, _ in stack.values()) if path))
