"""What changes and training apart do to fingerprints: the pairs of ``compare_pairs.py`` that are directories.

    python benchmarks/fingerprint_pairs.py --store DIR     # the DIR of compare_pairs.py

The calibration of distances, ``src/regauge/provenance/calibration.json``, comes from here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.progress import track

from harness import machine, save, table
from pairs import scores
from pairs.families import FAMILIES
from pairs.makers import Store
from pairs.manifest import Pair, pairs
from pairs.recipes import Made
from regauge.provenance import Fingerprint, distance, fingerprint

UNTRAINED = "never trained"
CALIBRATION = Path(__file__).parent.parent / "src" / "regauge" / "provenance" / "calibration.json"


def fingerprints(store: Store, found: list[Pair]) -> dict[Made, Fingerprint]:
    models = dict.fromkeys(made for pair in found for made in (pair.a, pair.b))
    return {made: fingerprint(store.stored(made), run=False) for made in track(models, "fingerprints")}


def measured(found: list[Pair], held: dict[Made, Fingerprint]) -> list[dict[str, Any]]:
    return [
        {"name": pair.name, "family": pair.family, "kind": pair.kind, "derived": pair.derived}
        | {"distance": distance(held[pair.a], held[pair.b])}
        for pair in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="directory of the models")
    store = Store(parser.parse_args().store)
    found = [pair for pair in pairs() if FAMILIES[pair.family].stored]
    results = measured(found, fingerprints(store, found))
    by_kind: dict[str, list[float]] = {}
    for result in results:
        by_kind.setdefault(result["kind"], []).append(result["distance"])
    trained = [r["distance"] for r in results if not r["derived"] and r["kind"] != UNTRAINED]
    law = scores.threshold([1 - value for value in trained])
    limit = 1 - law["at false-positive rate"]["normal"]["0.001"]
    derived = [r["distance"] for r in results if r["derived"]]
    apart = [r["distance"] for r in results if not r["derived"]]
    counts = {
        "derived": len(derived),
        "found": sum(value <= limit for value in derived),
        "unrelated": len(apart),
        "false": sum(value <= limit for value in apart),
    }
    chosen = {"threshold": round(limit, 6), "false-positive rate": 0.001, "pairs": counts, "law": law}
    CALIBRATION.write_text(json.dumps(chosen, indent=1) + "\n")
    rows = [
        [kind, f"{min(v):.3g}", f"{sorted(v)[len(v) // 2]:.3g}", f"{max(v):.3g}"]
        for kind, v in by_kind.items()
    ]
    print(table(["", "least", "median", "most"], rows))
    print(f"threshold {limit:.3f}: {counts}")
    ends = {kind: [min(v), sorted(v)[len(v) // 2], max(v)] for kind, v in by_kind.items()}
    save("fingerprint", {"pairs": {"machine": machine(), "distance": ends, "threshold": limit, **counts}})


if __name__ == "__main__":
    main()
