"""Copy tensors as bytes between files, hashing them on the way, several pieces at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from queue import SimpleQueue
from threading import Event

from regauge.checkpoint import Checkpoint
from regauge.digest import PIECE, join_pieces
from regauge.shards import Entry

_CHUNK = 1 << 20
Places = Mapping[str, tuple[str, Entry, int]]
"""Tensor of the result -> (source tensor, where it goes, open file)."""


def put(file: int, data: memoryview, at: int) -> None:
    """Write all of ``data`` at byte ``at`` of the file."""
    while len(data):
        done = os.pwrite(file, data, at)
        data, at = data[done:], at + done


def copy_tensors(
    pool: Executor,
    source: Checkpoint,
    places: Places,
    finish: Callable[[str, str], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy every tensor of ``places``.

    Args:
        pool: where the work is done.
        source: where the bytes come from.
        places: what goes where.
        finish: called with tensor and hash when all bytes of it have been written.
        progress: called with the number of bytes done since the last call.

    Both callbacks run in the calling thread. Whatever they, reading or writing raise ends the copying.
    """
    done: SimpleQueue[tuple[str, int, int]] = SimpleQueue()
    stop = Event()
    jobs: dict[str, list[Future[bytes]]] = {}

    def piece(name: str, start: int) -> bytes:
        """Copy one piece; report (name, piece, bytes) on the way, and 0 bytes at the end, come what may."""
        origin, entry, file = places[name]
        digest, end = hashlib.sha256(), min(start + PIECE, entry.nbytes)
        try:
            buffer = memoryview(bytearray(min(end - start, _CHUNK)))
            for offset in range(start, end, _CHUNK):
                if stop.is_set():
                    break
                part = buffer[: end - offset]
                source.read_into(origin, offset, part)
                digest.update(part)
                put(file, part, entry.start + offset)
                done.put((name, start // PIECE, len(part)))
            return digest.digest()
        finally:
            done.put((name, start // PIECE, 0))

    try:
        for name, (origin, entry, _) in places.items():
            if source.entry(origin).nbytes != entry.nbytes:
                raise ValueError(f"{origin} cannot be copied to {name} as bytes")
            jobs[name] = [pool.submit(piece, name, start) for start in range(0, entry.nbytes, PIECE)]
            if not jobs[name]:
                finish(name, join_pieces(()))
        left = {name: len(pieces) for name, pieces in jobs.items() if pieces}
        while left:
            name, index, count = done.get()
            if count == 0:
                jobs[name][index].result()
                left[name] -= 1
            elif progress is not None:
                progress(count)
            if left[name] == 0:
                finish(name, join_pieces(job.result() for job in jobs[name]))
                del left[name]
    finally:
        stop.set()
        wait([job for pieces in jobs.values() for job in pieces])
