"""The loss along the straight line between two models, and how far it rises above the line of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regauge.certify.sides import StoredWeights
from regauge.merging.losses import Scorer
from regauge.stages import Progress

POINTS = 11


@dataclass(frozen=True)
class Line:
    """Losses at a + t (b − a).

    Attributes:
        losses: in nats a token, at the places of :class:`Barrier`; infinite where an output was not finite.
        barrier: the most by which they are above the straight line between the first and the last.
    """

    losses: tuple[float, ...]
    barrier: float


@dataclass(frozen=True)
class Barrier:
    """The line from the first model to the second, after alignment and as they are.

    Attributes:
        places: t, from 0 to 1.
        aligned: to the second model in the gauge of the first; None without alignment.
        plain: to the second model as it is; None where the two do not have the same tensors.
        without: why there is no plain line.
        tokens: number of tokens scored.
        text: SHA-256 of the text.
    """

    places: tuple[float, ...]
    aligned: Line | None
    plain: Line | None
    without: str | None
    tokens: int
    text: str


@dataclass(frozen=True)
class Blend:
    """Weights on the line between two checkpoints, made when they are read, float64.

    At t = 0 and t = 1 they are exactly those of the first and of the second.
    """

    a: StoredWeights
    b: StoredWeights
    t: float

    def __call__(self, name: str) -> torch.Tensor:
        return self._mixed(self.a(name), self.b(name))

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        return self._mixed(self.a.rows(name, index), self.b.rows(name, index))

    def dtype(self, name: str) -> torch.dtype | None:
        return None if self.a.dtype(name) is None else torch.float64

    def _mixed(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.double() * (1 - self.t) + b.double() * self.t


def line(scorer: Scorer, a: Path, b: Path, points: int = POINTS, tell: Progress | None = None) -> Line:
    """Losses on the line from a to b, which hold the same tensors of the same graph.

    The barrier is that of arXiv 2110.06296, section 2; the line that of arXiv 1912.05671, section 3.

    Args:
        scorer: of a text.
        a, b: directories; see :func:`regauge.merging.inputs.check_alike`.
        points: at least 2, the ends among them.
        tell: called after each point with ("scoring the line", done, points).
    """
    losses: list[float] = []
    with scorer.weights(a) as first, scorer.weights(b) as second:
        for i in range(points):
            losses.append(scorer.loss(a, Blend(first, second, i / (points - 1))))
            if tell is not None:
                tell("scoring the line", i + 1, points)
    return Line(tuple(losses), barrier_of(losses))


def barrier_of(losses: Sequence[float]) -> float:
    """max over t of loss(t) − ((1 − t) loss(0) + t loss(1)), t evenly from 0 to 1."""
    n = len(losses) - 1
    return max(loss - ((n - i) * losses[0] + i * losses[-1]) / n for i, loss in enumerate(losses))
