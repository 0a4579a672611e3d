"""An index of random fingerprints: adding, reading, and searching it exactly and through the graph.

    python benchmarks/fingerprint_index.py [COUNT]

The result is merged into ``results/fingerprint.json``. Bar: a search among 100 000 within 50 ms.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from harness import machine, memory, save
from regauge.provenance import Fingerprint, Index
from regauge.provenance.sketch import LENGTH

QUERIES = 100
NOISE = 0.3
"""Of a query, relative to the entry that it was made from: what hard rounding leaves."""


def made(vector: np.ndarray) -> Fingerprint:
    unit = (vector / np.linalg.norm(vector)).astype(np.float32)
    return Fingerprint(unit, None, None, {}, "Some", 1, 0.0)


def searched(index: Index, queries: list[tuple[str, Fingerprint]], approximate: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    index.search(queries[0][1], approximate=approximate)
    first = time.perf_counter() - begin
    times: list[float] = []
    right = 0
    for name, wanted in queries:
        begin = time.perf_counter()
        hits = index.search(wanted, approximate=approximate)
        times.append(1e3 * (time.perf_counter() - begin))
        right += hits[0].name == name
    return {
        "first_s": round(first, 2),
        "median_ms": round(median(times), 2),
        "fastest_ms": round(min(times), 2),
        "slowest_ms": round(max(times), 2),
        "source_first": right / len(queries),
    }


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    host = machine()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        vectors = random.standard_normal((count, LENGTH), dtype=np.float32)
        picked = random.choice(count, QUERIES, replace=False)
        noise = NOISE * random.standard_normal((QUERIES, LENGTH), dtype=np.float32)
        queries = [(f"m{k}", made(vectors[k] + noise[i])) for i, k in enumerate(picked)]
        begin = time.perf_counter()
        with Index.open(path, create=True) as index:
            index.add((f"m{place}", made(vector)) for place, vector in enumerate(vectors))
        adding = time.perf_counter() - begin
        size = path.stat().st_size
        with Index.open(path) as index:
            exact = searched(index, queries, approximate=False)
        with Index.open(path) as index:
            graph = searched(index, queries, approximate=True)
        with Index.open(path) as index:
            begin = time.perf_counter()
            index.search(queries[0][1], approximate=True)
            again = round(time.perf_counter() - begin, 2)
    found = {
        "entries": count,
        "add_s": round(adding, 1),
        "bytes_per_entry": round(size / count),
        "exact": exact,
        "graph": {**graph, "load_s": again},
        "peak_mb": round(memory()),
        "machine": host,
    }
    print(found)
    save("fingerprint", {"index": found})


if __name__ == "__main__":
    main()
