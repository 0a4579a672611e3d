"""All runs of a sweep, those that are finished left out, and what came of them."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from regauge.errors import BadInput
from regauge.lab import checkpoint
from regauge.lab.config import Run, SweepConfig
from regauge.lab.optimizers import check_optimizer
from regauge.lab.saved import check_model
from regauge.lab.train import digest, finish, train
from regauge.stages import Progress

Result = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: of the values there are.
        half: half of the 95 % interval by Student's t; None for fewer than two values.
        count: values.
    """

    mean: float
    half: float | None
    count: int


def interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """mean ± t · s / √n, t the quantile (1 + level) / 2 of Student's t, n − 1 degrees; None for no values."""
    if not values:
        return None
    count = len(values)
    if count < 2:
        return Interval(values[0], None, count)
    from scipy import stats

    quantile = float(stats.t.ppf((1 + level) / 2, count - 1))
    return Interval(mean(values), quantile * stdev(values) / math.sqrt(count), count)


def run_sweep(
    sweep: SweepConfig, out: str | Path, *, jobs: int = 1, progress: Progress | None = None
) -> tuple[Result, ...]:
    """Make every run that is not finished, each in ``out/runs/NAME``, and write ``out/results.jsonl``.

    Interrupted runs go on from their checkpoints. The results have the order of the sweep.

    Args:
        sweep: what to run.
        out: a directory; ``sweep.json`` there says which sweep it holds.
        jobs: processes; every run uses one thread.
        progress: called with a stage, the amount done and the total.

    Raises:
        BadInput: the directory holds other runs under these names, or a configuration names what there is
            not; all are checked before the first run.
    """
    path = Path(out)
    runs = sweep.runs()
    for run in runs:
        _checked(run)
    path.mkdir(parents=True, exist_ok=True)
    found: dict[str, Result] = {}
    for run in runs:
        known = _finished(path / "runs" / run.name, run)
        if known is not None:
            found[run.name] = known
    checkpoint.write_text(path / "sweep.json", json.dumps(sweep.model_dump(), indent=2) + "\n")
    todo = [run for run in runs if run.name not in found]
    steps = sum(run.config.steps for run in runs)
    done = sum(run.config.steps for run in runs if run.name in found)
    for run, result in _results(todo, path, jobs, done, steps, progress):
        found[run.name] = result
        done += run.config.steps
        if progress is not None:
            progress(f"{len(found)} of {len(runs)} runs", done, steps)
        _write(path, [found[run.name] for run in runs if run.name in found])
    results = tuple(found[run.name] for run in runs)
    _write(path, results)
    return results


def _results(
    todo: Sequence[Run], path: Path, jobs: int, done: int, steps: int, progress: Progress | None
) -> Iterator[tuple[Run, Result]]:
    if jobs == 1 or len(todo) < 2:
        for run in todo:

            def inside(step: int, total: int, before: int = done, name: str = run.name) -> None:
                if progress is not None:
                    progress("steps", before + step, steps)
                    progress(name, step, total)

            yield run, run_one(run, path, inside)
            done += run.config.steps
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(run_one, run, path): run for run in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_one(run: Run, out: Path, progress: Callable[[int, int], None] | None = None) -> Result:
    """One run of a sweep: its log, its model, and ``result.json``."""
    directory = out / "runs" / run.name
    before = time.perf_counter()
    trained = train(run.config, directory, progress)
    measured = [record for record in trained.records if "loss" in record]
    first, last = (measured[0], measured[-1]) if measured else ({}, {})
    result: Result = {
        "name": run.name,
        "group": run.group,
        "seed": run.config.seed,
        "config": digest(run.config),
        "diverged": trained.diverged,
        "reason": trained.records[-1].get("diverged"),
        "steps": last.get("step"),
        "loss": None if trained.diverged is not None else last.get("loss"),
        "held_out": None if trained.diverged is not None else last.get("held_out"),
        "first": first,
        "last": last,
        "seconds": round(time.perf_counter() - before, 2),
    }
    finish(trained, directory)
    checkpoint.write_text(directory / "result.json", json.dumps(result) + "\n")
    return result


def results(out: str | Path) -> tuple[Result, ...]:
    """What :func:`run_sweep` wrote, in the order of the sweep.

    Raises:
        BadInput: the directory holds no results.
    """
    path = Path(out) / "results.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(
            f"{path.parent} holds no results",
            expected="results.jsonl",
            way_out="regauge lab run SWEEP.yaml OUT",
        ) from error
    return tuple(json.loads(line) for line in lines)


def name_of(out: str | Path) -> str:
    """Name of the sweep that a directory holds."""
    return str(json.loads((Path(out) / "sweep.json").read_text(encoding="utf-8"))["name"])


def log(out: str | Path, name: str) -> tuple[dict[str, Any], ...]:
    """The records of one run."""
    path = Path(out) / "runs" / name / "log.jsonl"
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a group, in order: runs, how many diverged, ``loss`` and ``held_out`` over the seeds that did
    not, seconds of all."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in found:
        groups.setdefault(str(result["group"]), []).append(result)
    rows: list[dict[str, Any]] = []
    for group, items in groups.items():
        row: dict[str, Any] = {
            "group": group,
            "runs": len(items),
            "diverged": sum(item["diverged"] is not None for item in items),
            "seconds": round(sum(float(item["seconds"]) for item in items), 2),
        }
        for key in ("loss", "held_out"):
            over = interval([float(item[key]) for item in items if item[key] is not None])
            row[key] = None if over is None else over.mean
            row[f"{key}_half"] = None if over is None else over.half
        rows.append(row)
    return rows


def _write(path: Path, found: Sequence[Result]) -> None:
    checkpoint.write_text(path / "results.jsonl", "".join(json.dumps(result) + "\n" for result in found))


def _finished(directory: Path, run: Run) -> Result | None:
    path = directory / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["config"] != digest(run.config):
        raise BadInput(
            f"{directory} holds another run",
            expected="the configuration of the sweep",
            found="a result of another one",
            way_out="choose another directory for the sweep",
        )
    return result


def _checked(run: Run) -> None:
    """Refuse names and options that do not exist, without training.

    Raises:
        BadInput: one of them.
    """
    check_model(run.config.model)
    check_optimizer(run.config.optimizer)
