"""What was done to a model that is derived from another: read off what alignment leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from regauge.checkpoint import Checkpoint
from regauge.comparing.comparison import Change
from regauge.comparing.features import pair_features
from regauge.comparing.kinds import evidence, kind
from regauge.matching import Alignment
from regauge.matching.moved import Pair

LOOKED_AT = 24
"""Matrices that are looked at, evenly over the model."""

LARGEST = 1 << 23
"""Entries of a matrix that is looked at."""


def changes_of(alignment: Alignment, pair: Pair, path_b: Path) -> tuple[Change, ...]:
    """Kinds of change that the leftover shows.

    Args:
        alignment: of the pair.
        pair: both models, b moved.
        path_b: directory of b, to see how its values are stored.
    """
    names = [t.parameter for t in alignment.tensors if len(t.shape) > 1 and t.norm > 0]
    names = _spread([name for name in names if math.prod(pair.a.shapes[name]) <= LARGEST])

    def both() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name in names:
            chunks = list(pair.chunks(name))
            yield torch.cat([x for x, _ in chunks]), torch.cat([y for _, y in chunks])

    if not names:
        return ()
    traced_a, traced_b = pair.a.trace.shapes, pair.b.trace.shapes
    resized = [tuple(traced_a[n]) != tuple(traced_b[pair.names[n]]) for n in names]
    found = {**pair_features(both(), _stored(path_b)), "resized": sum(resized) / len(resized)}
    named = kind(found)
    return (Change(str(named), evidence(named, found)),)


def _stored(path: Path) -> list[torch.Tensor]:
    with Checkpoint.open(path) as files:
        names = [n for n in files.names if len(files.shape(n)) > 1 and math.prod(files.shape(n)) <= LARGEST]
        held = [files.read(name) for name in _spread(names)]
    return [tensor.to(torch.float32) for tensor in held if tensor.is_floating_point()]


def _spread(names: list[str]) -> list[str]:
    """At most ``LOOKED_AT`` of the names, evenly."""
    step = max(1, -(-len(names) // LOOKED_AT))
    return names[::step]
