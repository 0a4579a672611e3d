"""Certify two directories, or two modules, with no memory of how one was made from the other."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from regauge.certify.certificate import Certificate, Inputs, Subject, software
from regauge.certify.lazy import BLOCK
from regauge.certify.measure import EXACT, FLOOR_FACTOR, Function, compare_functions, judge
from regauge.certify.run import held_bytes
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError, TraceError
from regauge.trace import Trace, trace

if TYPE_CHECKING:
    from regauge.hf import HFModel

TOKENS = 96
LENGTH = 48
MEMORY = 512 << 20
ROWS = 2
ITEMS = 4
"""Items (images, waveforms) on which models without tokens are compared."""


def certify(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    max_memory: int | None = None,
    weights_b_exact: Callable[[str], torch.Tensor] | None = None,
    stored: bool = True,
    factor: float = FLOOR_FACTOR,
) -> Certificate:
    """Compare the functions of two Hugging Face directories.

    The architectures may differ as long as inputs and outputs have the same shapes. Weights are
    streamed from safetensors; no model is ever loaded.

    Args:
        a, b: the original and the other directory.
        text: a UTF-8 file to take tokens from, with a's tokenizer; default: random inputs from ``seed``.
        tokens: number of tokens to compare at least, for models that read or write tokens.
        length: tokens in a row; capped by what the model admits.
        seed: of random inputs and of the rounding floor.
        max_memory: bytes to stay near, as far as outputs and blocks of weights decide it; default 512 MiB.
        weights_b_exact: b's weights in float64 before they were rounded, by canonical name; stronger
            evidence than the stored ones. May offer ``rows``, see :mod:`regauge.certify.lazy`.
        stored: whether to run in the stored dtypes too.
        factor: rounding floors that count as rounding.

    Raises:
        BadInput: a directory, model or text that cannot be used; shapes that do not match.
        CheckpointError: damaged or missing tensors.
        Refused: a checkpoint that transformers converts when it loads it.
    """
    with Checkpoint.open(a) as files_a, Checkpoint.open(b) as files_b:
        ids = None if text is None else _token_ids(Path(a), Path(text), tokens)
        if ids is not None:
            length = min(length, len(ids))
        limit = (max_memory or MEMORY) // 2
        rows = min(ROWS, max(1, math.ceil(tokens / length)))  # of one run
        block = max(1 << 16, min(BLOCK, (max_memory or MEMORY) // 256))
        while True:
            first = _open(Path(a), files_a, rows, length)
            row_bytes = held_bytes(first.trace, block) // rows * 4
            if row_bytes * rows <= limit:
                break
            if rows > 1:
                rows = 1
            elif "input_ids" in first.model.inputs and length > 2:
                length = max(2, length // 2)
            else:
                raise BadInput(
                    "the outputs do not fit into the memory allowed",
                    expected=f"{2 * row_bytes} bytes",
                    found=str(2 * limit),
                    way_out="raise max_memory",
                )
        second = _open(Path(b), files_b, rows, length, like=first)
        _same_interface(first, second)
        shapes = {name: tuple(value.shape) for name, value in first.model.inputs.items()}
        sizes = [math.prod(shapes[name]) for name in ("decoder_input_ids", "input_ids") if name in shapes]
        count = max(1, math.ceil(tokens / sizes[0])) if sizes else ITEMS // rows
        if ids is not None:
            batches = _text_batches(ids, shapes, count)
        else:
            batches = [
                first.model.real_inputs(batch=rows, length=length, seed=seed + i) for i in range(count)
            ]
        storage = _storage(first.weights, second.weights)
        evidence = compare_functions(
            first.function,
            second.function,
            batches,
            exact=weights_b_exact,
            storage=storage,
            logits=first.logits,
            stored=stored,
            seed=seed,
            block=block,
        )
        verdict, reason = judge(evidence, factor=factor)
        return Certificate(
            verdict=verdict,
            reason=reason,
            a=first.subject(),
            b=second.subject(),
            inputs=Inputs(
                "random" if ids is None else "text",
                _digest_inputs(batches),
                seed,
                len(batches),
                shapes,
                evidence.positions,
                looked_up(first.trace, batches),
            ),
            evidence=evidence,
            exact_threshold=EXACT,
            floor_factor=factor,
            floor_dtype=_common(storage(name) for name in first.trace.shapes),
            floor_seed=seed,
            software=software(),
        )


def certify_modules(
    a: nn.Module,
    b: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] | None = None,
    logits: bool = False,
    weights_b_exact: Callable[[str], torch.Tensor] | None = None,
    seed: int = 0,
    stored: bool = True,
    factor: float = FLOOR_FACTOR,
) -> Certificate:
    """Compare the functions of two modules with weights, on the example inputs given.

    Args:
        a, b: modules on the CPU; traced in eval mode.
        args, kwargs: example inputs with values; both are run on exactly these.
        outputs: names of output fields that define the function, see :func:`regauge.trace.trace`.
        logits: whether the last axis of the outputs holds log-probabilities up to a constant.
        weights_b_exact, seed, stored, factor: as in :func:`certify`.

    Raises:
        BadInput, TraceError: a module that cannot be traced, or shapes that do not match.
    """
    sides: list[tuple[Function, _ModuleWeights]] = []
    for module in (a, b):
        weights = _ModuleWeights.of(module)
        traced = trace(module, args, kwargs, outputs=outputs)
        sides.append((Function(traced, weights, dict(module.named_buffers(remove_duplicate=False))), weights))
    (first, weights_a), (second, weights_b) = sides
    leaves = tree_leaves((args, dict(kwargs or {})))
    given = dict(zip(first.trace.inputs, leaves, strict=True))
    if len(second.trace.inputs) != len(leaves):
        raise BadInput("the two modules take different inputs")
    storage = _storage(weights_a, weights_b)
    evidence = compare_functions(
        first,
        second,
        [given],
        exact=weights_b_exact,
        storage=storage,
        logits=logits,
        stored=stored,
        seed=seed,
    )
    verdict, reason = judge(evidence, factor=factor)
    shapes = {name: tuple(value.shape) for name, value in given.items() if isinstance(value, torch.Tensor)}
    return Certificate(
        verdict=verdict,
        reason=reason,
        a=_subject(type(a).__name__, type(a).__name__, weights_a.digest(), first.trace, weights_a),
        b=_subject(type(b).__name__, type(b).__name__, weights_b.digest(), second.trace, weights_b),
        inputs=Inputs("given", _digest_inputs([given]), seed, 1, shapes, evidence.positions),
        evidence=evidence,
        exact_threshold=EXACT,
        floor_factor=factor,
        floor_dtype=_common(storage(name) for name in first.trace.shapes),
        floor_seed=seed,
        software=software(),
    )


def looked_up(traced: Trace, batches: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Tables indexed by an input: parameter -> (different rows the inputs look up, rows in all)."""
    found: dict[str, tuple[int, int]] = {}
    batches = list(batches)
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.aten.embedding.default:
            continue
        table, index = node.args[0], node.args[1]
        while isinstance(index, fx.Node) and index.op == "call_function" and len(index.all_input_nodes) == 1:
            index = index.all_input_nodes[0]
        if not isinstance(index, fx.Node) or not isinstance(table, fx.Node):
            continue
        name = traced.parameters.get(table.name)
        if name is not None and index.name in traced.inputs and all(index.name in batch for batch in batches):
            ids = torch.cat([torch.as_tensor(batch[index.name]).reshape(-1) for batch in batches])
            found[name] = (int(ids.unique().numel()), traced.shapes[name][0])
    return found


# -- the two sides -------------------------------------------------------------------------------------


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
class _ModuleWeights:
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleWeights:
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
            digest.update(_bytes(tensor))
        return digest.hexdigest()


@dataclass(frozen=True)
class _Side:
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
        return _subject(self.path.name, self.model.class_name, digest, self.trace, self.weights)


def _open(path: Path, files: Checkpoint, rows: int, length: int, like: _Side | None = None) -> _Side:
    """One side, traced; with the trace of the other side if the two have the same configuration."""
    from regauge.hf import checkpoint_names, load_meta

    held = Counter[torch.dtype]()
    for name in files.names:
        held[files.dtype(name)] += files.entry(name).nbytes
    floating = [dtype for dtype, _ in held.most_common() if dtype.is_floating_point]
    dtype = floating[0] if floating else None
    config = path / "config.json"
    if like is None or like.dtype != dtype or config.read_bytes() != (like.path / "config.json").read_bytes():
        model = load_meta(path, batch=rows, length=length, experts="grouped_mm", dtype=dtype)
        traced, logits = _trace(model)
    else:
        model, traced, logits = like.model, like.trace, like.logits
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
    return _Side(path, dtype, model, traced, StoredWeights(files, names), logits)


def _subject(name: str, architecture: str, digest: str, traced: Trace, weights: Any) -> Subject:
    dtypes = Counter[str]()
    for canonical, shape in traced.shapes.items():
        dtype = weights.dtype(canonical)
        if dtype is not None:
            dtypes[str(dtype).removeprefix("torch.")] += math.prod(shape)
    return Subject(name, architecture, digest, sum(dtypes.values()), dict(sorted(dtypes.items())))


def _storage(a: Any, b: Any) -> Callable[[str], torch.dtype]:
    """The floor rounds a tensor as b stores the one of that name; if b has none, as a does."""

    def dtype(name: str) -> torch.dtype:
        return b.dtype(name) or a.dtype(name) or torch.float64

    return dtype


def _common(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _same_interface(first: _Side, second: _Side) -> None:
    for what, x, y in (
        ("inputs", _shapes(first.model.inputs), _shapes(second.model.inputs)),
        ("outputs", _shapes(_values(first.trace)), _shapes(_values(second.trace))),
    ):
        if x != y:
            raise BadInput(f"the two models have different {what}", expected=str(x), found=str(y))


def _values(traced: Trace) -> dict[str, torch.Tensor]:
    return {str(index): node.meta["val"] for index, node in enumerate(traced.outputs)}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _trace(model: HFModel) -> tuple[Trace, bool]:
    """The trace, and whether the function is the ``logits`` of the model, not everything it returns."""
    wanted = "logits"
    try:
        return trace(model.model, kwargs=model.inputs, outputs=(wanted,)), True
    except TraceError as error:
        if error.expected != wanted:
            raise
    return trace(model.model, kwargs=model.inputs), False


# -- inputs --------------------------------------------------------------------------------------------


def _token_ids(directory: Path, text: Path, tokens: int) -> list[int]:
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{text} cannot be read as UTF-8 text", found=f"{type(error).__name__}: {error}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise BadInput(
            f"{directory.name} has no tokenizer that transformers can load",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            way_out="copy the tokenizer's files into it, or certify on random tokens (no text)",
        ) from error
    # Sixteen characters a token is more than any tokenizer needs on plain text.
    found = tokenizer(content[: 16 * tokens + 64], add_special_tokens=True)["input_ids"]
    if len(found) < 2:
        raise BadInput(f"{text} is too short", expected="at least two tokens", found=str(len(found)))
    return [int(index) for index in found]


def _text_batches(
    ids: list[int], shapes: Mapping[str, tuple[int, ...]], count: int
) -> list[dict[str, torch.Tensor]]:
    unknown = set(shapes) - {"input_ids", "decoder_input_ids"}
    if unknown:
        raise BadInput(
            "this model does not take text alone",
            found=", ".join(sorted(unknown)),
            way_out="certify on random inputs (no text)",
        )
    stream = torch.tensor(ids)
    position, batches = 0, list[dict[str, torch.Tensor]]()
    for _ in range(count):
        batch: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            where = (position + torch.arange(size)) % len(stream)
            batch[name] = stream[where].reshape(shape)
            position += size
        batches.append(batch)
    return batches


def _digest_inputs(batches: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            digest.update(name.encode() + b"\0")
            digest.update(_bytes(value) if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
