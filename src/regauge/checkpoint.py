"""Safetensors checkpoints, opened strictly and read lazily.

Opening reads headers only. A tensor is mapped when it is read and unmapped when the last reference to
it dies, so memory follows what is being looked at, not what was looked at. Pickled weights are never
read. Requires a POSIX system with little-endian byte order.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from threading import Lock

import torch

from regauge.digest import PIECE, contents_digest, join_pieces
from regauge.errors import CheckpointError
from regauge.shards import (
    DTYPES,
    PICKLES,
    WEIGHTS,
    Entry,
    Shard,
    listing,
    pickled,
    read_index,
    read_shard,
    shrunk,
    unreadable,
    weight_files,
)

_CHUNK = 1 << 20


class Checkpoint:
    """A checkpoint on disk. Make one with :meth:`open`; use as a context manager or :meth:`close` it.

    Attributes:
        path: directory of the checkpoint.
        shards: its weight files, sorted by file name.
        index: name of the index file, if there is one.
        side_files: every other file that belongs to it (config, tokenizer, ...), relative, sorted.
        skipped: files left alone because they look like further copies of the weights, sorted.
    """

    def __init__(
        self,
        path: Path,
        shards: Iterable[Shard],
        index: str | None,
        side_files: Iterable[str],
        skipped: Iterable[str],
    ) -> None:
        self.path = path
        self.shards = tuple(shards)
        self.index = index
        self.side_files = tuple(side_files)
        self.skipped = tuple(skipped)
        self._entries: dict[str, Entry] = {}
        self._files: dict[str, int] = {}
        self._lock = Lock()
        for entry in (entry for shard in self.shards for entry in shard.entries):
            other = self._entries.setdefault(entry.name, entry)
            if other is not entry:
                raise CheckpointError(
                    "a tensor is stored in two shards",
                    parameter=entry.name,
                    expected="every tensor in one file",
                    found=f"{other.file} and {entry.file}",
                    way_out="remove the stale shard",
                )
        self._opened = self.stamp()

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a directory (one weight file, or an index with shards) or one ``.safetensors`` file.

        If a directory holds both ``model.safetensors`` and an index, the single file is read, and the
        shards are listed in ``skipped``. For a file given directly there are no side files.

        Raises:
            CheckpointError: nothing usable there, only pickles, or any file damaged or inconsistent.
        """
        path = Path(path)
        if path.is_file() and path.suffix == ".safetensors":
            return cls(path.parent, [read_shard(path)], None, (), ())
        if not path.is_dir():
            if path.suffix in PICKLES and path.exists():
                raise pickled(path, [path.name])
            raise CheckpointError(
                "no such checkpoint",
                expected="a directory with safetensors weights, or a .safetensors file",
                found=f"{path} ({'another kind of file' if path.exists() else 'missing'})",
                way_out="check the path",
            )
        files, index = weight_files(path)
        weight_map = read_index(path, index) if index else {}
        shards = [read_shard(path / file, index) for file in files]
        for shard in shards:
            held = {entry.name for entry in shard.entries}
            absent = [name for name, file in weight_map.items() if file == shard.file and name not in held]
            if absent:
                raise CheckpointError(
                    f"{index} names {len(absent)} tensor(s) that their shard lacks",
                    parameter=absent[0],
                    expected=f"{absent[0]} in {shard.file}",
                    found=f"{len(held)} other tensors there",
                    way_out="fetch the shard and the index from the same revision",
                )
        used = {*files, *([index] if index else [])}
        others = sorted(name for name in listing(path) if name not in used)
        skipped = [name for name in others if name.endswith((*WEIGHTS, ".index.json"))]
        side = [name for name in others if name not in set(skipped)]
        return cls(path, shards, index, side, skipped)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Tensors read before stay valid."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, shard by shard, in the order of their bytes."""
        return tuple(self._entries)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together (headers not counted)."""
        return sum(entry.nbytes for entry in self._entries.values())

    def entry(self, name: str) -> Entry:
        """Where the tensor lies. Raises ``CheckpointError`` if there is none of that name."""
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                "the checkpoint has no tensor of that name",
                parameter=name,
                found=f"{len(self._entries)} tensors in {self.path}, nearest: "
                + (", ".join(get_close_matches(name, self._entries)) or "none"),
                way_out="load the checkpoint with the model it was saved from",
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The torch dtype. Raises ``CheckpointError`` for kinds that torch cannot hold (4 and 6 bits)."""
        entry = self.entry(name)
        if entry.kind not in DTYPES:
            raise CheckpointError(
                "values of this kind can be copied, but not read",
                parameter=name,
                expected=", ".join(DTYPES),
                found=entry.kind,
                way_out="leave this tensor as it is, or dequantise the checkpoint",
            )
        return DTYPES[entry.kind]

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, memory-mapped. To be treated as read-only; the file cannot change by it."""
        return self._view(name, 0, self.entry(name).nbytes, self.entry(name).shape)

    def read_rows(self, name: str, start: int, stop: int, axis: int = 0) -> torch.Tensor:
        """``read(name)`` cut to ``start:stop`` along ``axis``. Along axis 0 only these rows are mapped."""
        shape = self.shape(name)
        if axis != 0:
            return self.read(name).narrow(axis, start, stop - start)
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start}:{stop} of a tensor of shape {shape}")
        width = self.dtype(name).itemsize * math.prod(shape[1:])
        return self._view(name, start * width, (stop - start) * width, (stop - start, *shape[1:]))

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, memory-mapped."""
        entry = self.entry(name)
        return self._map(entry, 0, entry.nbytes)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset`` on, without mapping anything."""
        entry = self.entry(name)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._file(entry.file), [buffer[done:]], entry.start + offset + done)
            except OSError as error:
                raise unreadable(self.path / entry.file, error) from error
            if got == 0:
                raise shrunk(entry)
            done += got

    def blocks(self, name: str, max_bytes: int = 1 << 24) -> Iterator[tuple[int, torch.Tensor]]:
        """The tensor, flattened, in blocks: (position of the first element, block)."""
        dtype, entry = self.dtype(name), self.entry(name)
        count, step = entry.nbytes // dtype.itemsize, max(1, max_bytes // dtype.itemsize)
        for start in range(0, count, step):
            size = min(step, count - start)
            yield start, self._view(name, start * dtype.itemsize, size * dtype.itemsize, (size,))

    def check_finite(self, name: str) -> None:
        """Raise ``CheckpointError`` with count and first index if any value is NaN or infinite."""
        bad, first = 0, -1
        for start, block in self.blocks(name):
            if not all_finite(block):
                wrong = (~torch.isfinite(_wide(block))).nonzero()
                bad, first = bad + len(wrong), first if first >= 0 else start + int(wrong[0])
        if bad:
            index: list[int] = []
            for size in reversed(self.shape(name)):
                first, rest = divmod(first, size)
                index.insert(0, rest)
            raise CheckpointError(
                f"{bad} value(s) are NaN or infinite, the first at {index}",
                parameter=name,
                expected="finite values",
                found=f"{self.entry(name).file}",
                way_out="repair or fetch the checkpoint again; no rewrite is exact on such values",
            )

    def tensor_digest(self, name: str) -> str:
        """Hash (hex) of the tensor's bytes, see :mod:`regauge.digest`."""
        return join_pieces(
            self.piece_digest(name, start) for start in range(0, self.entry(name).nbytes, PIECE)
        )

    def piece_digest(self, name: str, start: int) -> bytes:
        """SHA-256 of the (up to) 8 MiB of the tensor from byte ``start`` on."""
        digest, stop = hashlib.sha256(), min(start + PIECE, self.entry(name).nbytes)
        buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
        for offset in range(start, stop, _CHUNK):
            part = buffer[: stop - offset]
            self.read_into(name, offset, part)
            digest.update(part)
        return digest.digest()

    def digest(self, known: Mapping[str, str] | None = None) -> str:
        """Hash (hex) of the *contents*: names, dtypes, shapes and bytes of all tensors.

        It does not depend on how tensors are spread over shards, nor on file metadata; the scheme is in
        :mod:`regauge.digest`. About 1.8 GB/s on each of two cores.

        Args:
            known: tensors already hashed, e.g. while they were copied.
        """
        known = known or {}
        rest = {name: range(0, e.nbytes, PIECE) for name, e in self._entries.items() if name not in known}
        with ThreadPoolExecutor(2) as pool:
            names = [name for name, starts in rest.items() for _ in starts]
            pieces = pool.map(self.piece_digest, names, [at for starts in rest.values() for at in starts])
            hashed = {name: join_pieces(next(pieces) for _ in starts) for name, starts in rest.items()}
        return contents_digest(self._entries.values(), {**known, **hashed})

    def stamp(self) -> str:
        """Cheap fingerprint: SHA-256 of file names, headers, sizes and modification times.

        It notices accidental change between two looks, not a forger; no tensor byte is read.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            try:
                stat = os.stat(self.path / shard.file)
            except OSError as error:
                raise unreadable(self.path / shard.file, error) from error
            digest.update(f"{shard.file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode() + shard.header)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise ``CheckpointError`` if :meth:`stamp` is no longer what it was when this was opened."""
        if self.stamp() != self._opened:
            raise CheckpointError(
                "the checkpoint changed while it was in use",
                found=str(self.path),
                way_out="keep the source still and run again",
            )

    def _file(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                try:
                    self._files[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise unreadable(self.path / file, error) from error
            return self._files[file]

    def _map(self, entry: Entry, offset: int, nbytes: int) -> memoryview:
        if nbytes == 0:
            return memoryview(b"")
        begin = entry.start + offset
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            # A private writable map: torch warns about read-only buffers, and the file stays safe.
            mapped = mmap.mmap(
                self._file(entry.file), begin - page + nbytes, access=mmap.ACCESS_COPY, offset=page
            )
        except ValueError as error:
            raise shrunk(entry) from error
        return memoryview(mapped)[begin - page :]

    def _view(self, name: str, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype, entry = self.dtype(name), self.entry(name)
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        data = self._map(entry, offset, nbytes)
        if (entry.start + offset) % dtype.itemsize:
            data = bytearray(data)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; true of integers."""
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(_wide(tensor))
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
