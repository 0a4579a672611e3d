"""Structural replacements in a traced graph, so that they can be certified before anything stores them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from regauge.trace import Trace


def with_rms_norms(trace: Trace, nodes: Collection[str]) -> Trace:
    """The same graph with the named LayerNorms as RMSNorms: y = g · x / sqrt(mean(x²) + eps) + b.

    Args:
        trace: a traced model; left as it is.
        nodes: names of ``aten.layer_norm`` operations.
    """
    wanted = set(nodes)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in trace.graph.nodes:
        new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = copy.copy(node.meta)
        if node.name in wanted:
            x, shape, gain, shift, eps = _arguments(new)
            with graph.inserting_before(new):
                norm = graph.call_function(torch.ops.aten.rms_norm.default, (x, shape, gain, eps))
                norm.meta = dict(new.meta)
                if shift is None:
                    replacement = norm
                else:
                    replacement = graph.call_function(torch.ops.aten.add.Tensor, (norm, shift))
                    replacement.meta = dict(new.meta)
            new.replace_all_uses_with(replacement)
            graph.erase_node(new)
            new = replacement
        mapping[node] = new
    return replace(trace, graph=graph, outputs=tuple(mapping[node] for node in trace.outputs))


def _arguments(node: fx.Node) -> tuple[fx.Node, list[int], fx.Node | None, fx.Node | None, float]:
    args = [*node.args, *[None] * (5 - len(node.args))]
    gain = node.kwargs.get("weight", args[2])
    shift = node.kwargs.get("bias", args[3])
    eps = node.kwargs.get("eps", args[4])
    return args[0], args[1], gain, shift, 1e-5 if eps is None else float(eps)  # type: ignore[return-value, arg-type]
