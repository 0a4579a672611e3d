"""Where every tensor of a rewritten checkpoint will lie: the source's shards, order and metadata.

Headers that need no change are kept byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError
from regauge.shards import DTYPES, Entry, Shard, header_bytes

CONFIG = "config.json"
RECASTS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Target:
    """A weight file to write: name, header bytes, tensors in order, and size in bytes."""

    file: str
    header: bytes
    entries: tuple[Entry, ...]
    size: int


def plan_layout(
    source: Checkpoint,
    copies: Mapping[str, str],
    dtype: torch.dtype | None,
    made: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    drops: Collection[str] = (),
) -> tuple[Target, ...]:
    """One target for each shard of ``source``.

    Args:
        source: the checkpoint that is rewritten.
        copies: new tensor -> source tensor it is made from; appended to the shard of the latter unless
            the source already stores a tensor of that name.
        dtype: see :class:`regauge.write.StagedOutput`.
        made: tensor -> (source tensor whose dtype and shard it takes, shape); one that the source stores
            already keeps its place.
        drops: source tensors left out.

    Raises:
        BadInput: ``dtype`` cannot be stored to.
        CheckpointError: a floating tensor that cannot be recast (8 bits and fewer, or complex), or a
            stored tensor of another shape than the one it is to be replaced by.
    """
    if dtype is not None and dtype not in RECASTS:
        raise BadInput(
            "weights cannot be written in that dtype",
            expected=", ".join(str(known).removeprefix("torch.") for known in RECASTS),
            found=str(dtype),
        )
    made = made or {}
    added: dict[str, list[str]] = {}
    for name, (origin, _) in made.items():
        if name not in source:
            added.setdefault(source.entry(origin).file, []).append(name)
    for name, origin in copies.items():
        entry = source.entry(origin)
        if name not in source:
            added.setdefault(entry.file, []).append(name)
        elif source.shape(name) != entry.shape:
            raise CheckpointError(
                "a tensor to be replaced by a copy of another has another shape",
                parameter=name,
                expected=f"{list(entry.shape)}, as {origin}",
                found=str(list(source.shape(name))),
                way_out="use the checkpoint the model was saved to",
            )
    origins = {name: (origin, source.shape(origin)) for name, origin in copies.items()} | dict(made)
    return tuple(
        _target(source, shard, added.get(shard.file, ()), origins, dtype, drops) for shard in source.shards
    )


def index_text(source: Checkpoint, entries: Mapping[str, Entry], recast: bool) -> bytes:
    """The index of the result: the source's, byte for byte, or with new tensors and sizes put in."""
    assert source.index is not None
    old = (source.path / source.index).read_bytes()
    added = {entry.name: entry.file for entry in entries.values() if entry.name not in source}
    gone = [name for name in source.names if name not in entries]
    same = all(name in entries and entries[name].shape == source.shape(name) for name in source.names)
    if not added and same and not recast:
        return old
    content: dict[str, Any] = json.loads(old)
    content["weight_map"].update(added)
    for name in gone:
        content["weight_map"].pop(name, None)
    metadata = content.get("metadata")
    if isinstance(metadata, dict):
        if "total_size" in metadata:
            metadata["total_size"] = sum(entry.nbytes for entry in entries.values())
        if isinstance(metadata.get("total_parameters"), int):
            before = sum(math.prod(source.shape(name)) for name in source.names)
            metadata["total_parameters"] += sum(math.prod(e.shape) for e in entries.values()) - before
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def config_text(source: Checkpoint, config: Mapping[str, Any]) -> bytes:
    """``config.json`` of the source with some top-level keys replaced.

    Raises:
        CheckpointError: the source has none, or it is not a JSON object.
    """
    path = source.path / CONFIG
    try:
        if CONFIG not in source.side_files:
            raise ValueError("not part of this checkpoint")
        content: dict[str, Any] = json.loads(path.read_bytes())
        content.update(config)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the rewrite changes {CONFIG}, and there is none that can be edited",
            expected=f"a JSON object with room for {', '.join(config)}",
            found=f"{path}: {error}",
            way_out="give the checkpoint's directory, with its config",
        ) from error
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _target(
    source: Checkpoint,
    shard: Shard,
    added: Iterable[str],
    origins: Mapping[str, tuple[str, tuple[int, ...]]],
    dtype: torch.dtype | None,
    drops: Collection[str],
) -> Target:
    wanted: list[tuple[str, str, tuple[int, ...], int]] = []
    for name in (*(entry.name for entry in shard.entries if entry.name not in drops), *added):
        like, shape = origins.get(name) or (name, source.shape(name))
        origin = source.entry(like)
        kind = _recast(origin, dtype)
        same = kind == origin.kind and shape == origin.shape
        nbytes = origin.nbytes if same else math.prod(shape) * DTYPES[kind].itemsize
        wanted.append((name, kind, tuple(shape), nbytes))
    if wanted == [(entry.name, entry.kind, entry.shape, entry.nbytes) for entry in shard.entries]:
        return Target(shard.file, shard.header, shard.entries, shard.size)
    if not _aligned(wanted):
        wanted.sort(key=lambda item: -_itemsize(item[1]))
    content: dict[str, object] = {} if shard.metadata is None else {"__metadata__": dict(shard.metadata)}
    position = 0
    for name, kind, shape, nbytes in wanted:
        offsets = [position, position + nbytes]
        content[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        position += nbytes
    header = header_bytes(content)
    entries: list[Entry] = []
    start = len(header)
    for name, kind, shape, nbytes in wanted:
        entries.append(Entry(name, kind, shape, shard.file, start, nbytes))
        start += nbytes
    return Target(shard.file, header, tuple(entries), start)


def _recast(entry: Entry, dtype: torch.dtype | None) -> str:
    if dtype is None or entry.kind == RECASTS[dtype] or entry.kind[0] not in "FBC" or entry.kind == "BOOL":
        return entry.kind
    if entry.kind not in RECASTS.values():
        raise CheckpointError(
            "values of this kind cannot be recast: what they mean depends on scales kept elsewhere",
            parameter=entry.name,
            expected=", ".join(RECASTS.values()),
            found=entry.kind,
            way_out="keep the stored dtype, or dequantise the checkpoint first",
        )
    return RECASTS[dtype]


def _itemsize(kind: str) -> int:
    return DTYPES[kind].itemsize if kind in DTYPES else 1


def _aligned(wanted: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bool:
    position, good = 0, True
    for _, kind, _, nbytes in wanted:
        good = good and position % _itemsize(kind) == 0
        position += nbytes
    return good
