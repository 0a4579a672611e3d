"""The journal of a staged output: one line of JSON per finished tensor, under an exclusive lock.

The first line says whose journal it is. A file that starts with another line is emptied; a line that
is torn or odd ends the journal there. What a line claims is still to be checked against the bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regauge.errors import BadInput


class Journal:
    """An append-only file, locked while open.

    Attributes:
        claims: finished tensor -> hash of its bytes, as an earlier run with the same head wrote it.
        fresh: True if there was nothing to go on from.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Open or create. Raises ``BadInput`` if another process holds it."""
        self.claims: dict[str, str] = {}
        self.fresh = True
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BadInput(
                "another process is writing this output",
                found=str(path.parent),
                way_out="wait for it, or write elsewhere",
            ) from None
        try:
            self._read(path, head)
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path, head: Mapping[str, Any]) -> None:
        good = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
            item = _parse(line)
            if number == 0 and item == head:
                good += len(line)
            elif number > 0 and set(item) == {"tensor", "hash"}:
                self.claims[item["tensor"]] = item["hash"]
                good += len(line)
            else:
                break
        os.ftruncate(self._file, good)
        self.fresh = good == 0
        if self.fresh:
            self._append(head)

    def finish(self, name: str, digest: str) -> None:
        """Note that the tensor's bytes have been written, and their hash."""
        self._append({"tensor": name, "hash": digest})

    def close(self) -> None:
        """Give up the lock; the file stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, item: Mapping[str, Any]) -> None:
        line = json.dumps(item).encode() + b"\n"
        while line:
            line = line[os.write(self._file, line) :]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        item = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        item = None
    return item if isinstance(item, dict) else {}
