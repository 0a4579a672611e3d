"""The other models in the gauge of the first, so that their tensors can be added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regauge.checkpoint import Checkpoint
from regauge.comparing.align import align
from regauge.errors import Refused
from regauge.merging.inputs import Tell
from regauge.recipe import MoveSpec, Recipe
from regauge.rewriting import rewrite

_UNTIED = Recipe(moves=(MoveSpec(name="untie", options={}),))


@dataclass(frozen=True)
class Aligned:
    """Directories with the same tensors.

    Attributes:
        first: the first model; itself, or with its ties undone where those of the others are.
        others: the others in its gauge, stored in float64.
        similarities: mean cosine of their matrices with those of the first.
    """

    first: Path
    others: tuple[Path, ...]
    similarities: tuple[float, ...]


def aligned(first: Path, others: Sequence[Path], scratch: Path, *, seed: int, tell: Tell) -> Aligned:
    """Write every other model in the gauge of the first.

    Args:
        first: directory that sets the gauge; never written to.
        others: directories of the same architecture.
        scratch: an existing directory for what is written.
        seed: of the inputs that each result is certified on.
        tell: progress.

    Raises:
        Refused: the models do not do the same with their parameters, or differ in size.
        NotEquivalent, BadInput, CheckpointError: as :func:`regauge.rewriting.rewrite`.
    """
    found, similarities = [], []
    for number, other in enumerate(others):
        path = scratch / f"aligned-{number}"
        result = align(first, other, path, dtype=torch.float64, seed=seed, progress=tell)
        found.append(path)
        similarities.append(result.alignment.similarity)
    return Aligned(_untied_like(first, found, scratch, tell), tuple(found), tuple(similarities))


def _untied_like(first: Path, others: Sequence[Path], scratch: Path, tell: Tell) -> Path:
    """The first model, or an exact copy without ties if the others store tensors that it does not."""
    names: set[str] = set()
    for path in others:
        with Checkpoint.open(path) as files:
            names |= set(files.names)
    with Checkpoint.open(first) as files:
        if names <= set(files.names):
            return first
    try:
        out = scratch / "first"
        rewrite(first, out, _UNTIED, progress=tell)
        return out
    except Refused:
        return first
