"""Coverage sweep: which model types of transformers have which gauge, and is every claim true?

For every model type that a tiny random configuration can build and ``torch.export`` can trace: find the
generators, apply a random element of each to random weights in float64 and compare the outputs, and
check for every kind that the next larger kind does change them. The same again for the folded (and
untied) atlas. The table is written to ``coverage.md`` and ``coverage.json`` beside this file.

    python benchmarks/coverage.py                 # the whole sweep
    python benchmarks/coverage.py llama bert      # some types, printed
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOUND = 1e-10
FIRES = 1e-9
BUDGET = 20.0
FAMILIES: tuple[tuple[str, str], ...] = (
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_IMAGE_MAPPING_NAMES"),
    ("vision", "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    ("audio", "MODEL_FOR_CTC_MAPPING_NAMES"),
    ("audio", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    ("audio", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("text", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
)


@dataclass
class Row:
    """What the sweep found for one model type."""

    type: str
    family: str
    cls: str
    traced: bool = False
    reason: str = ""
    stage: str = ""
    nodes: int = 0
    parameters: int = 0
    generators: dict[str, int] = field(default_factory=dict)
    folded_generators: dict[str, int] = field(default_factory=dict)
    folds: int = 0
    worst: float | None = None
    worst_folded: float | None = None
    probed: int = 0
    probed_folded: int = 0
    controls_fired: list[str] = field(default_factory=list)
    controls_silent: list[str] = field(default_factory=list)
    vacuous: int = 0
    unsound: list[dict[str, Any]] = field(default_factory=list)
    residual: list[str] = field(default_factory=list)
    residual_folded: list[str] = field(default_factory=list)
    residual_size: int = 0
    limit: str = ""
    unknown: list[str] = field(default_factory=list)
    rule_errors: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


def jobs() -> list[tuple[str, str, str]]:
    """(model type, family, class name), one for each model type; the first family that has it."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str, str]] = {}
    for family, table in FAMILIES:
        for kind, names in getattr(modeling_auto, table).items():
            name = names[0] if isinstance(names, (list, tuple)) else names
            found.setdefault(kind, (kind, family, name))
    return list(found.values())


# --- one model type ----------------------------------------------------------------------------------


def examine(kind: str, family: str, cls: str, progress: Any) -> None:
    """Fill a row step by step, handing over every state of it, so that a limit loses little."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    from regauge.errors import RegaugeError

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    row = Row(kind, family, cls, stage="config")
    progress(row)
    start = time.time()
    loaded: Any = None
    reasons: list[tuple[int, str]] = []
    try:
        from tiny import tiny_configs

        for config in tiny_configs(CONFIG_MAPPING[kind]):
            config = _part_for(cls, config)
            config.architectures = [cls]
            row.stage = "build"
            try:
                loaded = _traced(config, row)
                break
            except RegaugeError as error:
                found = (error.found or error.message).split("; eager: ")[-1]
                reasons.append((1 if row.stage == "trace" else 0, found))
            except Exception as error:
                reasons.append((0, _short(error)))
            progress(row)
            if time.time() - start > 45:
                break
    except Exception as error:
        reasons.append((0, _short(error)))
    if loaded is None:
        best = max(reasons, key=lambda r: r[0], default=(0, "no configuration"))
        row.stage = "trace" if best[0] else "build"
        row.reason = best[1][:300]
        row.seconds = time.time() - start
        progress(row)
        return
    row.reason = ""
    row.traced = True
    try:
        _analyse(row, loaded, progress)
        row.stage = "done"
    except Exception as error:
        row.reason = f"{row.stage}: {_short(error)}"
        row.note = traceback.format_exc(limit=-4)[-1500:]
    row.seconds = time.time() - start
    progress(row)


def _part_for(cls: str, config: Any) -> Any:
    """The configuration itself, or the part of it that the class is made of, as the auto classes choose."""
    import transformers

    wanted = getattr(getattr(transformers, cls, None), "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    part = config.get_text_config(decoder=True)
    return part if isinstance(part, wanted) else config


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def _traced(config: Any, row: Row) -> Any:
    import torch

    from regauge.errors import TraceError
    from regauge.hf import load_meta
    from regauge.trace import trace

    row.stage = "build"
    hf = load_meta(config)
    row.stage = "trace"
    try:
        return hf, trace(hf.model, (), hf.inputs), ()
    except TraceError:
        parameters = inspect.signature(hf.model.forward).parameters
        if "attention_mask" not in parameters or "input_ids" not in hf.inputs:
            raise
    # some models want a mask that says that every token counts
    inputs = {**hf.inputs, "attention_mask": torch.ones_like(hf.inputs["input_ids"])}
    return hf, trace(hf.model, (), inputs), ("attention_mask",)


def _analyse(row: Row, loaded: Any, progress: Any) -> None:
    import math

    import torch

    from regauge.discover import discover
    from regauge.trace import untie

    hf, traced, masks = loaded
    row.nodes = len(traced.graph.nodes)
    row.parameters = sum(math.prod(shape) for shape in traced.shapes.values())
    row.stage = "discover"
    progress(row)
    atlas = discover(traced)
    row.generators = _count(atlas)
    row.refusals = list(dict.fromkeys(r.reason for r in atlas.refusals))[:12]
    row.unknown = sorted({r.reason.split()[0] for r in atlas.refusals if "without a rule" in r.reason})
    row.rule_errors = sorted({r.reason for r in atlas.refusals if "rule failed" in r.reason})
    if atlas.spaces:
        space = max(atlas.spaces, key=lambda s: len(s.parameters))
        row.residual = [str(k) for k in space.admits]
        row.residual_folded = [str(k) for k in (space.admits_folded if atlas.folded else space.admits)]
        row.residual_size = space.size
        limits = space.limits_folded if atlas.folded else space.limits
        row.limit = "; ".join(f"{limit.kind}: {limit.reason} ({limit.module})" for limit in limits[-2:])
    if atlas.folded:
        row.folded_generators = _count(atlas.folded)
        row.folds = len(atlas.folds)
    row.stage = "probe"
    progress(row)
    inputs = dict(hf.real_inputs(batch=3, length=7, seed=1))
    for name in masks:
        inputs[name] = torch.ones_like(inputs["input_ids"])
    row.worst, row.probed = _probe(row, traced, atlas, hf.buffers(), inputs, {}, "", progress)
    progress(row)
    if atlas.folded:
        row.stage = "probe folded"
        base = untie(traced)
        charts = _charts(base, atlas.folds)
        row.worst_folded, row.probed_folded = _probe(
            row, base, atlas.folded, hf.buffers(), inputs, charts, "folded ", progress
        )


def _count(atlas: Any) -> dict[str, int]:
    return dict(Counter(str(g.kind) for g in atlas.generators))


def _charts(traced: Any, folds: Iterable[str]) -> dict[str, float]:
    """Folded gains -> the stored value at which they are one."""
    from regauge.interpret import interpret

    wanted = set(folds)
    values = dict.fromkeys(folds, 1.0)
    for name, chart in interpret(traced).result.parameters:
        if name in wanted and chart:
            values[name] = 1.0 - chart
    return values


def _probe(
    row: Row,
    traced: Any,
    atlas: Any,
    buffers: Any,
    inputs: Any,
    folds: dict[str, float],
    label: str,
    progress: Any,
) -> tuple[float | None, int]:
    import torch

    from regauge.act import act
    from regauge.atlas import Kind
    from regauge.elements import DIAGONAL, random_element
    from regauge.probe import LARGER, Prober, random_state

    state = random_state(traced, 1)
    for name, value in folds.items():
        state[name] = torch.full_like(state[name], value)
    prober = _seeded(Prober)(traced, buffers, inputs, 1)
    prober.state = state
    prober.base = prober._run(state)
    if not all(bool(torch.isfinite(t).any()) for t in prober.base):
        row.note += f"{label}output is not finite for random weights; "
        return None, 0
    worst = 0.0
    count = 0
    tried: Counter[Any] = Counter()
    fired: set[str] = set()
    silent: set[str] = set()
    start = time.time()
    for generator in _by_kind(atlas.generators):
        if time.time() - start > BUDGET:
            row.note += f"{label}probed {count} of {len(atlas.generators)} in the time given; "
            break
        error = prober.probe(generator).error
        count += 1
        worst = max(worst, error)
        if not error < SOUND:
            row.unsound.append(_describe(label, generator, error))
            progress(row)
        larger = (
            Kind.ORTHOGONAL
            if generator.kind is Kind.PERMUTATION and generator.size <= 2
            else LARGER.get(generator.kind)
        )
        if larger is None or str(generator.kind) in fired or tried[generator.kind] > 4:
            continue
        mixed = {g.acting for g in atlas.generators if g.kind in _MIXING}
        if generator.kind in DIAGONAL and generator.acting in mixed:
            continue  # a larger kind acts here too, with another dependence
        if larger not in DIAGONAL and any(abs(a.exponent) != 1 for a in generator.actions):
            continue
        if generator.size == 1 and larger in (Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES):
            continue
        tried[generator.kind] += 1
        changed = _changed(prober, generator, larger)
        if not changed > FIRES and generator.kind is Kind.POSITIVE and generator.size > 1:
            # signs may be free as well, in a generator of their own: try mixing entries
            changed = _changed(prober, generator, Kind.GENERAL_LINEAR)
        if not changed > FIRES and generator.kind is Kind.POSITIVE and len(generator.actions) > 1:
            # signs are free as well, in generators of their own: leave one action out instead
            part = replace(generator, actions=generator.actions[:-1])
            changed = prober.probe(part).error
        if changed > FIRES:
            fired.add(str(generator.kind))
            continue
        copies = tuple(name for name, _ in generator.copies)
        draw = torch.Generator().manual_seed(5)
        disturbed = dict(state)
        for action in generator.actions:  # every slot by its own element: does anything read it?
            element = random_element(Kind.SCALE, generator.size, generator.count, draw)
            disturbed[action.parameter] = act(disturbed[action.parameter], action, element, copies)
        if prober.error(disturbed) < SOUND:
            row.vacuous += 1
        else:
            silent.add(str(generator.kind))
    row.controls_fired = sorted({*row.controls_fired, *(label + k for k in fired)})
    row.controls_silent = sorted({*row.controls_silent, *(label + k for k in silent - fired)})
    return worst, count


_MIXING = ("complex", "orthogonal-fixing-ones", "orthogonal", "general-linear")


def _seeded(prober: type[Any]) -> type[Any]:
    """The prober with the same random numbers in every run, for models that draw some."""
    import torch

    class Seeded(prober):
        def _run(self, state: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return super()._run(state)

    return Seeded


def _changed(prober: Any, generator: Any, larger: Any) -> float:
    """Error of an element of the larger kind; zero where it has no power such as the generator needs."""
    from regauge.errors import RegaugeError

    try:
        return prober.probe(generator, larger).error
    except RegaugeError:
        return 0.0


def _by_kind(generators: Iterable[Any]) -> list[Any]:
    """One of every kind in turn, so that a limit on time leaves none out."""
    places: Counter[Any] = Counter()
    order: list[tuple[int, int, Any]] = []
    for number, generator in enumerate(generators):
        order.append((places[generator.kind], number, generator))
        places[generator.kind] += 1
    return [generator for _, _, generator in sorted(order, key=lambda item: item[:2])]


def _describe(label: str, generator: Any, error: float) -> dict[str, Any]:
    return {
        "atlas": label.strip() or "base",
        "id": generator.id,
        "kind": str(generator.kind),
        "size": generator.size,
        "copies": list(generator.copies),
        "error": error,
        "actions": [(a.parameter, a.axis, str(a.exponent)) for a in generator.actions[:8]],
    }


# --- many, each in a process of its own ----------------------------------------------------------------


def _child(pipe: Any, job: tuple[str, str, str], memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.setpgrp()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    examine(*job, progress=lambda row: pipe.send(asdict(row)))
    pipe.close()


def sweep(
    todo: list[tuple[str, str, str]], seconds: float, workers: int, memory: int, partial: Path | None
) -> list[Row]:
    """Examine every job in a forked process with a time and memory limit; results in the order given.

    Rows are appended to ``partial`` as they come, and those found there are not made again.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(todo))
    running: dict[int, tuple[Any, Any, float, dict[str, Any]]] = {}
    rows: dict[int, Row] = {}
    if partial is not None and partial.exists():
        known = {row["type"]: Row(**row) for row in map(json.loads, partial.read_text().splitlines())}
        rows = {number: known[job[0]] for number, job in waiting if job[0] in known}
        waiting = [(number, job) for number, job in waiting if number not in rows]
    while waiting or running:
        while waiting and len(running) < workers:
            number, job = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, job, memory), daemon=True)
            process.start()
            theirs.close()
            running[number] = (process, mine, time.time(), asdict(Row(*job)))
        multiprocessing.connection.wait([pipe for _, pipe, _, _ in running.values()], timeout=0.5)
        for number, (process, pipe, start, state) in list(running.items()):
            finished = False
            try:
                while pipe.poll():
                    state = pipe.recv()
                    running[number] = (process, pipe, start, state)
            except EOFError:
                finished = True
            late = time.time() - start > seconds
            if not finished and not late:
                continue
            if late:
                os.kill(process.pid, signal.SIGKILL)
            process.join(5)
            row = Row(**state)
            if late:
                row.reason = f"{row.stage} took more than {seconds:.0f} s"
                row.seconds = seconds
            elif row.stage not in ("done", "trace", "build") and not row.reason:
                row.reason = f"{row.stage} ended early (exit {process.exitcode}), as when memory is short"
            rows[number] = row
            del running[number]
            if partial is not None:
                with partial.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            print(f"[{len(rows)}/{len(todo)}] {_line(row)}", flush=True)
    return [rows[number] for number in sorted(rows)]


def _line(row: Row) -> str:
    bad = f" UNSOUND {len(row.unsound)}" if row.unsound else ""
    total = sum(row.generators.values())
    return (
        f"{row.type} ({row.cls}) {row.seconds:.0f}s {'traced' if row.traced else row.stage} gens {total} "
        f"worst {row.worst} / {row.worst_folded}{bad} unknown {row.unknown} {row.rule_errors} "
        f"silent {row.controls_silent} {row.reason} {row.note[-300:]}"
    )


# --- the table -----------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> dict[str, Any]:
    traced = [r for r in rows if r.traced]
    with_generators = [r for r in traced if sum(r.generators.values()) and r.probed]
    return {
        "types": len(rows),
        "traced": len(traced),
        "types_with_generators": len(with_generators),
        "generators_probed": sum(r.probed + r.probed_folded for r in rows),
        "unsound": sum(len(r.unsound) for r in rows),
        "worst_error": max(
            (e for r in rows for e in (r.worst, r.worst_folded) if e is not None), default=None
        ),
        "types_with_unknown_operations": sum(bool(r.unknown) for r in traced),
        "unknown_operations": dict(Counter(op for r in traced for op in r.unknown).most_common()),
        "controls_fired": sum(len(r.controls_fired) for r in rows),
        "controls_silent": sum(len(r.controls_silent) for r in rows),
    }


def markdown(rows: list[Row]) -> str:
    s = summary(rows)
    import torch
    import transformers

    unknown = ", ".join(f"{op} ({n})" for op, n in s["unknown_operations"].items()) or "none"
    worst = "none" if s["worst_error"] is None else f"{s['worst_error']:.1e}"
    out = [
        "# Coverage",
        "",
        f"**{s['types']} model types: {s['traced']} traced, {s['types_with_generators']} with generators; "
        f"{s['generators_probed']} generators probed with random elements, {s['unsound']} unsound, "
        f"worst error {worst}; negative controls: {s['controls_fired']} fired, {s['controls_silent']} silent.**",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; made by `python benchmarks/coverage.py`. "
        "Every type is built from a tiny random configuration; errors are relative, in float64. *Controls*: kinds for "
        "which an element of the next larger kind changed the output. *Residual*: kinds of group that act on the space "
        "most parameters share; after folding gains and untying in the next column. "
        f"Operations without a rule, by number of types: {unknown}.",
        "",
        "| type | class | traced | generators | folded | worst | worst folded | controls | residual | after folding | what limits it | unknown operations |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        reason = r.reason.replace("|", "/").replace("\n", " ")[:160]
        state = (
            "yes" if r.traced and not r.reason else (f"yes; {reason}" if r.traced else f"{r.stage}: {reason}")
        )
        silent = f"; silent: {', '.join(r.controls_silent)}" if r.controls_silent else ""
        cells = [
            r.type, r.cls, state + ("; " + r.note[:80].replace("\n", " ") if r.note and r.traced and not r.reason else ""),
            _kinds(r.generators), _kinds(r.folded_generators), _error(r.worst), _error(r.worst_folded),
            (str(len(r.controls_fired)) if r.traced else "") + silent,
            ", ".join(r.residual), ", ".join(r.residual_folded), r.limit.replace("|", "/")[:220],
            ", ".join([*r.unknown, *r.rule_errors]),
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _kinds(count: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in count.items())


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; default all, and write the table")
    parser.add_argument("--seconds", type=float, default=90.0, help="limit for one type")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space for one type")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--here", action="store_true", help="in this process, without limits")
    parser.add_argument("--merge", action="store_true", help="put the given types into the written table")
    arguments = parser.parse_args()
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401  imported before forking

    import regauge.discover
    import regauge.hf
    import regauge.probe  # noqa: F401

    torch.set_num_threads(1)
    todo = jobs()
    if arguments.types:
        todo = [job for job in todo if job[0] in arguments.types]
    if arguments.here:
        for job in todo:
            last: list[Row] = []
            examine(*job, progress=lambda row, last=last: last.append(row))
            print(_line(last[-1]))
            print(json.dumps(asdict(last[-1]), indent=1))
        return
    partial = None if arguments.types else arguments.out / "coverage.partial.jsonl"
    for job in jobs():
        if job[0] == "bert":  # load once, before forking, what every job needs
            examine(*job, progress=lambda row: None)
    rows = sweep(todo, arguments.seconds, arguments.workers, int(arguments.memory * 2**30), partial)
    if arguments.merge:
        old = [Row(**row) for row in json.loads((arguments.out / "coverage.json").read_text())["rows"]]
        new = {row.type: row for row in rows}
        rows = [new.get(row.type, row) for row in old]
    if not arguments.types or arguments.merge:
        data = {"summary": summary(rows), "rows": [asdict(row) for row in rows]}
        (arguments.out / "coverage.json").write_text(json.dumps(data, indent=1) + "\n")
        (arguments.out / "coverage.md").write_text(markdown(rows))
        if partial is not None:
            partial.unlink(missing_ok=True)
    print(json.dumps(summary(rows), indent=1))
    for row in rows:
        for item in row.unsound:
            print("UNSOUND", row.type, json.dumps(item))


if __name__ == "__main__":
    main()
