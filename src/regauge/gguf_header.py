"""The header of a GGUF file: metadata and where each tensor lies. No weight is read, nothing is imported."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regauge.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file: shape as PyTorch has it, GGML type code, first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data.

    Attributes:
        metadata: key -> value; of an array of strings only its length.
        tensors: the tensors, in file order.
        size: bytes of the whole file.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[Stored, ...]
    size: int


def read_header(path: Path) -> Header:
    """Parse the header of a GGUF file of version 2 or 3. Reads no weight.

    Raises:
        CheckpointError: no such file, not GGUF, another version, or cut short inside the header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise damaged(path, "the four bytes GGUF at the start", "something else: not a GGUF file")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header(size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=str(error)) from error


def damaged(path: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used as GGUF", expected=expected, found=found, way_out="download it again"
    )


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def numbers(self, codes: str) -> tuple[Any, ...]:
        start, self.at = self.at, self.at + struct.calcsize("<" + codes)
        if self.at > len(self.data):
            raise damaged(
                self.path, f"a header of more than {start} bytes", "the end of the file: it is cut short"
            )
        return struct.unpack_from("<" + codes, self.data, start)

    def string(self) -> str:
        (length,) = self.numbers("Q")
        (raw,) = self.numbers(f"{min(length, len(self.data))}s")
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise damaged(self.path, "a metadata type from 0 to 12", str(kind))
        inner, count = self.numbers("IQ")
        if inner in _SCALARS:
            return self.numbers(f"{min(count, len(self.data))}{_SCALARS[inner]}")
        for _ in range(count):
            self.value(inner)
        return count

    def header(self, size: int) -> Header:
        version, tensors, pairs = self.numbers("IQQ")
        if version not in (2, 3):
            raise damaged(self.path, "version 2 or 3, little endian", f"version {version}")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            metadata[key] = self.value(self.numbers("I")[0])
        table: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensors):
            name = self.string()
            (rank,) = self.numbers("I")
            shape = self.numbers(f"{min(rank, 64)}Q")
            table.append((name, shape[::-1], *self.numbers("IQ")))
        alignment = int(metadata.get("general.alignment", 32))
        first = -(-self.at // alignment) * alignment
        return Header(metadata, tuple(Stored(n, s, t, first + offset) for n, s, t, offset in table), size)


def check_length(path: Path, header: Header, blocks: Mapping[int, tuple[int, int]]) -> None:
    """Refuse a file that ends before its tensors do.

    Args:
        path: named in errors.
        header: of that file.
        blocks: GGML type code -> (elements, bytes) of one block.

    Raises:
        CheckpointError: cut short, or a type that ``blocks`` lacks.
    """
    for tensor in header.tensors:
        if tensor.type not in blocks:
            raise damaged(path, "a known GGML type", f"type {tensor.type} of {tensor.name}")
        elements, count = blocks[tensor.type]
        end = tensor.start + math.prod(tensor.shape) // elements * count
        if end > header.size:
            raise damaged(
                path, f"{end} bytes, the end of {tensor.name}", f"{header.size} bytes: it is cut short"
            )
