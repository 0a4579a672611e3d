"""Hashes of tensors and of whole checkpoints, made so that the parts can be hashed in parallel.

- Of a tensor: SHA-256 of the concatenated SHA-256 digests of its bytes in pieces of 8 MiB.
- Of a checkpoint: SHA-256 of one line of JSON per tensor, sorted by name: ``["name","KIND",[shape],"hex"]``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from regauge.shards import Entry

PIECE = 8 << 20


class TensorHash:
    """Hash of one tensor, fed with its bytes in order."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._piece = hashlib.sha256()
        self._room = PIECE

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._piece.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._pieces.append(self._piece.digest())
                self._piece, self._room = hashlib.sha256(), PIECE

    def hexdigest(self) -> str:
        last = [self._piece.digest()] if self._room < PIECE else []
        return join_pieces([*self._pieces, *last])


def join_pieces(pieces: Iterable[bytes]) -> str:
    """Hash (hex) of a tensor from the SHA-256 digests of its pieces."""
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def contents_digest(entries: Iterable[Entry], digests: Mapping[str, str]) -> str:
    """Hash (hex) of the contents of a checkpoint, from the hashes of its tensors."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda entry: entry.name):
        line = [entry.name, entry.kind, list(entry.shape), digests[entry.name]]
        digest.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
