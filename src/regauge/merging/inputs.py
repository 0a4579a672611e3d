"""What must agree before tensors of two models can be added: names, shapes, and the operations on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from regauge.checkpoint import Checkpoint, all_finite
from regauge.equivalence.models import set_dtype
from regauge.errors import BadInput, CheckpointError, Refused
from regauge.hf import load_config, load_meta
from regauge.layout import RECASTS
from regauge.trace import Trace, trace

ENTRIES = 1 << 20
"""Entries of a block: 8 MiB of each model in float64."""

_SHOWN = 4


def check_pair(first: Path, other: Path) -> None:
    """Refuse two directories with other tensors, or with other operations on them; see below."""
    with Checkpoint.open(first) as a, Checkpoint.open(other) as b:
        check_same_tensors(a, b)
    check_alike(first, other)


def check_same_tensors(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse tensors of other names or shapes, naming them.

    Raises:
        BadInput: they differ.
    """
    names, others = set(first.names), set(other.names)
    for here, there, model in ((names, others, other), (others, names, first)):
        missing = sorted(here - there)
        if missing:
            rest = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise BadInput(
                f"{len(missing)} tensor(s) are not in {model.path.name}",
                parameter=missing[0],
                expected="the same names in all models",
                found=", ".join(missing[:_SHOWN]) + rest,
                way_out="merge with --align, or models of one encoding",
            )
    for name in first.names:
        if first.shape(name) != other.shape(name):
            raise BadInput(
                "a tensor has another shape in the other model",
                parameter=name,
                expected=f"{first.shape(name)}, as in {first.path.name}",
                found=f"{other.shape(name)} in {other.path.name}",
                way_out="merge models of one size",
            )


def check_values(files: Checkpoint, others: list[Checkpoint]) -> list[str]:
    """Tensors that are combined; the rest hold no floating-point values and are equal in all models.

    Raises:
        CheckpointError: a floating-point format with fewer than 16 bits, or complex values.
        BadInput: integers that differ.
    """
    combined: list[str] = []
    for name in files.names:
        kinds = {held.entry(name).kind for held in (files, *others)}
        floating = [kind for kind in sorted(kinds) if kind in RECASTS.values()]
        if len(floating) == len(kinds):
            combined.append(name)
            continue
        bad = sorted(kind for kind in kinds if kind[0] in "FC" and kind not in floating)
        if bad:
            raise CheckpointError(
                "values of this kind cannot be added",
                parameter=name,
                expected=", ".join(RECASTS.values()),
                found=", ".join(bad),
                way_out="dequantise the checkpoint first",
            )
        if len(kinds) > 1 or len({held.tensor_digest(name) for held in (files, *others)}) > 1:
            raise BadInput(
                "a tensor that holds no floating-point values differs between the models",
                parameter=name,
                expected="the same values in all models",
                found=", ".join(sorted(kinds)),
            )
    return combined


def check_alike(a: Path, b: Path) -> None:
    """Refuse two directories whose traced graphs do different things with the same tensors.

    Raises:
        Refused: they do.
    """
    if (a / "config.json").read_bytes() == (b / "config.json").read_bytes():
        return
    first, second = (_graph(path) for path in (a, b))
    place = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
    if place is None and len(first) == len(second):
        return
    place = min(len(first), len(second)) if place is None else place
    raise Refused(
        "the two models do different things with their tensors",
        node=first[place][0] if place < len(first) else None,
        expected=_short(first, place),
        found=_short(second, place),
        way_out="merge models with the same configuration",
    )


def rows_of(files: Sequence[Checkpoint], name: str) -> Iterator[list[torch.Tensor]]:
    """The same rows of a tensor in every model, float64."""
    shape = files[0].shape(name)
    if not shape or 0 in shape:
        yield [_float64(held, name, held.read(name)) for held in files]
        return
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, ENTRIES // width)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield [_float64(held, name, held.read_rows(name, start, stop)) for held in files]


def _float64(files: Checkpoint, name: str, values: torch.Tensor) -> torch.Tensor:
    if not all_finite(values):
        files.check_finite(name)
    return values.to(torch.float64)


def _graph(path: Path) -> list[tuple[str, ...]]:
    """What a model computes, operation by operation, and the constants it does it with."""
    config = load_config(path)
    set_dtype(config)
    model = load_meta(config)
    traced = trace(model.model, (), model.inputs)
    buffers = model.buffers()
    return [*_operations(traced), *((name, _values(buffers[name])) for name in sorted(buffers))]


def _operations(traced: Trace) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for node in traced.graph.nodes:
        held = traced.parameters.get(node.name) or traced.buffers.get(node.name) or ""
        constant = traced.constants.get(node.name)
        value = "" if constant is None else _values(constant)
        found.append((node.name, node.op, held, str(node.target), f"{node.args} {node.kwargs}", value))
    return found


def _values(tensor: Any) -> str:
    if tensor.device.type == "meta":
        return f"{tensor.dtype} {tuple(tensor.shape)}"
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.reshape(-1).tolist()}"


def _short(graph: list[tuple[str, ...]], place: int) -> str:
    return " ".join(filter(None, graph[place][1:]))[:200] if place < len(graph) else "no further operation"
