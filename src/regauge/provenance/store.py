"""The SQLite file of an index: its schema, rows and transactions.

Write-ahead logging lets any number of processes read while one writes; a writer that is killed leaves what
was committed before. Rows are never changed in place: what replaces one gets a new, higher number, so that a
reader knows from the count and the highest number whether it has seen everything.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regauge.errors import BadInput
from regauge.provenance.fingerprint import Fingerprint, check_version

SCHEMA = 1
APPLICATION = 0x72676670
"""Marks the file, in its header, as an index of fingerprints."""
PAGE = 1 << 14
"""Bytes: seven rows; the usual 4096 would hold one."""
PATIENCE = 60.0
"""Seconds to wait for another writer."""

_TABLES = """
CREATE TABLE fingerprint (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    digest TEXT,
    architecture TEXT NOT NULL,
    parameters INTEGER NOT NULL,
    seconds REAL NOT NULL,
    version INTEGER NOT NULL,
    details TEXT NOT NULL,
    behaviour BLOB,
    vector BLOB NOT NULL
)
"""
_COLUMNS = "name, digest, architecture, parameters, seconds, version, details, behaviour, vector"


@dataclass(frozen=True)
class Row:
    """One entry, without its numbers."""

    name: str
    architecture: str
    parameters: int
    digest: str | None


class Store:
    """An open file. Make one with :meth:`open`; use as a context manager or :meth:`close` it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Store:
        """Open an index; with ``create`` make it if it is not there.

        Raises:
            BadInput: no such file, no index, an index of another schema, or a file that cannot be opened.
        """
        path = Path(path)
        if not path.exists() and not create:
            raise BadInput("there is no such index", found=str(path), way_out="regauge index add DB SRC")
        try:
            connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        except sqlite3.Error as error:
            raise BadInput(f"{path} cannot be opened", found=str(error)) from error
        store = cls(path, connection)
        try:
            store._prepare(create)
        except sqlite3.Error as error:
            connection.close()
            raise BadInput(f"{path} is no index of fingerprints", found=str(error)) from error
        except BaseException:
            connection.close()
            raise
        return store

    def _prepare(self, create: bool) -> None:
        run = self._connection.execute
        if create and not self._tables():
            run(f"PRAGMA page_size = {PAGE}")
            run("PRAGMA journal_mode = WAL")
            with self._transaction():
                if not self._tables():  # Another process may have been faster.
                    run(_TABLES)
                    run(f"PRAGMA application_id = {APPLICATION}")
                    run(f"PRAGMA user_version = {SCHEMA}")
        run("PRAGMA synchronous = NORMAL")
        application = run("PRAGMA application_id").fetchone()[0]
        schema = run("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION or schema != SCHEMA:
            raise BadInput(
                f"{self.path} is no index of fingerprints that this version reads",
                expected=f"application {APPLICATION:#x}, schema {SCHEMA}",
                found=f"application {application:#x}, schema {schema}",
                way_out="export it with the version that wrote it, and import that",
            )

    def _tables(self) -> int:
        return self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    @contextmanager
    def _transaction(self) -> Generator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()

    def add(self, items: Iterable[tuple[str, Fingerprint]], *, replace: bool = False) -> int:
        """Add all items or, on any error, none. Returns how many.

        Raises:
            BadInput: a name that is there already, unless ``replace``; a fingerprint of another version.
        """
        count = 0
        with self._transaction():
            for name, found in items:
                check_version(found.version)
                if replace:
                    self._connection.execute("DELETE FROM fingerprint WHERE name = ?", (name,))
                try:
                    self._connection.execute(
                        f"INSERT INTO fingerprint ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        _row(name, found),
                    )
                except sqlite3.IntegrityError as error:
                    raise BadInput(
                        "the index has an entry of this name",
                        found=name,
                        way_out="give another --name, or --replace",
                    ) from error
                count += 1
        return count

    def state(self) -> tuple[int, int]:
        """(number of rows, highest id): equal states hold equal rows."""
        query = "SELECT count(*), coalesce(max(id), 0) FROM fingerprint"
        count, last = self._connection.execute(query).fetchone()
        return int(count), int(last)

    def vectors(self, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """(id, vector as little-endian float32) of all rows with a higher id, in order."""
        query = "SELECT id, vector FROM fingerprint WHERE id > ? ORDER BY id"
        yield from self._connection.execute(query, (after,))

    def vectors_of(self, ids: Iterable[int]) -> dict[int, np.ndarray]:
        """id -> vector, for those that are there."""
        out: dict[int, np.ndarray] = {}
        for identifier in ids:
            row = self._connection.execute(
                "SELECT vector FROM fingerprint WHERE id = ?", (int(identifier),)
            ).fetchone()
            if row is not None:
                out[int(identifier)] = np.frombuffer(row[0], dtype="<f4")
        return out

    def row(self, identifier: int) -> Row | None:
        query = "SELECT name, architecture, parameters, digest FROM fingerprint WHERE id = ?"
        found = self._connection.execute(query, (identifier,)).fetchone()
        return None if found is None else Row(*found)

    def rows(self) -> Iterator[Row]:
        """All rows in the order in which they were added."""
        query = "SELECT name, architecture, parameters, digest FROM fingerprint ORDER BY id"
        for found in self._connection.execute(query):
            yield Row(*found)

    def items(self) -> Iterator[tuple[str, Fingerprint]]:
        """All names and fingerprints in the order in which they were added."""
        for row in self._connection.execute(f"SELECT {_COLUMNS} FROM fingerprint ORDER BY id"):
            yield row[0], _fingerprint(row[1:])

    def get(self, name: str) -> Fingerprint | None:
        query = f"SELECT {_COLUMNS} FROM fingerprint WHERE name = ?"
        row = self._connection.execute(query, (name,)).fetchone()
        return None if row is None else _fingerprint(row[1:])


def _row(name: str, found: Fingerprint) -> tuple[Any, ...]:
    behaviour = None if found.behaviour is None else found.behaviour.astype("<f8").tobytes()
    details = json.dumps(dict(found.details), sort_keys=True)
    vector = found.vector.astype("<f4").tobytes()
    head = (name, found.digest, found.architecture, found.parameters, found.seconds, found.version)
    return (*head, details, behaviour, vector)


def _fingerprint(row: tuple[Any, ...]) -> Fingerprint:
    digest, architecture, parameters, seconds, version, details, behaviour, vector = row
    held: Mapping[str, Any] = json.loads(details)
    return Fingerprint(
        vector=np.frombuffer(vector, dtype="<f4").astype(np.float32),
        behaviour=None if behaviour is None else np.frombuffer(behaviour, dtype="<f8").astype(np.float64),
        digest=digest,
        details=held,
        architecture=architecture,
        parameters=parameters,
        seconds=seconds,
        version=version,
    )
