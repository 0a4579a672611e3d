"""Whether two traced models compute the same layer by layer, and the same around their layers.

Every value gets a token, a number that stands for an operation with its arguments: two values have the same
token if they are the same expression of inputs, parameters and buffers. Within a layer the stream that enters
is one token, and parameters go by their names within the layer; so layers can be compared with each other.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regauge.layers import Layer, Stack
from regauge.trace import Trace
from regauge.walk import Walk


@dataclass
class Tokens:
    """Expression -> token. Shared by the models that are to be compared."""

    known: dict[Hashable, int] = field(default_factory=dict)

    def of(self, expression: Hashable) -> int:
        return self.known.setdefault(expression, len(self.known))


@dataclass(frozen=True)
class Outline:
    """What a model computes.

    Attributes:
        layers: for each layer, the token of the stream that leaves it.
        around: tokens of what enters the first layer, and of the outputs as functions of what leaves the
            last and, where they read it, of what leaves others.
    """

    layers: tuple[int, ...]
    around: tuple[int, ...]


def outline(walk: Walk, stack: Stack, tokens: Tokens, place: Mapping[int, int] | None) -> Outline:
    """The outline of a traced model.

    Args:
        walk: whose trace it is.
        stack: its layers.
        tokens: see :class:`Tokens`.
        place: number of a layer -> number to call it by; None: its own. A layer not in it has none.
    """
    place = {number: number for number in range(len(stack.layers))} if place is None else place
    return _Reader(walk.trace, stack, tokens, place).outline()


class _Reader:
    def __init__(self, trace: Trace, stack: Stack, tokens: Tokens, place: Mapping[int, int]) -> None:
        self.trace, self.stack, self.tokens, self.place = trace, stack, tokens, place
        self.known: dict[fx.Node, int] = {}

    def outline(self) -> Outline:
        last = self.stack.layers[-1].leaving
        left: dict[fx.Node, Hashable] = {
            layer.leaving: ("leaves", self.place.get(number, f"{number} of before"))
            for number, layer in enumerate(self.stack.layers)
        }
        left[last] = ("leaves", "the last")
        for node in self.trace.graph.nodes:
            if node.op != "output":
                token = self._token(node, self.known, self._name)
                self.known[node] = self.tokens.of(left[node]) if node in left else token
        layers = tuple(self._layer(number, layer) for number, layer in enumerate(self.stack.layers))
        outputs = (self.known[node] for node in self.trace.outputs)
        return Outline(layers, (self.known[self.stack.layers[0].entering], *outputs))

    def _layer(self, number: int, layer: Layer) -> int:
        prefix = self.stack.name(number, "")

        def name(held: str) -> str:
            return f"own {held.removeprefix(prefix)}" if held.startswith(prefix) else self._name(held)

        local: ChainMap[fx.Node, int] = ChainMap({}, self.known)
        for node in layer.nodes:
            for source in node.all_input_nodes:
                if source.op == "placeholder" and source not in local.maps[0]:
                    local[source] = self._token(source, local, name)
        local[layer.entering] = self.tokens.of("the stream")
        for node in layer.nodes:
            local[node] = self._token(node, local, name)
        return local[layer.leaving]

    def _name(self, held: str) -> str:
        """A parameter outside the layer in question, by the number that its own layer goes by."""
        found = self.stack.place(held)
        if found is None:
            return held
        number = self.place.get(found[0])
        return f"{held} of before" if number is None else self.stack.name(number, found[1])

    def _token(self, node: fx.Node, known: Mapping[fx.Node, int], name: Any) -> int:
        trace = self.trace
        if node.op == "placeholder":
            if node.name in trace.parameters:
                return self.tokens.of(("parameter", name(trace.parameters[node.name])))
            if node.name in trace.buffers:
                return self.tokens.of(("buffer", name(trace.buffers[node.name])))
            if node.name in trace.constants:
                return self.tokens.of(("constant", *_content(trace.constants[node.name])))
            return self.tokens.of(("input", node.name))

        def plain(value: Any) -> Hashable:
            if isinstance(value, fx.Node):
                return ("value", known[value])
            if isinstance(value, (list, tuple)):
                return tuple(plain(item) for item in value)
            if isinstance(value, Mapping):
                return tuple((key, plain(item)) for key, item in value.items())
            return (type(value).__name__, repr(value))

        return self.tokens.of((str(node.target), plain(node.args), plain(node.kwargs)))


def _content(constant: torch.Tensor) -> tuple[Hashable, ...]:
    shape = str(constant.dtype), tuple(constant.shape)
    if constant.device.type == "meta":
        return shape
    return (*shape, repr(constant.detach().cpu().flatten().tolist()))
