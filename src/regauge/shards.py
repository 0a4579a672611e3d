"""The files of a safetensors checkpoint: which they are, and what their headers say.

Every offset, size and name is checked here, before any tensor is read. Nothing here reads values.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regauge.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_BITS: Mapping[str, int] = {
    **{kind: 8 * dtype.itemsize for kind, dtype in DTYPES.items()},
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_HEADER_LIMIT = 100_000_000
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".npz")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        name: tensor name.
        kind: safetensors dtype code, e.g. ``BF16``.
        shape: shape.
        file: name of its shard.
        start: first byte, counted from the beginning of the file.
        nbytes: number of bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One weight file: its tensors in the order of their bytes, and its header bytes as stored."""

    file: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] | None
    header: bytes
    size: int


def listing(path: Path) -> Iterator[str]:
    """All files below ``path``, relative; hidden and linked directories are not entered."""
    for folder, folders, files in os.walk(path, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            yield (Path(folder) / file).relative_to(path).as_posix()


def weight_files(path: Path) -> tuple[list[str], str | None]:
    """The weight files of a directory, sorted, and its index if that is what names them."""
    top = sorted(entry.name for entry in path.iterdir() if not entry.is_dir())
    single = [name for name in top if name.endswith(".safetensors")]
    indices = [name for name in top if name.endswith(INDEX)]
    if "model.safetensors" in single:
        return ["model.safetensors"], None
    if len(indices) == 1:
        return sorted(set(read_index(path, indices[0]).values())), indices[0]
    if len(single) == 1 and not indices:
        return single, None
    if single or indices:
        raise CheckpointError(
            "several weight files, and nothing says how they belong together",
            expected=f"model.safetensors, or one model{INDEX} with its shards",
            found=", ".join([*indices, *single][:8]),
            way_out="name one .safetensors file instead of the directory",
        )
    pickles = [name for name in top if name.endswith(PICKLES)]
    if pickles:
        raise pickled(path, pickles)
    raise CheckpointError(
        "no weights in this directory",
        expected=f"model.safetensors or model{INDEX}",
        found=f"{path}: {', '.join(top[:8]) or 'empty'}",
        way_out="check the path, or save the model in safetensors format first",
    )


def read_index(path: Path, index: str) -> dict[str, str]:
    """Tensor name -> shard, as the index has it. Raises ``CheckpointError`` if it is damaged or unsafe."""
    try:
        content: Any = json.loads((path / index).read_bytes())
        weight_map = content["weight_map"]
        good = bool(weight_map) and all(isinstance(file, str) for file in weight_map.values())
    except OSError as error:
        raise unreadable(path / index, error) from error
    except (ValueError, LookupError, TypeError, AttributeError):
        good, weight_map = False, {}
    if not good:
        raise CheckpointError(
            "the index is not readable",
            expected='JSON with a "weight_map" from tensor names to files',
            found=str(path / index),
            way_out="fetch the index again",
        )
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                "the index points to something that is not a shard beside it",
                parameter=name,
                expected="the name of a .safetensors file in the same directory",
                found=f"{file!r} in {path / index}",
                way_out="fetch the index again, or convert the weights to safetensors",
            )
    return dict(weight_map)


def read_shard(path: Path, index: str | None = None) -> Shard:
    """Read and check the header of one weight file; ``index`` is who named it, for the message."""
    broken = partial(_broken, path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise broken(
                    "it is a Git LFS pointer", "the file itself", f"{size} bytes of text", "git lfs pull"
                )
            if len(start) == 8 and length > _HEADER_LIMIT:
                raise broken("it is not a safetensors file", "a header below 100 MB", f"length {length}")
            if size < 8 + length:
                raise broken("the file ends inside its header", f"{8 + length} bytes", f"{size} bytes")
            header = start + file.read(length)
    except FileNotFoundError:
        raise CheckpointError(
            "a shard is missing",
            expected=f"{path.name}, named by {index}",
            found=f"no such file in {path.parent}",
            way_out="fetch the missing shard",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        content = json.loads(header[8:], object_pairs_hook=_unique)
        metadata = content.pop("__metadata__", None)
        entries = sorted(
            (_entry(name, item, path.name, len(header)) for name, item in content.items()),
            key=lambda entry: (entry.start, entry.start + entry.nbytes),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise broken("the header is not readable", "safetensors JSON", str(error)[:200]) from error
    position = len(header)
    for entry in entries:
        if entry.start != position:
            what = "overlaps another one" if entry.start < position else "leaves a hole before it"
            offset = f"offset {entry.start - len(header)}"
            raise broken(f"tensor {entry.name} {what}", f"offset {position - len(header)}", offset)
        position += entry.nbytes
    if position != size:
        what = "the file is truncated" if size < position else "there are bytes after the last tensor"
        raise broken(what, f"{position} bytes", f"{size} bytes")
    return Shard(path.name, tuple(entries), metadata, header, size)


def header_bytes(content: Mapping[str, object]) -> bytes:
    """The header of a weight file: its length, and its text, padded to a multiple of 8 bytes."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(name: str, item: Any, file: str, base: int) -> Entry:
    begin, end = item["data_offsets"]
    kind, shape = item["dtype"], tuple(item["shape"])
    if kind not in _BITS:
        raise ValueError(f"{name}: unknown dtype {kind!r}")
    if not all(type(value) is int and value >= 0 for value in (begin, end, *shape)):
        raise ValueError(f"{name}: bad shape or offsets {item}")
    if (end - begin) * 8 != math.prod(shape) * _BITS[kind]:
        raise ValueError(f"{name}: {kind} of shape {list(shape)} does not fill bytes {begin} to {end}")
    return Entry(name, kind, shape, file, base + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _broken(
    path: Path, what: str, expected: str, found: str, way_out: str = "fetch the file again"
) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", expected=expected, found=found, way_out=way_out)


def pickled(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        "the weights are pickled, and unpickling a file runs whatever code is in it",
        expected="safetensors weights",
        found=f"{path}: {', '.join(names[:4])}",
        way_out="convert them where you trust them: save_pretrained(..., safe_serialization=True)",
    )


def shrunk(entry: Entry) -> CheckpointError:
    return CheckpointError(
        f"{entry.file} became shorter while it was read",
        parameter=entry.name,
        way_out="keep the source still",
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read",
        found=error.strerror or str(error),
        way_out="check that it exists and may be read",
    )
