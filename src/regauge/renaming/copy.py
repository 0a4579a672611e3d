"""A copy of a directory in which every tensor has the name that its architecture gives it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from regauge.atlas import Action, Kind
from regauge.checkpoint import Checkpoint
from regauge.elements import DIAGONAL
from regauge.errors import CheckpointError, Refused
from regauge.hf import HFModel, checkpoint_names, load_meta, read_config
from regauge.matching.correspondence import paired_by_use
from regauge.matching.sides import Rows, evenly, side_of_model
from regauge.model import CheckpointModel
from regauge.renaming.anchors import LARGEST
from regauge.renaming.assign import Assigned, Assignment
from regauge.shards import Shard, header_bytes, read_index
from regauge.trace import Trace, trace, untie

RUN = 16
"""Rows of a long table that are read together."""


@dataclass(frozen=True)
class Renamed:
    """What was named again.

    Attributes:
        count: tensors that got another name.
        unsure: parameters that another tensor would fit as well.
    """

    count: int
    unsure: tuple[str, ...]


@contextmanager
def named_again(
    a: CheckpointModel, b: Path, files: Checkpoint
) -> Generator[tuple[CheckpointModel, Renamed | None]]:
    """b with names that its architecture has, and None where it has them already.

    Shapes and contents decide, never names; contents are compared with those of a, in what no move along the
    gauge changes. The copy lies in a temporary directory, and is gone at the end.

    Args:
        a: the model whose names are known.
        b: a directory.
        files: it, open.

    Raises:
        CheckpointError, Refused: as :func:`regauge.hf.checkpoint_names` on b, where shapes do not fit either.
        BadInput, TraceError: b cannot be built or traced.
    """
    held, config = load_meta(b), read_config(b)
    try:
        checkpoint_names(held, files.names)
    except (CheckpointError, Refused) as error:
        traced = trace(held.model, (), held.inputs)
        found = _found(a, held, traced, files)
        if found is None:
            raise error from None
    else:
        yield CheckpointModel.built(held, config, files), None
        return
    names = {tensor: name for name, tensor in found.names.items()}
    changed = sum(tensor != name for tensor, name in names.items())
    with tempfile.TemporaryDirectory(prefix="regauge-named-") as folder:
        _copied(files, Path(folder), names)
        with Checkpoint.open(folder) as copied:
            model = CheckpointModel.built(held, config, copied, traced)
            yield model, Renamed(changed, found.unsure)


class _Model:
    """A model whose names are known, as it is stored and as its folds leave it."""

    def __init__(self, model: CheckpointModel, traced: Trace) -> None:
        self.plain, self.folded = model, side_of_model(model, structure=False)
        other = model.gauge.untied
        pairs = paired_by_use(untie(traced), other)
        self.order = list(dict.fromkeys(traced.canonical[name] for name in pairs))
        self.pairs = {
            traced.canonical[name]: twin
            for name, twin in reversed(pairs.items())
            if traced.shapes[traced.canonical[name]] == other.shapes[twin]
        }
        self._actions: dict[str, list[tuple[Kind, Action]]] = {}
        for generator in self.folded.atlas.generators:
            for action in generator.actions:
                self._actions.setdefault(action.parameter, []).append((generator.kind, action))

    def forms(self, name: str) -> list[torch.Tensor]:
        if name not in self.pairs:
            return []
        other = self.pairs[name]
        found = [read_some(self.plain.files, self.plain.names[other])]
        if other in self.folded.shapes:
            found.append(some(self.folded.shapes[other], partial(self.folded.read, other)))
        return found

    def chart(self, name: str) -> float:
        return next((action.chart for _, action in self._acting(name)), 0.0)

    def _acting(self, name: str) -> Sequence[tuple[Kind, Action]]:
        return self._actions.get(self.pairs.get(name, ""), ())

    def scaled(self, name: str) -> tuple[int, int] | None:
        for kind, action in self._acting(name):
            if kind in DIAGONAL and len(action.parts) == 1:
                factors = action.parts[0].factors
                whole = action.parts[0].size == self.folded.shapes[action.parameter][0]
                if whole and len(factors) == 2 and factors[-1].name == action.acting:
                    return factors[-1].size, factors[0].size
        return None


def _found(a: CheckpointModel, held: HFModel, traced: Trace, files: Checkpoint) -> Assigned | None:
    order = sorted(files.names, key=_natural)
    stored = {name: tuple(files.shape(name)) for name in order if files.dtype(name).is_floating_point}
    model, kept = _Model(a, traced), model_tensors(held)
    shapes = {n: tuple(traced.shapes[n]) for n in dict.fromkeys([*model.order, *traced.shapes]) if n in kept}
    assignment = Assignment(shapes, stored, model, partial(read_some, files))
    return assignment.run() if assignment.fits() else None


def some(shape: Sequence[int], read: Callable[[Rows], torch.Tensor]) -> torch.Tensor:
    """A tensor, or rows evenly over it if it is a long table, float64."""
    if len(shape) < 2 or shape[0] <= 4 * LARGEST:
        return read(None).to(torch.float64)
    pieces = evenly(shape[0], RUN, LARGEST // RUN)
    return torch.cat([read(piece) for piece in pieces]).to(torch.float64)


def read_some(files: Checkpoint, name: str) -> torch.Tensor:
    """The same of a stored tensor."""

    def read(rows: Rows) -> torch.Tensor:
        return files.read(name) if rows is None else files.read_rows(name, *rows)

    return some(files.shape(name), read)


def model_tensors(held: HFModel) -> set[str]:
    """Names of what a checkpoint of the model stores."""
    return {n for n, t in held.model.state_dict(keep_vars=True).items() if t.is_floating_point()}


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in a name as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _copied(source: Checkpoint, out: Path, names: Mapping[str, str]) -> None:
    for file in source.side_files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / file, out / file)
    taken = set(names.values())

    def name(tensor: str) -> str:
        return names.get(tensor) or (f"unused.{tensor}" if tensor in taken else tensor)

    for shard in source.shards:
        _shard(source.path, out, shard, name)
    if source.index is not None:
        held = {name(tensor): file for tensor, file in read_index(source.path, source.index).items()}
        (out / source.index).write_text(json.dumps({"metadata": {}, "weight_map": held}))


def _shard(source: Path, out: Path, shard: Shard, name: Callable[[str], str]) -> None:
    """The bytes of the tensors as they are, behind a header with other names."""
    header = json.loads(shard.header[8:])
    with (source / shard.file).open("rb") as old, (out / shard.file).open("wb") as new:
        new.write(header_bytes({k if k == "__metadata__" else name(k): v for k, v in header.items()}))
        old.seek(len(shard.header))
        shutil.copyfileobj(old, new, 1 << 24)
