"""An index of fingerprints: which of the models it knows are nearest to this one?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from regauge.errors import BadInput
from regauge.provenance.calibration import threshold
from regauge.provenance.fingerprint import Fingerprint, check_version, same_function
from regauge.provenance.nearest import Approximate
from regauge.provenance.sketch import LENGTH
from regauge.provenance.store import Row, Store

SPARE = 16
"""Candidates that the approximate search looks at besides those asked for; they are ranked exactly."""


@dataclass(frozen=True)
class Hit:
    """A neighbour.

    Attributes:
        name, architecture, parameters, digest: as in the index.
        distance: see :func:`regauge.provenance.distance`.
        related: whether the distance is below that of models trained apart, see
            :func:`regauge.provenance.calibration.threshold`.
        same_function: see :func:`regauge.provenance.same_function`.
    """

    name: str
    distance: float
    related: bool
    same_function: bool | None
    architecture: str
    parameters: int
    digest: str | None


class Index:
    """An open index. Make one with :meth:`open`; use as a context manager or :meth:`close` it.

    Vectors are read once and kept; later searches read what was added since, by any process.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._state = (0, 0)
        self._ids = np.zeros(0, dtype=np.int64)
        self._matrix = np.zeros((0, LENGTH), dtype=np.float32)
        self._near: Approximate | None = None

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False) -> Index:
        """Open an index; with ``create`` make it if it is not there.

        Raises:
            BadInput: no such file, or not an index that this version reads.
        """
        return cls(Store.open(path, create=create))

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._store.close()

    def __len__(self) -> int:
        return self._store.state()[0]

    def add(self, items: Iterable[tuple[str, Fingerprint]], *, replace: bool = False) -> int:
        """Add (name, fingerprint) pairs, all or none. Returns how many.

        Raises:
            BadInput: a name that is there already, unless ``replace``; a fingerprint of another version.
        """
        return self._store.add(items, replace=replace)

    def rows(self) -> Iterator[Row]:
        """What is in the index, in the order in which it was added."""
        return self._store.rows()

    def get(self, name: str) -> Fingerprint | None:
        """The fingerprint of this name, or None."""
        return self._store.get(name)

    def search(self, wanted: Fingerprint, count: int = 10, *, approximate: bool = False) -> tuple[Hit, ...]:
        """The nearest entries, nearest first; those equally far in the order in which they were added.

        Args:
            wanted: any fingerprint, whether or not it is in the index.
            count: how many, at least one.
            approximate: through a graph of neighbours, which is kept beside the index and brought up to
                date first. It may miss a neighbour; distances are exact.

        Raises:
            BadInput: a fingerprint of another version, a count below one, or, for ``approximate``, no
                library for it.
        """
        check_version(wanted.version)
        if count < 1:
            raise BadInput("at least one neighbour has to be asked for", found=str(count))
        found = self._candidates(wanted.vector, count, approximate)
        order = sorted((round(distance, 12), identifier) for identifier, distance in found.items())
        hits: list[Hit] = []
        for distance, identifier in order:
            row = self._store.row(identifier)
            other = None if row is None else self._store.get(row.name)
            if row is None or other is None:  # Replaced by another process since.
                continue
            same = same_function(wanted, other)
            related = distance <= threshold()
            hits.append(Hit(row.name, distance, related, same, row.architecture, row.parameters, row.digest))
            if len(hits) == count:
                break
        return tuple(hits)

    def _candidates(self, vector: np.ndarray, count: int, approximate: bool) -> dict[int, float]:
        if approximate:
            if self._near is None:
                self._near = Approximate(self._store)
            ids = self._near.search(vector, count + SPARE)
        else:
            self._refresh()
            query = torch.from_numpy(np.array(vector, dtype=np.float32))
            scores = torch.mv(torch.from_numpy(self._matrix), query).numpy()
            wanted = min(len(scores), count + SPARE)
            best = np.argpartition(-scores, wanted - 1)[:wanted] if wanted else np.zeros(0, dtype=np.int64)
            ids = [int(self._ids[place]) for place in best]
        exact = vector.astype(np.float64)
        return {
            identifier: max(0.0, 1.0 - float(held.astype(np.float64) @ exact))
            for identifier, held in self._store.vectors_of(ids).items()
        }

    def _refresh(self) -> None:
        """Read what was added since the last search; everything, if something was replaced."""
        state = self._store.state()
        if state == self._state:
            return
        grown = list(self._store.vectors(self._state[1]))
        if len(self._ids) + len(grown) != state[0]:
            grown, self._ids = list(self._store.vectors()), self._ids[:0]
            self._matrix = self._matrix[:0]
        matrix = np.empty((len(self._ids) + len(grown), LENGTH), dtype=np.float32)
        matrix[: len(self._ids)] = self._matrix
        for place, (_, blob) in enumerate(grown, start=len(self._ids)):
            matrix[place] = np.frombuffer(blob, dtype="<f4")
        ids = np.fromiter((identifier for identifier, _ in grown), dtype=np.int64, count=len(grown))
        self._ids, self._matrix = np.concatenate([self._ids, ids]), matrix
        self._state = (len(self._ids), int(self._ids[-1]) if len(self._ids) else 0)

    def dump(self) -> Iterator[str]:
        """Every entry as one line of JSON: a name and a fingerprint."""
        for name, found in self._store.items():
            yield json.dumps({"name": name, **json.loads(found.to_json())}, sort_keys=True)

    def load(self, lines: Iterable[str], *, replace: bool = False) -> int:
        """Add what :meth:`dump` wrote, all or nothing. Returns how many.

        Raises:
            BadInput: a line that is no entry, with its number; or as for :meth:`add`.
        """
        return self.add(_parsed(lines), replace=replace)


def _parsed(lines: Iterable[str]) -> Iterator[tuple[str, Fingerprint]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name = json.loads(line)["name"]
            if not isinstance(name, str):
                raise TypeError("the name is no text")
            yield name, Fingerprint.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"line {number} is no entry", found=f"{type(error).__name__}: {error}") from error
        except BadInput as error:
            raise BadInput(f"line {number}: {error.message}", found=error.found) from error
