"""What a report says of weights: outliers of every matrix, spectra of a few, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput
from regauge.hf import checkpoint_names, load_meta
from regauge.report.figures import Spread, singular_values, spread

SPECTRA = 9
"""Matrices whose singular values are shown, at most."""

_SIDE, _ENTRIES, _SHOWN = 2048, 1 << 25, 200
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """One matrix (two axes or more) of the rewritten model.

    Attributes:
        name: state-dict name.
        shape: its shape.
        before, after: how its entries spread; ``before`` is None without a source, or if it was made.
    """

    name: str
    shape: tuple[int, ...]
    before: Spread | None
    after: Spread


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix.

    Attributes:
        name: state-dict name.
        shape: (rows, columns).
        index: which singular values are given, counted from 1; all up to 200, else evenly chosen.
        before, after: them, largest first; ``before`` is None without a source.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    before: tuple[float, ...] | None
    after: tuple[float, ...]


class Stored:
    """Tensors of a directory by the names of the model. Close it, or use it as a context manager.

    Args:
        directory: a Hugging Face directory.

    Raises:
        BadInput, CheckpointError, Refused: as :func:`regauge.hf.checkpoint_names`.
    """

    def __init__(self, directory: Path) -> None:
        self.files = Checkpoint.open(directory)
        self.names = checkpoint_names(load_meta(directory), self.files.names)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every floating-point tensor with two axes or more, tied ones once."""
        first = {tensor: name for name, tensor in reversed(self.names.items())}
        return {
            name: self.files.shape(tensor)
            for name, tensor in self.names.items()
            if first[tensor] == name
            and len(self.files.shape(tensor)) > 1
            and self.files.dtype(tensor) in _FLOATS
        }

    def spread(self, name: str) -> Spread:
        return spread(lambda: (block for _, block in self.files.blocks(self.names[name])))

    def read(self, name: str) -> torch.Tensor:
        return self.files.read(self.names[name])

    def file_bytes(self) -> int:
        """Bytes of the weight files on the disk, headers included."""
        return sum((self.files.path / shard.file).stat().st_size for shard in self.files.shards)


def weights(after: Stored, before: Stored | None, tell: Callable[[int, int], None]) -> tuple[Weight, ...]:
    """Outliers of every matrix of ``after``, in the order of the model. Calls ``tell`` with (done, total)."""
    found: list[Weight] = []
    matrices = after.matrices
    for done, (name, shape) in enumerate(matrices.items()):
        tell(done, len(matrices))
        old = before.spread(name) if before is not None and name in before.names else None
        found.append(Weight(name, shape, old, after.spread(name)))
    return tuple(found)


def chosen(shapes: Mapping[str, Sequence[int]], limit: int = SPECTRA) -> tuple[str, ...]:
    """Names of the matrices whose spectra are shown: a function of names and shapes alone.

    Matrices of a shape whose names end alike (``fc1.weight``) are of a kind. Of each kind the middle one; the
    largest first, then by the ends of their names; only matrices whose shorter side is at most 2048, with at
    most 2²⁵ entries.
    """
    kinds: dict[tuple[int, str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and 2 <= min(shape) <= _SIDE and math.prod(shape) <= _ENTRIES:
            kind = (-math.prod(shape), ".".join(name.split(".")[-2:]), tuple(shape))
            kinds.setdefault(kind, []).append(name)
    return tuple(names[len(names) // 2] for _, names in sorted(kinds.items())[:limit])


def spectra(after: Stored, before: Stored | None, tell: Callable[[int, int], None]) -> tuple[Spectrum, ...]:
    """Singular values of the :func:`chosen` matrices of ``after``. Calls ``tell`` with (done, total)."""
    found: list[Spectrum] = []
    matrices = after.matrices
    names = chosen(matrices)
    for done, name in enumerate(names):
        tell(done, len(names))
        new = singular_values(after.read(name))
        old = None
        if before is not None and name in before.names:
            matrix = before.read(name)
            old = singular_values(matrix) if tuple(matrix.shape) == matrices[name] else None
        index = _evenly(len(new))
        found.append(
            Spectrum(
                name,
                matrices[name],
                tuple(i + 1 for i in index),
                None if old is None else tuple(old[i] for i in index),
                tuple(new[i] for i in index),
            )
        )
    return tuple(found)


def _evenly(count: int) -> list[int]:
    if count <= _SHOWN:
        return list(range(count))
    return [round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]


def check_digest(stored: Stored, expected: str, what: str, way_out: str) -> None:
    """Raise ``BadInput`` if the contents are not those that the manifest names."""
    found = stored.files.digest()
    if found != expected:
        raise BadInput(
            f"these are not the weights of {what}",
            expected=f"contents with SHA-256 {expected[:16]}…",
            found=f"{found[:16]}… in {stored.files.path}",
            way_out=way_out,
        )
