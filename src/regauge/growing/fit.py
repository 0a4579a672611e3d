"""Rebuilding a model with parameters of other shapes: another configuration, or other modules.

Nothing is looked up. Entries of the configuration, and then attributes of modules, that equal a size that
grows are changed, a few at a time; what the model then is decides whether the change was the right one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from regauge.discover import Gauge
from regauge.errors import BadInput, Refused, TraceError
from regauge.growing.settings import MOST_TRIALS, by_config, choices
from regauge.growing.tables import kept_buffers, longer_buffers
from regauge.growing.trial import Shapes, Trial, with_patches
from regauge.modeling_regauge import KEEPS
from regauge.patches import Patch, Replaceable, merged, replaceable
from regauge.trace import Trace


@dataclass(frozen=True)
class Fit:
    """A structure that has the shapes asked for.

    Attributes:
        config: changes to the top level of the configuration.
        patches: modules to replace.
        gauge: gauge of the model so rebuilt.
    """

    config: Mapping[str, Any]
    patches: tuple[Patch, ...]
    gauge: Gauge


def fitted(
    trial: Trial,
    trace: Trace,
    wanted: Shapes,
    sizes: Mapping[int, set[int]],
    accept: Callable[[Gauge, Sequence[Patch]], bool],
    lengths: Mapping[int, int],
) -> Fit:
    """The same model with some of its parameters in other shapes.

    Args:
        trial: see there.
        trace: of the model as it is.
        wanted: parameter -> new shape, for those that change.
        sizes: old size -> sizes it may become; entries and attributes of these values are candidates.
        accept: whether a rebuilt model of these shapes is the same but for the sizes.
        lengths: old length -> new one, of buffers that count something which grows.

    Raises:
        Refused: neither a configuration nor a replacement of modules gives it.
    """
    reasons: list[str] = []
    carried = longer_buffers(trial.patches, lengths)
    first, trial = trial, with_patches(trial, carried)
    by_patches = _by_patches(trial, trace, wanted, sizes)
    for config, patches in itertools.chain(by_config(trial, trace, wanted, sizes), by_patches):
        try:
            with _unlogged():
                gauge = trial.gauge(config, patches)
        except (TraceError, Refused, BadInput) as error:
            reasons.append(error.found or error.message)
            continue
        if not accept(gauge, patches):
            reasons.append("a model of these shapes that computes something else")
            continue
        kept = kept_buffers(first, trial, trace, gauge.trace, config, patches, lengths)
        if kept is None:
            reasons.append("a model of these shapes with other constants in its buffers")
            continue
        return Fit(config, merged((*carried, *patches), kept), gauge)
    raise Refused(
        "neither a configuration of this architecture nor replaced modules have the shapes asked for",
        parameter=next(iter(wanted)),
        expected=str(next(iter(wanted.values()))),
        found="; ".join(dict.fromkeys(reasons))[:300]
        or "no entry of the configuration has a size that grows",
        way_out="grow what the architecture ties together in one step (such as keys and values)",
    )


@contextmanager
def _unlogged() -> Generator[None]:
    """No log lines of torch from models that turn out not to run."""
    logger = logging.getLogger("torch")
    before = logger.level
    held = [(child, child.level) for child in _children(logger)]
    for child, _ in (*held, (logger, before)):
        child.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for child, level in (*held, (logger, before)):
            child.setLevel(level)


def _children(logger: logging.Logger) -> list[logging.Logger]:
    """Every logger below this one that has a level of its own."""
    below = (held for name, held in logger.manager.loggerDict.items() if name.startswith(f"{logger.name}."))
    return [held for held in below if isinstance(held, logging.Logger) and held.level]


def replaced(patches: Iterable[Patch]) -> frozenset[str]:
    """Paths of the modules that patches replace."""
    return frozenset(p["path"] for p in patches if p["module"] not in (*KEEPS, "parameter"))


def _by_patches(
    trial: Trial, trace: Trace, wanted: Shapes, sizes: Mapping[int, set[int]]
) -> Iterator[tuple[dict[str, Any], tuple[Patch, ...]]]:
    known = replaceable(trace)
    ours: dict[str, Patch] = {}
    for name, shape in wanted.items():
        owner = name.rpartition(".")[0]
        patch = resized(known[owner], trace, wanted) if owner in known else None
        if patch is not None:
            ours[owner] = patch
        else:
            ours[name] = {"path": name, "module": "parameter", "shape": list(shape)}
    base = tuple(ours.values())
    yield {}, base
    model, _ = trial.build({}, ())
    inside = {path for owner in ours for path in _above(owner)}
    held: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for path, module in model.named_modules():
        if path in inside and path not in ours:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            for attribute, value in vars(module).items():
                if type(value) is int and value in sizes and not attribute.startswith("_"):
                    held.setdefault((kind, attribute), []).append((path, value))
    options = {key: sorted({m for _, n in places for m in sizes[n]}) for key, places in held.items()}
    for tried, chosen in enumerate(choices(options, None, range(1, len(options) + 1))):
        if tried > MOST_TRIALS // 4:
            return
        values: dict[str, dict[str, int]] = {}
        for key, new in chosen.items():
            for path, old in held[key]:
                if new in sizes[old]:
                    values.setdefault(path, {})[key[1]] = new
        extra = ({"path": path, "module": "attributes", "values": v} for path, v in values.items())
        yield {}, (*base, *extra)


def _above(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def resized(module: Replaceable, trace: Trace, wanted: Shapes) -> Patch | None:
    """The replacement of a module whose parameters have other shapes; None if it has no such form."""

    def shape(name: str) -> tuple[int, ...]:
        return wanted.get(name) or tuple(trace.shapes[trace.canonical[name]])

    patch = dict(module.patch)
    kind = patch["module"]
    if module.weight is None or module.chart:
        return None
    if kind == "linear":
        rows, columns = shape(module.weight)
        patch["outputs"], patch["inputs"] = (columns, rows) if patch["transposed"] else (rows, columns)
    elif kind == "convolution" and patch["groups"] == 1:
        patch["outputs"], patch["inputs"] = shape(module.weight)[:2]
    elif kind == "embedding":
        patch["rows"], patch["size"] = shape(module.weight)
    elif kind in ("norm", "affine"):
        (patch["size"],) = shape(module.weight)
        if kind == "norm":
            patch["eps"] *= module.patch["size"] / patch["size"]
    else:
        return None
    return patch
