"""Claims about training with norms, tried on small models: the sweeps of ``benchmarks/lab``.

python benchmarks/norms_training.py [SWEEP ...] [--jobs 2] [--steps N] [--out DIR]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import harness
from regauge.lab import SweepConfig, load_sweep
from regauge.lab.data import prepare
from regauge.lab.sweep import interval, log, run_sweep, summary

SWEEPS = Path(__file__).parent / "lab"
Logs = Mapping[str, Sequence[Mapping[str, Any]]]


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and half of the 95 % interval over seeds."""
    found = interval(values)
    return None if found is None else {"mean": found.mean, "half": found.half, "seeds": found.count}


def by_group(logs: Logs, groups: Mapping[str, str], measure: Any) -> dict[str, Any]:
    """Setting -> a figure of the records of each of its runs that did not diverge, over seeds."""
    held: dict[str, list[float]] = {}
    for name, records in logs.items():
        values = held.setdefault(groups[name], [])
        if not any("diverged" in record for record in records):
            values.append(measure(records))
    return {group: spread(values) for group, values in held.items()}


def layers(record: Mapping[str, Any], key: str) -> list[float]:
    return [value for part, value in record[key].items() if part.startswith("layers.")]


def depth(logs: Logs, groups: Mapping[str, str]) -> dict[str, Any]:
    """Gradient of the first layer over that of the last, and variance behind the last over the first."""
    found: dict[str, Any] = {}
    for when, place in (("start", 0), ("end", -1)):
        for key in ("gradient", "variance"):

            def ratio(records: Any, place: int = place, key: str = key) -> float:
                values = layers(records[place], key)
                return values[0] / values[-1] if key == "gradient" else values[-1] / values[0]

            found[f"{key} {when}"] = by_group(logs, groups, ratio)
    first = next(iter(logs.values()))
    for when, place in (("start", 0), ("end", -1)):
        for key in ("gradient", "variance"):
            found[f"{key} by layer, {when}"] = {
                group: [
                    spread([layers(logs[name][place], key)[i] for name in logs if groups[name] == group])
                    for i in range(len(layers(first[0], key)))
                ]
                for group in dict.fromkeys(groups.values())
            }
    return found


def frequencies(sweep: SweepConfig) -> float:
    """Held-out loss of a model that knows the frequencies of the bytes and nothing else."""
    data = prepare(sweep.runs()[0].config)
    counts = [torch.bincount(part, minlength=256).double() for part in (data.train, data.held_out)]
    share = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] / counts[1].sum() * share.log()).sum())


def rates(logs: Logs, groups: Mapping[str, str]) -> dict[str, Any]:
    """How many seeds failed: diverged, or ended no better than frequencies of bytes; the losses of those that
    did not diverge."""
    known = frequencies(load_sweep(SWEEPS / "rates.yaml"))
    failed: dict[str, int] = dict.fromkeys(groups.values(), 0)
    for name, records in logs.items():
        last = records[-1]
        failed[groups[name]] += "diverged" in last or last["held_out"] >= known
    return {
        "loss by frequencies": dict.fromkeys(failed, round(known, 4)),
        "failed": failed,
        "held-out loss": by_group(logs, groups, lambda records: records[-1]["held_out"]),
    }


def adamp(logs: Logs, groups: Mapping[str, str]) -> dict[str, Any]:
    """Length of the weights of all layers at the end over that at the start, and losses."""

    def length(record: Mapping[str, Any]) -> float:
        return sum(value**2 for value in layers(record, "weights")) ** 0.5

    return {
        "weight norm, end / start": by_group(logs, groups, lambda r: length(r[-1]) / length(r[0])),
        "held-out loss": by_group(logs, groups, lambda r: r[-1]["held_out"]),
        "loss": by_group(logs, groups, lambda r: r[-1]["loss"]),
    }


def losses(logs: Logs, groups: Mapping[str, str]) -> dict[str, Any]:
    """Held-out loss at the end."""
    return {"held-out loss": by_group(logs, groups, lambda r: r[-1]["held_out"])}


def statistics(logs: Logs, groups: Mapping[str, str]) -> dict[str, Any]:
    """Relative variance of second moments over the last steps, mean over norms; held-out loss in evaluation
    mode, and that minus the same with the statistics of each batch."""

    def scatter(records: Any) -> float:
        values = list(records[-1]["moments"].values())
        return sum(values) / len(values)

    return {
        "variance of the second moment / its square": by_group(logs, groups, scatter),
        "held-out loss": by_group(logs, groups, lambda r: r[-1]["held_out"]),
        "evaluation minus training mode": by_group(
            logs, groups, lambda r: r[-1]["held_out"] - r[-1]["held_out_batch"]
        ),
    }


KINDS = {"depth": depth, "rates": rates, "adamp": adamp, "losses": losses, "statistics": statistics}


def shortened(sweep: SweepConfig, steps: int | None) -> SweepConfig:
    """The same with fewer steps and one seed, to see that it works."""
    if steps is None:
        return sweep
    base = {**sweep.base, "steps": steps, "log_every": steps}
    return sweep.model_copy(update={"base": base, "seeds": sweep.seeds[:1]})


def shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value) if value is not None else "–"
    half = "" if value["half"] is None else f" ± {value['half']:.3g}"
    return f"{value['mean']:.4g}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", nargs="*", choices=[*KINDS, []], help="default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="fewer steps, one seed, nothing is saved")
    parser.add_argument("--out", type=Path, help="directory of the runs, to go on from; default: a new one")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="norms-training-"))
    before = harness.machine()
    for name in arguments.sweeps or KINDS:
        start = time.perf_counter()
        sweep = shortened(load_sweep(SWEEPS / f"{name}.yaml"), arguments.steps)
        results = run_sweep(sweep, out / name, jobs=arguments.jobs)
        seconds = round(time.perf_counter() - start, 1)
        logs = {result["name"]: log(out / name, result["name"]) for result in results}
        found = KINDS[name](logs, {result["name"]: result["group"] for result in results})
        print(f"\n{name}: {len(results)} runs, {seconds} s")
        columns = {key: value for key, value in found.items() if "by layer" not in key}
        groups = [row["group"] for row in summary(results)]
        rows = [[group, *(shown(value[group]) for value in columns.values())] for group in groups]
        print(harness.table(["setting", *columns], rows))
        if arguments.steps is None:
            content = {"machine": before, "seconds": seconds, "sweep": sweep.model_dump(), "figures": found}
            harness.save("norms-training", {name: content})


if __name__ == "__main__":
    main()
