"""Run a traced graph node by node on the CPU, in true float64 or as it was traced.

Many models cast to float32 inside norms, rotary tables or softmax, so that even a ``.double()`` model is
only float32-accurate. Here every floating-point cast and creation in the graph is lifted to float64;
integers and booleans stay. What the graph is given (buffers such as rotary frequencies, constants such
as the smallest float32 used as a mask) is taken as it is.

Weights are asked for by name when an operation first needs them and dropped after the last; a large one
is cast block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import fx

from regauge.certify.figures import Held, Output
from regauge.certify.lazy import BLOCK, Weights
from regauge.certify.parts import Product, tails
from regauge.certify.runner import Runner
from regauge.errors import BadInput
from regauge.trace import Trace


def run(
    trace: Trace,
    weights: Weights | Callable[[str], torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | Literal["stored"] = torch.float64,
    block: int = BLOCK,
) -> tuple[torch.Tensor, ...]:
    """The outputs of the traced function for these weights and inputs.

    Args:
        trace: the traced model.
        weights: canonical state-dict name -> tensor of the traced shape, any floating dtype, on the
            CPU; it is not changed. If it has a method ``rows(name, index)``, large weights are asked
            for by rows (of axis 0) only.
        buffers: buffer name -> tensor.
        inputs: example inputs by name, with the shapes that were traced.
        dtype: ``torch.float64`` lifts every floating-point value; ``"stored"`` runs the graph as it was
            traced, weights and inputs cast to the dtypes that were traced.
        block: elements of a weight above which it is not cast as a whole.

    Returns:
        One tensor per output of the trace, in float64 or in the traced dtype.

    Raises:
        BadInput: an input, buffer or weight is missing or has another shape than was traced.
        TraceError: an operation of the graph cannot be run or cannot be lifted.
    """
    runner = Runner(trace, weights, buffers, inputs, _lift(dtype), block)
    with runner.mode():
        values = runner.run({})
        return tuple(runner.tensor(values[node]) for node in trace.outputs)


def run_in_parts(
    trace: Trace,
    weights: Weights | Callable[[str], torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype | Literal["stored"] = torch.float64,
    block: int = BLOCK,
) -> tuple[Output, ...]:
    """As ``run``, with outputs that are read in parts and, where possible, only computed then."""
    runner = Runner(trace, weights, buffers, inputs, _lift(dtype), block)
    with runner.mode():
        values = runner.run(tails(trace))
        found = (values[node] for node in trace.outputs)
        return tuple(x if isinstance(x, Product) else Held(runner.tensor(x)) for x in found)


def held_bytes(trace: Trace, block: int = BLOCK) -> int:
    """Bytes of one entry each in float64 of the outputs that ``run_in_parts`` computes as a whole."""
    total = 0
    apart = {
        (chain or (head,))[-1]
        for head, chain in tails(trace).items()
        if any(math.prod(shape) > block for shape in _parameter_shapes(trace, head))
    }
    for node in trace.outputs:
        if node not in apart:
            total += 8 * int(node.meta["val"].numel())
    return total


def _parameter_shapes(trace: Trace, head: fx.Node) -> list[tuple[int, ...]]:
    """Shapes of the parameter behind the second factor of a product."""
    node: Any = head.args[1]
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    name = trace.parameters.get(node.name) if isinstance(node, fx.Node) else None
    return [] if name is None else [trace.shapes[name]]


def _lift(dtype: torch.dtype | Literal["stored"]) -> torch.dtype | None:
    if dtype != "stored" and dtype is not torch.float64:
        raise BadInput("a graph runs in float64 or as stored", found=str(dtype))
    return None if dtype == "stored" else torch.float64
