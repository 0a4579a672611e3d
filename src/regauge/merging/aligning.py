"""The other models in the gauge of the first, so that their tensors can be added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regauge.checkpoint import Checkpoint
from regauge.comparing.align import align
from regauge.errors import BadInput, Refused
from regauge.merging.inputs import check_pair, rows_of
from regauge.recipe import MoveSpec, Recipe
from regauge.rewriting import rewrite
from regauge.stages import Progress

_UNTIED = Recipe(moves=(MoveSpec(name="untie", options={}),))


@dataclass(frozen=True)
class Aligned:
    """Directories with the same tensors.

    Attributes:
        first: the first model; itself, or with its ties undone where those of the others are.
        others: the others in its gauge, stored in float64; as they are where they are closer to it so.
        similarities: mean cosine of their matrices with those of the first.
        moved: whether each was moved.
    """

    first: Path
    others: tuple[Path, ...]
    similarities: tuple[float, ...]
    moved: tuple[bool, ...]


def aligned(first: Path, others: Sequence[Path], scratch: Path, *, seed: int, tell: Progress) -> Aligned:
    """Write every other model in the gauge of the first.

    A fine-tuned model mostly is in that gauge already. Where the tensors of the two are closer as they are
    than after alignment, the model is left as it is.

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
    paths: list[Path] = []
    similarities: list[float] = []
    for number, other in enumerate(others):
        path = scratch / f"aligned-{number}"
        result = align(first, other, path, dtype=torch.float64, seed=seed, progress=tell)
        paths.append(path)
        similarities.append(result.alignment.similarity)
    reference = _untied_like(first, paths, scratch, tell)
    moved = [True] * len(paths)
    for number, other in enumerate(others):
        if not _alike(reference, other):
            continue
        plain, better = similarity(reference, other), similarity(reference, paths[number])
        if plain >= better:
            paths[number], similarities[number], moved[number] = other, plain, False
    return Aligned(reference, tuple(paths), tuple(similarities), tuple(moved))


def similarity(a: Path, b: Path) -> float:
    """Mean cosine of the matrices of two directories as they are stored, each weighed by √(its entries).

    The same mean as :attr:`regauge.matching.Alignment.similarity`, without a normal form.
    """
    total = weight = 0.0
    with Checkpoint.open(a) as first, Checkpoint.open(b) as second:
        for name in first.names:
            shape = first.shape(name)
            if len(shape) < 2 or not first.dtype(name).is_floating_point:
                continue
            aa = bb = ab = 0.0
            for x, y in rows_of([first, second], name):
                u, v = x.reshape(-1), y.reshape(-1)
                aa, bb, ab = aa + float(u @ u), bb + float(v @ v), ab + float(u @ v)
            if aa > 0:
                size = math.sqrt(math.prod(shape))
                total += size * (ab / math.sqrt(aa * bb) if bb > 0 else 0.0)
                weight += size
    return total / weight if weight else 1.0


def _alike(first: Path, other: Path) -> bool:
    try:
        check_pair(first, other)
    except (BadInput, Refused):
        return False
    return True


def _untied_like(first: Path, others: Sequence[Path], scratch: Path, tell: Progress) -> Path:
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
