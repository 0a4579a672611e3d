"""Certify two directories, or two modules, with no memory of how one was made from the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from regauge.certify.certificate import Certificate, Inputs, software
from regauge.certify.given import digest_inputs, looked_up, text_batches, token_ids
from regauge.certify.lazy import BLOCK
from regauge.certify.measure import EXACT, FLOOR_FACTOR, Function, compare_functions, judge
from regauge.certify.numbering import Numbering
from regauge.certify.run import held_bytes
from regauge.certify.sides import (
    ModuleWeights,
    Side,
    buffers_in,
    check_interface,
    dtype_names,
    open_side,
    storage_of,
    subject_of,
)
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput
from regauge.trace import trace
from regauge.vocabulary import Vocabulary, token_axes

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
    vocabulary: Vocabulary | None = None,
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
        vocabulary: the tokens both have. Where they are numbered differently, b runs on its own ids of the
            same tokens, and the logits of the same tokens are compared; ``inputs.tokens`` says so.

    Raises:
        BadInput: a directory, model or text that cannot be used; shapes that do not match.
        CheckpointError: damaged or missing tensors.
        Refused: a checkpoint that transformers converts when it loads it.
    """
    with Checkpoint.open(a) as files_a, Checkpoint.open(b) as files_b:
        ids = None if text is None else token_ids(Path(a), Path(text), tokens)
        if ids is not None:
            length = min(length, len(ids))
        limit = (max_memory or MEMORY) // 2
        rows = min(ROWS, max(1, math.ceil(tokens / length)))  # of one run
        block = max(1 << 16, min(BLOCK, (max_memory or MEMORY) // 256))
        while True:
            first = open_side(Path(a), files_a, rows, length)
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
        second = open_side(Path(b), files_b, rows, length, like=first)
        numbering = _numbering(first, second, vocabulary)
        check_interface(first, second, by_token=numbering is not None and numbering.by_token)
        shapes = {name: tuple(value.shape) for name, value in first.model.inputs.items()}
        sizes = [math.prod(shapes[name]) for name in ("decoder_input_ids", "input_ids") if name in shapes]
        count = max(1, math.ceil(tokens / sizes[0])) if sizes else ITEMS // rows
        if ids is not None:
            batches = text_batches(ids, shapes, count)
        else:
            batches = [
                first.model.real_inputs(batch=rows, length=length, seed=seed + i) for i in range(count)
            ]
        storage = storage_of(first.weights, second.weights)
        function_a, function_b = first.function, second.function
        if numbering is not None:
            batches = numbering.common(batches)
            function_a, function_b = numbering.first(function_a), numbering.second(function_b)
        evidence = compare_functions(
            function_a,
            function_b,
            batches,
            exact=weights_b_exact,
            storage=storage,
            logits=first.logits,
            stored=stored,
            seed=seed,
            block=block,
            exact_buffers=None if weights_b_exact is None else buffers_in(second, first),
            floor_buffers=buffers_in(first, second),
        )
        verdict, reason = judge(evidence, factor=factor)
        return Certificate(
            verdict=verdict,
            reason=reason,
            a=first.subject(),
            b=second.subject(),
            inputs=Inputs(
                "random" if ids is None else "text",
                digest_inputs(batches),
                seed,
                len(batches),
                shapes,
                evidence.positions,
                looked_up(first.trace, batches),
                None if numbering is None else numbering.tokens(),
            ),
            evidence=evidence,
            exact_threshold=EXACT,
            floor_factor=factor,
            floor_dtype=dtype_names(storage(name) for name in first.trace.shapes),
            floor_seed=seed,
            software=software(),
        )


def _numbering(first: Side, second: Side, vocabulary: Vocabulary | None) -> Numbering | None:
    """How to run both on the same tokens; None where both number them alike."""
    axes = None if vocabulary is None else token_axes(first.trace, second.trace, vocabulary)
    return None if axes is None or vocabulary is None else Numbering(vocabulary, *axes)


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
    sides: list[tuple[Function, ModuleWeights]] = []
    for module in (a, b):
        weights = ModuleWeights.of(module)
        traced = trace(module, args, kwargs, outputs=outputs)
        sides.append((Function(traced, weights, dict(module.named_buffers(remove_duplicate=False))), weights))
    (first, weights_a), (second, weights_b) = sides
    leaves = tree_leaves((args, dict(kwargs or {})))
    given = dict(zip(first.trace.inputs, leaves, strict=True))
    if len(second.trace.inputs) != len(leaves):
        raise BadInput("the two modules take different inputs")
    storage = storage_of(weights_a, weights_b)
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
        a=subject_of(type(a).__name__, type(a).__name__, weights_a.digest(), first.trace, weights_a),
        b=subject_of(type(b).__name__, type(b).__name__, weights_b.digest(), second.trace, weights_b),
        inputs=Inputs("given", digest_inputs([given]), seed, 1, shapes, evidence.positions),
        evidence=evidence,
        exact_threshold=EXACT,
        floor_factor=factor,
        floor_dtype=dtype_names(storage(name) for name in first.trace.shapes),
        floor_seed=seed,
        software=software(),
    )
