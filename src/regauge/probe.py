"""Probing: does a generator of the atlas really keep the function, and does a larger one not?

Weights are drawn at random, so this needs no checkpoint; it certifies the atlas, not a rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from regauge.act import act, apply_generator
from regauge.atlas import Atlas, Generator, Kind
from regauge.certify.run import run
from regauge.elements import random_element
from regauge.trace import Trace

LARGER: Mapping[Kind, Kind] = {
    Kind.PERMUTATION: Kind.ORTHOGONAL_ONES,
    Kind.SIGN: Kind.SCALE,
    Kind.POSITIVE: Kind.SCALE,
    Kind.SCALE: Kind.GENERAL_LINEAR,
    Kind.COMPLEX: Kind.GENERAL_LINEAR,
    Kind.ORTHOGONAL_ONES: Kind.ORTHOGONAL,
    Kind.ORTHOGONAL: Kind.GENERAL_LINEAR,
}
"""The next larger kind: an element of it must change the function, or the generator is too small."""


@dataclass(frozen=True)
class Probe:
    """Result of one random element.

    Attributes:
        generator: its id.
        error: ||f(g·w) − f(w)|| / ||f(w)|| in float64.
    """

    generator: str
    error: float


def random_state(trace: Trace, seed: int) -> dict[str, torch.Tensor]:
    """Random float64 weights of the traced shapes: vectors uniform in [0.5, 1.5], others normal with
    variance one over the fan-in."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, shape in trace.shapes.items():
        if len(shape) < 2:
            state[name] = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            fan = max(1, math.prod(shape[1:]))
            state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / fan**0.5
    return state


class Prober:
    """Runs one traced model on fixed inputs with changing weights, in true float64."""

    def __init__(
        self, trace: Trace, buffers: Mapping[str, torch.Tensor], inputs: Mapping[str, Any], seed: int
    ) -> None:
        self.trace = trace
        self.buffers = buffers
        self.inputs = inputs
        self.seed = seed
        self.state = random_state(trace, seed)
        self.base = self._run(self.state)

    def _run(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        weights: Callable[[str], torch.Tensor] = state.__getitem__
        return list(run(self.trace, weights, self.buffers, self.inputs))

    def error(self, state: Mapping[str, torch.Tensor]) -> float:
        """Relative difference of all outputs; infinite if anything is not finite."""
        square = total = 0.0
        for a, b in zip(self.base, self._run(state), strict=True):
            if not bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all()):
                return math.inf
            mask = torch.isfinite(a)
            square += float((a[mask] - b[mask]).square().sum())
            total += float(a[mask].square().sum())
        return math.sqrt(square / total) if total else math.inf

    def probe(self, generator: Generator, kind: Kind | None = None) -> Probe:
        """Draw an element of the generator (or of ``kind`` in its place) and measure.

        Translations and null directions have elements of their own form; see :func:`shift_state`.
        """
        draw = torch.Generator().manual_seed(self.seed * 7919 + _number(generator.id))
        if generator.kind in (Kind.TRANSLATION, Kind.NULL):
            return Probe(generator.id, self.error(shift_state(self.state, generator, draw)))
        element = random_element(kind or generator.kind, generator.size, generator.count, draw)
        if kind is None:
            return Probe(generator.id, self.error(apply_generator(self.state, generator, element)))
        copies = tuple(name for name, _ in generator.copies)
        state = dict(self.state)
        for action in generator.actions:
            state[action.parameter] = act(state[action.parameter], action, element, copies)
        return Probe(generator.id, self.error(state))

    def all(self, atlas: Atlas) -> Iterator[Probe]:
        for generator in atlas.generators:
            yield self.probe(generator)


def _number(id_: str) -> int:
    return int("".join(c for c in id_ if c.isdigit()) or 0)


def shift_state(
    state: Mapping[str, torch.Tensor], generator: Generator, draw: torch.Generator
) -> dict[str, torch.Tensor]:
    """A random element of a translation or of a null direction, applied to a state dict."""
    from regauge.shift import random_shift

    return random_shift(state, generator, draw)
