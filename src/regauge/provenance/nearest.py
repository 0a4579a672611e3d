"""Approximate nearest neighbours: a graph beside the index, kept by USearch.

Source: hierarchical navigable small worlds, Malkov and Yashunin (arXiv 1603.09320).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regauge.errors import BadInput
from regauge.provenance.sketch import LENGTH
from regauge.provenance.store import Store

CONNECTIONS, EFFORT_BUILDING, EFFORT_SEARCHING = 16, 64, 128
_BATCH = 4096


class Approximate:
    """The graph of one index, in ``NAME.near`` beside it. It can be deleted at any time and is made anew."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = Path(f"{store.path}.near")
        self._graph = self._restored()

    def search(self, vector: np.ndarray, count: int) -> Sequence[int]:
        """Ids of about the nearest ``count`` entries, after all that was added since is in the graph."""
        self._update()
        if not len(self._graph):
            return []
        found = self._graph.search(np.ascontiguousarray(vector, dtype=np.float32), count)
        return [int(key) for key in found.keys]

    def _new(self) -> Any:
        return _library().Index(
            ndim=LENGTH,
            metric="ip",
            dtype="bf16",
            connectivity=CONNECTIONS,
            expansion_add=EFFORT_BUILDING,
            expansion_search=EFFORT_SEARCHING,
        )

    def _restored(self) -> Any:
        graph = self._new()
        if not self._path.exists():
            return graph
        try:
            graph.load(str(self._path))
        except Exception:  # Whatever is wrong with the file: it can be made anew.
            return self._new()
        return graph if self._belongs(graph) else self._new()

    def _belongs(self, graph: Any) -> bool:
        """Its first and last entries are those of the index: a graph left by another index is not used."""
        count, last = self._store.state()
        if graph.ndim != LENGTH or not len(graph) or len(graph) > count:
            return False
        keys = [int(key) for key in graph.keys[: len(graph)]]
        ends = (min(keys), max(keys))
        held = self._store.vectors_of(ends)
        return max(keys) <= last and all(
            key in held and float(np.abs(np.asarray(graph.get(key)).reshape(-1) - held[key]).max()) < 1e-2
            for key in ends
        )

    def _update(self) -> None:
        """Ids only ever grow, so a graph that holds as many entries, the last one included, holds all."""
        count, last = self._store.state()
        if len(self._graph) == count and (not count or last in self._graph):
            return
        after = max((int(key) for key in self._graph.keys[: len(self._graph)]), default=0)
        grown = list(self._store.vectors(after))
        if len(self._graph) + len(grown) != count:
            self._graph, grown = self._new(), list(self._store.vectors())
        for start in range(0, len(grown), _BATCH):
            part = grown[start : start + _BATCH]
            keys = np.array([identifier for identifier, _ in part], dtype=np.uint64)
            rows = np.stack([np.frombuffer(blob, dtype="<f4") for _, blob in part])
            self._graph.add(keys, rows, threads=1)  # One thread: the same graph every time.
        self._save()

    def _save(self) -> None:
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            self._graph.save(str(partial))
            partial.replace(self._path)
        except OSError:
            partial.unlink(missing_ok=True)  # Beside a read-only index: the graph lives in memory only.


def _library() -> Any:
    try:
        import usearch.index as library
    except ImportError as error:
        raise BadInput(
            "approximate search needs USearch",
            way_out="pip install 'regauge[index]', or leave --approximate out: the exact search is fast, too",
        ) from error
    return library
