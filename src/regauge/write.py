"""Writing a checkpoint so that it appears whole or not at all.

Everything is staged in ``.NAME.regauge-partial`` beside the target: ``files/`` holds the checkpoint in
the making and ``journal.jsonl`` one line per finished tensor. ``commit`` makes it durable and renames
``files/`` to the target. An interrupted run leaves the staging directory, and the next run with the
same key goes on from it: a journalled tensor counts only if its bytes still have the journalled hash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regauge.checkpoint import Checkpoint
from regauge.copying import copy_tensors, put
from regauge.digest import TensorHash, contents_digest
from regauge.errors import BadInput, CheckpointError
from regauge.journal import Journal
from regauge.layout import CONFIG, Target, config_text, index_text, plan_layout
from regauge.shards import DTYPES, Entry

MANIFEST = "regauge.json"
_CHUNK = 1 << 20
_AHEAD = 16 << 20
"""Bytes that may be on their way to the disk while the next block is computed."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Block:
    """A block on its way to the disk; the last of a tensor carries its name and, if known, its hash."""

    parts: list[Future[None]]
    size: int
    ends: tuple[str, TensorHash | None] | None = None


class StagedOutput:
    """A checkpoint in the making. Use as a context manager, and end with :meth:`commit` or :meth:`discard`.

    Leaving the context without either keeps the staging directory for a later run with the same key.

    Attributes:
        out: where the checkpoint will appear.
        directory: the staged files; ``Checkpoint.open`` can read it once all tensors are written.
        entries: tensor name -> where it lies in the staged files.
        copies: new tensor name -> source tensor it is made from.
        digests: finished tensor -> hash of its bytes, see :mod:`regauge.digest`.
        resumed: tensors taken over from an earlier run.
    """

    def __init__(
        self,
        out: str | Path,
        source: Checkpoint,
        *,
        key: str,
        copies: Mapping[str, str] | None = None,
        made: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
        drops: Collection[str] = (),
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Reserve the space, write headers, index and side files, and take over an earlier run.

        Args:
            out: target directory; it must not exist, or be empty. Its parent must exist.
            source: the checkpoint whose files, order and metadata are kept.
            key: digest of whatever decides the result (source, recipe, seeds, options). A staging
                directory with another key is thrown away.
            copies: new tensors and the source tensors whose shape, dtype and shard they take. If the
                source already stores a tensor of the new name, that one keeps its place.
            made, drops: tensors of other shapes, and tensors left out; see
                :func:`regauge.layout.plan_layout`.
            dtype: float64, float32, float16 or bfloat16 for every floating tensor; None keeps each.
            config: replacements at the top level of ``config.json``.
            files: further files, relative name -> contents; they replace those of the source.

        Raises:
            BadInput: ``out`` is taken, lies inside the source, has no parent, or is being written by
                another process; ``dtype`` is none of the four.
            CheckpointError: disk full, a tensor that cannot be recast, or no ``config.json`` to edit.
        """
        self.out = Path(out).absolute()
        self.source = source
        self.copies = dict(copies or {})
        self.made = dict(made or {})
        self.drops = frozenset(drops)
        self.dtype = dtype
        self.digests: dict[str, str] = {}
        self.resumed: set[str] = set()
        self._files: dict[str, int] = {}
        self._journal: Journal | None = None
        self._check_place()
        self.targets = plan_layout(source, self.copies, dtype, self.made, self.drops)
        self.entries: dict[str, Entry] = {e.name: e for target in self.targets for e in target.entries}
        self.staging = self.out.parent / f".{self.out.name}.regauge-partial"
        self.directory = self.staging / "files"
        self._pool = ThreadPoolExecutor(2)
        self._hasher = ThreadPoolExecutor(1)  # one thread: the blocks of a tensor are hashed in order
        self._under_way: deque[_Block] = deque()
        fresh = False  # until the journal holds the lock, what is staged may be another process's
        try:
            with self._disk():
                self.staging.mkdir(exist_ok=True)
                self._journal = Journal(self.staging / "journal.jsonl", self._head(key))
                fresh = self._journal.fresh
                self.directory.mkdir(exist_ok=True)
                self._check_room()
                for target in self.targets:
                    self._allocate(target)
                self._write_rest(config or {}, files or {})
                self._take_over(self._journal.claims)
        except BaseException:
            if fresh:
                self.discard()
            self.close()
            raise

    def __enter__(self) -> StagedOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(entry.nbytes for entry in self.entries.values())

    def digest(self) -> str:
        """``Checkpoint.digest`` of the result, from the hashes made while writing."""
        self.drain()
        return contents_digest(self.entries.values(), self.digests)

    def finished(self, name: str) -> bool:
        return name in self.digests

    def copy(self, origins: Mapping[str, str], progress: Callable[[int], None] | None = None) -> None:
        """Copy tensors as bytes, two at a time.

        Args:
            origins: tensor of the result -> source tensor of the same dtype and shape.
            progress: called here, in the calling thread, with bytes done since the last call.
        """
        self.drain()
        places = {name: (origin, self.entries[name], self._file(name)) for name, origin in origins.items()}
        with self._disk():
            copy_tensors(self._pool, self.source, places, self._finish, progress)

    def write(
        self,
        name: str,
        blocks: Iterable[torch.Tensor],
        axis: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Write a tensor given as blocks in order along ``axis``, each of the tensor's staged dtype.

        The last blocks may still be on their way to the disk on return, so that the next tensor can be
        computed meanwhile; :meth:`drain` waits, and every other method that needs the bytes calls it.
        """
        entry = self.entries[name]
        shape = entry.shape or (1,)
        outer, itemsize = math.prod(shape[:axis]), DTYPES[entry.kind].itemsize
        inner = itemsize * math.prod(shape[axis + 1 :])
        digest, position, last = TensorHash(), 0, _Block([], 0)
        with self._disk():
            for block in blocks:
                count = block.shape[axis] if entry.shape else 1
                fits = block.dtype == DTYPES[entry.kind] and block.numel() * itemsize == outer * count * inner
                if not fits or position + count > shape[axis]:
                    raise ValueError(
                        f"{name}: a block {tuple(block.shape)} {block.dtype} does not fit {entry}"
                    )
                data, run = _bytes(block), count * inner
                while self._under_way and sum(b.size for b in self._under_way) + len(data) > _AHEAD:
                    self._settle()
                rows = [
                    (entry.start + (row * shape[axis] + position) * inner, data[row * run : (row + 1) * run])
                    for row in range(outer if run else 0)
                ]
                parts = [self._pool.submit(self._put_all, self._file(name), rows)]
                if outer == 1:
                    parts.append(self._hasher.submit(digest.update, data))
                self._under_way.append(last := _Block(parts, len(data)))
                position += count
                if progress is not None:
                    progress(len(data))
            if position != shape[axis]:
                raise ValueError(f"{name}: {position} of {shape[axis]} along axis {axis} written")
            if not last.parts:
                self._finish(name, digest.hexdigest())
            else:
                last.ends = (name, digest if outer == 1 else None)

    def drain(self) -> None:
        """Wait until all that was given to :meth:`write` has been written and entered in the journal."""
        with self._disk():
            while self._under_way:
                self._settle()

    def _settle(self) -> None:
        """Wait for the oldest block under way; if it ends its tensor, enter that in the journal."""
        block = self._under_way.popleft()
        wait(block.parts)
        for part in block.parts:
            part.result()
        if block.ends is not None:
            name, digest = block.ends
            self._finish(name, self._hash(name) if digest is None else digest.hexdigest())

    @staticmethod
    def _put_all(file: int, parts: list[tuple[int, memoryview]]) -> None:
        for at, data in parts:
            put(file, data, at)

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Write ``regauge.json``, make everything durable, and let it appear at ``out``.

        Raises:
            CheckpointError: a tensor is missing, or the disk is full.
            BadInput: ``out`` was taken in the meantime.
        """
        self.drain()
        missing = [name for name in self.entries if name not in self.digests]
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensor(s) were not written", parameter=missing[0], way_out="run again"
            )
        with self._disk():
            (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            for folder, _, files in os.walk(self.directory, topdown=False):
                for item in (*files, "."):
                    _sync(Path(folder) / item)
            try:
                os.rename(self.directory, self.out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _taken(self.out) from error
                raise
            with suppress(OSError):  # it is there, whole; only the directory's entry may not be durable yet
                _sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Delete everything staged. Nothing is left beside ``out``."""
        self.close()
        shutil.rmtree(self.staging, ignore_errors=True)

    def close(self) -> None:
        """Close files and give up the lock; what is staged stays, and what is whole counts."""
        with suppress(OSError):
            while self._under_way and self._files:
                self._settle()
        self._under_way.clear()
        self._pool.shutdown()
        self._hasher.shutdown()
        while self._files:
            os.close(self._files.popitem()[1])
        if self._journal is not None:
            self._journal.close()

    def _check_place(self) -> None:
        check_free(self.out)
        root = self.source.path.resolve()
        if root in self.out.resolve().parents and (self.source.side_files or self.source.index):
            raise BadInput(
                "the output would lie inside the source",
                expected=f"a directory outside {self.source.path}",
                found=str(self.out),
                way_out="write beside the source",
            )

    @contextmanager
    def _disk(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL
            need = self.size_bytes
            raise CheckpointError(
                "the disk is full" if full else f"the output cannot be written: {error.strerror or error}",
                expected=f"{need / 1e6:.1f} MB at {self.out.parent}" if full else None,
                found=f"{shutil.disk_usage(self.out.parent).free / 1e6:.1f} MB free ({error.strerror})"
                if full
                else None,
                way_out="make room and run again, or write elsewhere"
                if full
                else "check permissions, or write elsewhere",
            ) from error

    def _head(self, key: str) -> dict[str, Any]:
        layout = hashlib.sha256(b"".join(target.header for target in self.targets)).hexdigest()
        return {"regauge-journal": 1, "key": key, "layout": layout}

    def _write_rest(self, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Everything but the weights: index, side files, edited config."""
        for stale in (path for path in self.directory.iterdir() if path.name not in self._files):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for file in self.source.side_files:
            (self.directory / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source.path / file, self.directory / file)
        if self.source.index is not None:
            text = index_text(self.source, self.entries, recast=self.dtype is not None)
            (self.directory / self.source.index).write_bytes(text)
        if config:
            (self.directory / CONFIG).write_bytes(config_text(self.source, config))
        for file, content in files.items():
            (self.directory / file).write_bytes(content)

    def _check_room(self) -> None:
        """Raise ENOSPC now rather than in the middle. What others write meanwhile is met when it happens."""
        used = sum(
            (self.directory / target.file).stat().st_blocks * 512
            for target in self.targets
            if (self.directory / target.file).exists()
        )
        if sum(target.size for target in self.targets) > used + shutil.disk_usage(self.directory).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _allocate(self, target: Target) -> None:
        path = self.directory / target.file
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._files[target.file] = file
        if os.fstat(file).st_size != target.size:
            os.ftruncate(file, 0)
            os.ftruncate(file, target.size)  # Reserving the blocks as well makes every write cost more.
        put(file, memoryview(target.header), 0)

    def _take_over(self, claims: Mapping[str, str]) -> None:
        for name, value in claims.items():
            if name in self.entries and self._hash(name) == value:
                self.digests[name] = value
                self.resumed.add(name)

    def _file(self, name: str) -> int:
        return self._files[self.entries[name].file]

    def _hash(self, name: str) -> str:
        entry, digest = self.entries[name], TensorHash()
        for offset in range(0, entry.nbytes, _CHUNK):
            digest.update(
                os.pread(self._file(name), min(_CHUNK, entry.nbytes - offset), entry.start + offset)
            )
        return digest.hexdigest()

    def _finish(self, name: str, digest: str) -> None:
        assert self._journal is not None
        self._journal.finish(name, digest)
        self.digests[name] = digest


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free(out: Path) -> None:
    """Raises ``BadInput`` unless ``out`` is an empty directory, or could become a directory."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise _taken(out)
    if not out.parent.is_dir():
        raise BadInput(
            "there is nowhere to write",
            expected=f"an existing directory {out.parent}",
            found="none",
            way_out=f"mkdir -p {out.parent}",
        )


def _taken(out: Path) -> BadInput:
    return BadInput(
        "the output exists already",
        expected="a path that does not exist, or an empty directory",
        found=str(out),
        way_out="choose another path; nothing is ever overwritten",
    )
