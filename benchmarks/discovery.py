"""How long discovery takes and how much memory: import, model on meta, trace, atlas.

Bars: Gemma 3 270M: trace and atlas within 8 s; Llama of 405B shape, 126 layers: within 30 s and 1 GB.

    python benchmarks/discovery.py                       # all cases
    python benchmarks/discovery.py llama-405b-126        # some
    python benchmarks/discovery.py --runs 3 gemma-3-270m # the median of several processes
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from harness import machine, memory, ratio, save, table, worker

PACKAGED = ("gemma-3-270m", "whisper-tiny.en")
DEPTHS = (8, 32, 126)
BARS: dict[str, dict[str, float]] = {
    "gemma-3-270m": {"seconds": 8.0},
    "llama-405b-126": {"seconds": 30.0, "memory_mb": 1000.0},
}


def discover_case(case: str) -> dict[str, Any]:
    """Seconds by stage; ``seconds`` is what the bars are about: trace and atlas."""
    begin = time.perf_counter()
    import transformers  # noqa: F401  (an import is not discovery)

    from regauge.discover import discover
    from regauge.hf import load_meta
    from regauge.trace import trace

    imported, base = time.perf_counter(), memory("VmRSS")
    if case in PACKAGED:
        from regauge import packaged

        source: Any = packaged.directory(case)
    else:
        from transformers import LlamaConfig

        source = LlamaConfig(
            vocab_size=128256,
            hidden_size=16384,
            intermediate_size=53248,
            num_hidden_layers=int(case.rpartition("-")[2]),
            num_attention_heads=128,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
        )
    ready = time.perf_counter()
    held = load_meta(source)
    loaded, processor = time.perf_counter(), time.process_time()
    traced = trace(held.model, (), held.inputs)
    exported = time.perf_counter()
    atlas = discover(traced)
    done = time.perf_counter()
    return {
        "import_s": round(imported - begin, 2),
        "model_s": round(loaded - ready, 2),
        "trace_s": round(exported - loaded, 2),
        "atlas_s": round(done - exported, 2),
        "seconds": round(done - loaded, 2),
        "cpu_s": round(time.process_time() - processor, 2),
        "memory_mb": round(memory()),
        "import_mb": round(base),
        "nodes": len(traced.graph.nodes),
        "generators": len(atlas.generators),
    }


def main() -> None:
    cases = [*PACKAGED, *(f"llama-405b-{depth}" for depth in DEPTHS)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=cases, help=f"of {', '.join(cases)}")
    parser.add_argument("--runs", type=int, default=3, help="processes for each case; the median counts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(discover_case(given.cases[0])))
        return
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    for case in given.cases:
        before = machine()
        runs = [worker(__file__, case) for _ in range(given.runs)]
        figures = sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]
        figures["seconds_of_runs"] = [run["seconds"] for run in runs]
        figures["memory_mb"] = round(statistics.median(run["memory_mb"] for run in runs))
        bars = BARS.get(case, {})
        figures["ratio_to_bar"] = {key: round(figures[key] / bar, 3) for key, bar in bars.items()}
        found[case] = {**figures, "bars": bars, "machine": before}
        rows.append(
            [
                case,
                *(
                    f"{figures[key]:.1f}"
                    for key in ("import_s", "model_s", "trace_s", "atlas_s", "cpu_s", "seconds")
                ),
                ratio(figures["seconds"], bars["seconds"]) if "seconds" in bars else "",
                f"{figures['memory_mb']}",
                ratio(figures["memory_mb"], bars["memory_mb"]) if "memory_mb" in bars else "",
                str(figures["nodes"]),
                str(figures["generators"]),
            ]
        )
        print(f"{case}: {figures['seconds']} s", flush=True)
    head = [
        "case",
        "import s",
        "model s",
        "trace s",
        "atlas s",
        "cpu s",
        "trace + atlas s",
        "/ bar",
        "peak MB",
        "/ bar",
        "nodes",
    ]
    print("\n" + table([*head, "generators"], rows))
    save("discovery", found)


if __name__ == "__main__":
    main()
