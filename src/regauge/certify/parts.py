"""Outputs that end in a product with a large weight: computed a part of the last axis at a time.

The logits of a language model are its largest tensor by far. Where nothing but entrywise operations follows
the last product, a part of them needs only some rows of the weight, and they are never held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from regauge.certify.lazy import LazyWeight
from regauge.trace import Trace

_PRODUCTS = frozenset({"aten.linear.default", "aten.mm.default", "aten.matmul.default"})
_ENTRYWISE = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy.default",
        "to.dtype",
        "alias.default",
        "clone.default",
        "contiguous.default",
        "detach.default",
        "mul.Tensor",
        "mul.Scalar",
        "div.Tensor",
        "div.Scalar",
        "add.Tensor",
        "add.Scalar",
        "sub.Tensor",
        "sub.Scalar",
        "neg.default",
        "tanh.default",
        "sigmoid.default",
    )
)


@dataclass(frozen=True)
class Product:
    """``then(x @ weight.t() + bias)`` for a weight [columns, in]; an ``Output`` of the comparison.

    Attributes:
        shape: of the result.
        x: left factor, any leading axes.
        weight: right factor, cut along stored axis 0.
        bias: one entry a column, or None.
        then: entrywise operations on a part of the result.
        block: elements of the weight that are cast at once.
    """

    shape: tuple[int, ...]
    x: torch.Tensor
    weight: LazyWeight
    bias: torch.Tensor | None
    then: Callable[[torch.Tensor], torch.Tensor]
    block: int

    @property
    def step(self) -> int:
        return max(1, self.block // max(1, math.prod(self.weight.stored[1:])))

    def columns(self, start: int, stop: int) -> torch.Tensor:
        with torch.no_grad():
            x = self.x.reshape(-1, self.x.shape[-1])
            part = torch.matmul(x, self.weight.cut(start, stop).t())
            if self.bias is not None:
                part = part + self.bias[start:stop]
            return self.then(part)

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """The columns ``index``, int64: only these rows of the weight are read."""
        with torch.no_grad():
            part = torch.matmul(self.x.reshape(-1, self.x.shape[-1]), self.weight.rows(index).t())
            return self.then(part if self.bias is None else part + self.bias[index])


def tails(trace: Trace) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Products that lead to one output and to nothing else, with the entrywise operations in between."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for output in dict.fromkeys(trace.outputs):
        chain: list[fx.Node] = []
        node, users = output, 1  # the output itself is used by the end of the graph
        while len(node.users) <= users and node.op == "call_function":
            if str(node.target) in _PRODUCTS:
                found[node] = tuple(reversed(chain))
                break
            if str(node.target) not in _ENTRYWISE or len(node.all_input_nodes) != 1:
                break
            chain.append(node)
            node = node.all_input_nodes[0]
    return found
