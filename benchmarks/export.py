"""How fast ONNX Runtime runs a model before and after a rewrite: exported source against exported result.

For each case, in a process of its own: export both (each certified against its own source), compare the
outputs of the two files, and run them in turn, on one thread, each first in every other round. The ratio is
after over before, of two times of one round; its median and quartiles count, and below one is faster. Whisper
is run whole, 3000 frames through the encoder and eight tokens through the decoder: its encoder alone is not
the same function afterwards, since its last gain is folded into the decoder.

    python benchmarks/export.py                  # MiniLM, Whisper tiny.en, CREPE tiny
    python benchmarks/export.py minilm           # some
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from harness import machine, save, table, worker

MOVES: dict[str, list[Any]] = {
    "minilm": ["fold-value-bias", "drop-key-bias", "strip"],
    "whisper-tiny.en": [
        "untie",
        "fold-shifts",
        "fold-scales",
        "fold-value-bias",
        {"name": "center", "norm": "rms"},
        "strip",
    ],
    "crepe-tiny": ["fold-batchnorm"],
}
ROUNDS = 30
ALLOWED = 1e-4
"""Relative difference of the outputs of the two files, float32."""


def exported(case: str, place: Path) -> tuple[Path, Path]:
    """ONNX of the source and of the rewritten model."""
    import regauge
    from regauge import packaged

    before, after = place / "before.onnx", place / "after.onnx"
    recipe = {"moves": MOVES[case]}
    if any(row.name == case and row.kind == "module" for row in packaged.available()):
        module, inputs = packaged.module(case), packaged.example(case)
        regauge.export(module, before, inputs=inputs)
        regauge.export(regauge.rewrite_module(module, inputs, recipe)[0], after, inputs=inputs)
    else:
        regauge.export(f"packaged:{case}", before)
        regauge.rewrite(f"packaged:{case}", place / "files", recipe)
        regauge.export(place / "files", after)
    return before, after


def measure(case: str, rounds: int) -> dict[str, Any]:
    import onnxruntime

    from regauge import packaged

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as place:
        files = exported(case, Path(place))
        sessions = [onnxruntime.InferenceSession(str(f), options, ["CPUExecutionProvider"]) for f in files]
        inputs = {name: value.numpy() for name, value in packaged.example(case).items()}
        given = [{item.name: inputs[item.name] for item in session.get_inputs()} for session in sessions]
        error = _difference(*(session.run(None, x) for session, x in zip(sessions, given, strict=True)))
        assert error < ALLOWED, f"the two files differ by {error}"
        taken: list[list[float]] = []
        for number in range(rounds + 2):
            times = [0.0, 0.0]
            for at in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                sessions[at].run(None, given[at])
                times[at] = time.perf_counter() - start
            taken += [times] if number >= 2 else []
        nodes = [_nodes(file) for file in files]
    before, after = (statistics.median(column) for column in zip(*taken, strict=True))
    low, middle, high = statistics.quantiles([b / a for a, b in taken], n=4, method="inclusive")
    return {
        "moves": MOVES[case],
        "before_ms": round(1000 * before, 3),
        "after_ms": round(1000 * after, 3),
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "error": error,
        "nodes": nodes,
        "rounds": rounds,
        "onnxruntime": onnxruntime.__version__,
    }


def _difference(before: Any, after: Any) -> float:
    """Largest relative difference of an output, in the Frobenius norm."""
    pairs = zip(before, after, strict=True)
    return max(float(numpy.linalg.norm(a - b) / numpy.linalg.norm(a)) for a, b in pairs)


def _nodes(file: Path) -> int:
    import onnx

    return len(onnx.load(file, load_external_data=False).graph.node)


def row(case: str, found: Mapping[str, Any]) -> list[str]:
    before, after = found["nodes"]
    share = "{:.3f} ({:.3f}–{:.3f})".format(found["ratio"], *found["quartiles"])
    times = [f"{found[name]} ms" for name in ("before_ms", "after_ms")]
    return [case, *times, share, f"{found['error']:.1e}", f"{before} → {after}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(MOVES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dry", action="store_true", help="do not save the results")
    parser.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(given.worker, given.rounds)))
        return
    results = {
        case: worker(__file__, case, "--rounds", str(given.rounds)) | {"machine": machine()}
        for case in given.cases
    }
    print(
        table(
            ("model", "before", "after", "ratio", "difference", "nodes"),
            [row(c, r) for c, r in results.items()],
        )
    )
    if not given.dry:
        save("export", results)


if __name__ == "__main__":
    main()
