"""The two sides of a comparison: a directory or a module, traced, with its weights by name."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regauge.certify.certificate import Subject
from regauge.certify.given import tensor_bytes
from regauge.certify.measure import Function
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError, TraceError
from regauge.trace import Trace, trace

if TYPE_CHECKING:
    from regauge.hf import HFModel


@dataclass(frozen=True)
class StoredWeights:
    """Weights of a model read from a checkpoint, by the model's names; blocks of rows are mapped alone."""

    checkpoint: Checkpoint
    names: Mapping[str, str]

    def __call__(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self._stored(name))

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        start, stop = int(index[0]), int(index[-1]) + 1
        if stop - start == len(index) and torch.equal(index, torch.arange(start, stop)):
            return self.checkpoint.read_rows(self._stored(name), start, stop)
        return self(name)[index]

    def dtype(self, name: str) -> torch.dtype | None:
        return self.checkpoint.dtype(self.names[name]) if name in self.names else None

    def _stored(self, name: str) -> str:
        if name not in self.names:
            raise CheckpointError("the checkpoint has no tensor for this parameter", parameter=name)
        return self.names[name]


@dataclass(frozen=True)
class ModuleWeights:
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleWeights:
        return cls(
            {name: tensor.detach().cpu() for name, tensor in module.state_dict(keep_vars=True).items()}
        )

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return self.tensors[name].dtype if name in self.tensors else None

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True)
class Side:
    path: Path
    dtype: torch.dtype | None
    model: HFModel
    trace: Trace
    weights: StoredWeights
    logits: bool

    @property
    def function(self) -> Function:
        return Function(self.trace, self.weights, self.model.buffers())

    def subject(self) -> Subject:
        digest = self.weights.checkpoint.digest()
        return subject_of(self.path.name, self.model.class_name, digest, self.trace, self.weights)


def open_side(path: Path, files: Checkpoint, rows: int, length: int, like: Side | None = None) -> Side:
    """One side, traced; with the trace of the other side if the two have the same configuration."""
    from regauge.hf import load_meta

    held = Counter[torch.dtype]()
    for name in files.names:
        held[files.dtype(name)] += files.entry(name).nbytes
    floating = [dtype for dtype, _ in held.most_common() if dtype.is_floating_point]
    dtype = floating[0] if floating else None
    config = path / "config.json"
    if like is None or like.dtype != dtype or config.read_bytes() != (like.path / "config.json").read_bytes():
        model = load_meta(path, batch=rows, length=length, experts="grouped_mm", dtype=dtype)
        traced, logits = trace_function(model)
    else:
        model, traced, logits = like.model, like.trace, like.logits
    return side_of(path, files, dtype, model, traced, logits)


def side_of(
    path: Path, files: Checkpoint, dtype: torch.dtype | None, model: HFModel, traced: Trace, logits: bool
) -> Side:
    """One side whose model is traced already; its tensors are found in the checkpoint and checked."""
    from regauge.hf import checkpoint_names

    names = checkpoint_names(model, files.names)
    for canonical, shape in traced.shapes.items():
        if canonical in names and files.shape(names[canonical]) != shape:
            raise CheckpointError(
                "a tensor has another shape than the config says",
                parameter=names[canonical],
                expected=str(shape),
                found=str(files.shape(names[canonical])),
            )
    for group in traced.aliases.values():
        kept = list(dict.fromkeys(names[name] for name in group if name in names))
        if len({files.tensor_digest(name) for name in kept} if len(kept) > 1 else kept) > 1:
            raise BadInput(
                "the config ties tensors that are stored with different values",
                parameter=kept[0],
                found=", ".join(kept[1:]),
                way_out='set "tie_word_embeddings": false in config.json',
            )
    return Side(path, dtype, model, traced, StoredWeights(files, names), logits)


def buffers_in(side: Side, other: Side) -> dict[str, torch.Tensor]:
    """Buffers of a side as its constructor makes them in the dtype of the other side.

    A constant that a model keeps in the dtype of its weights (a scale on the embedding) rounds with them.
    """
    from regauge.hf import load_meta

    wanted = other.model.config.dtype
    if side.model.config.dtype == wanted:
        return side.model.buffers()
    config = copy.deepcopy(side.model.config)
    config.dtype = wanted
    return load_meta(config).buffers()


def subject_of(name: str, architecture: str, digest: str, traced: Trace, weights: Any) -> Subject:
    dtypes = Counter[str]()
    for canonical, shape in traced.shapes.items():
        dtype = weights.dtype(canonical)
        if dtype is not None:
            dtypes[str(dtype).removeprefix("torch.")] += math.prod(shape)
    return Subject(name, architecture, digest, sum(dtypes.values()), dict(sorted(dtypes.items())))


def storage_of(a: Any, b: Any) -> Callable[[str], torch.dtype]:
    """The floor rounds a tensor as b stores the one of that name; if b has none, as a does."""

    def dtype(name: str) -> torch.dtype:
        return b.dtype(name) or a.dtype(name) or torch.float64

    return dtype


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def check_interface(first: Side, second: Side, *, by_token: bool = False) -> None:
    """Both take and give the same shapes; ``by_token``: the last axis of an output is paired otherwise."""
    for what, x, y in (
        ("inputs", _shapes(first.model.inputs), _shapes(second.model.inputs)),
        ("outputs", _shapes(_values(first.trace), by_token), _shapes(_values(second.trace), by_token)),
    ):
        if x != y:
            raise BadInput(f"the two models have different {what}", expected=str(x), found=str(y))


def _values(traced: Trace) -> dict[str, torch.Tensor]:
    return {str(index): node.meta["val"] for index, node in enumerate(traced.outputs)}


def _shapes(tensors: Mapping[str, torch.Tensor], leading: bool = False) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape[:-1] if leading else tensor.shape) for name, tensor in tensors.items()}


def trace_function(model: HFModel) -> tuple[Trace, bool]:
    """The trace, and whether the function is the ``logits`` of the model, not everything it returns."""
    wanted = "logits"
    try:
        return trace(model.model, kwargs=model.inputs, outputs=(wanted,)), True
    except TraceError as error:
        if error.expected != wanted:
            raise
    return trace(model.model, kwargs=model.inputs), False
