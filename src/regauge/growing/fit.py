"""Rebuilding a model with parameters of other shapes: another configuration, or other modules.

Nothing is looked up. Entries of the configuration, and then attributes of modules, that equal a size that
grows are changed, a few at a time; what the model then is decides whether the change was the right one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from regauge.discover import Gauge
from regauge.errors import BadInput, Refused, RegaugeError, TraceError
from regauge.modeling_regauge import KEEPS
from regauge.patches import Patch, Replaceable, merged, replaceable
from regauge.plan import Rewrite
from regauge.trace import Trace

MOST_TRIALS = 96
Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[str, ...]
Buffers = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """How the model of a plan can be rebuilt; nothing is kept.

    Attributes:
        config: content of ``config.json`` so far; None for a plain module.
        resolved: the same with every default filled in.
        build: (changes to the top level of the config, patches) -> the model without weights, and the
            values of its buffers.
        gauge: the same -> its gauge.
    """

    config: Mapping[str, Any] | None
    resolved: Mapping[str, Any]
    build: Callable[[Mapping[str, Any], Sequence[Patch]], tuple[nn.Module, Buffers]]
    gauge: Callable[[Mapping[str, Any], Sequence[Patch]], Gauge]


def trial_of(
    plan: Rewrite,
    build: Callable[[Rewrite], tuple[nn.Module, Buffers]],
    gauge: Callable[[Rewrite], Gauge],
    config: Mapping[str, Any] | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> Trial:
    """A trial that goes on from a plan; ``build`` and ``gauge`` take plans."""

    def further(changes: Mapping[str, Any], patches: Sequence[Patch]) -> Rewrite:
        return replace(plan, config={**plan.config, **changes}, patches=merged(plan.patches, patches))

    return Trial(
        config,
        resolved or {},
        lambda changes, patches: build(further(changes, patches)),
        lambda changes, patches: gauge(further(changes, patches)),
    )


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
    for structure in (_by_config, _by_patches):
        for config, patches in structure(trial, trace, wanted, sizes, reasons):
            try:
                gauge = trial.gauge(config, patches)
            except (TraceError, Refused, BadInput) as error:
                reasons.append(error.found or error.message)
                continue
            if not accept(gauge, patches):
                reasons.append("a model of these shapes that computes something else")
                continue
            kept = _kept_buffers(trial, trace, gauge.trace, config, patches, lengths)
            if kept is None:
                reasons.append("a model of these shapes with other constants in its buffers")
                continue
            return Fit(config, (*patches, *kept), gauge)
    raise Refused(
        "neither a configuration of this architecture nor replaced modules have the shapes asked for",
        parameter=next(iter(wanted)),
        expected=str(next(iter(wanted.values()))),
        found="; ".join(dict.fromkeys(reasons))[:300]
        or "no entry of the configuration has a size that grows",
        way_out="grow what the architecture ties together in one step (such as keys and values)",
    )


def _kept_buffers(
    trial: Trial,
    old: Trace,
    new: Trace,
    config: Mapping[str, Any],
    patches: Sequence[Patch],
    lengths: Mapping[int, int],
) -> tuple[Patch, ...] | None:
    """Patches after which every buffer that is used holds what it held, new entries after the old.

    New entries go on from the last two as a geometric sequence does (rotary frequencies are one). None if a
    buffer changed in another way.
    """
    (_, before), (_, after) = trial.build({}, ()), trial.build(config, patches)
    values: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys((*old.buffers.values(), *new.buffers.values())):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            return None
        if a.shape == b.shape and torch.equal(a, b):
            continue
        path, _, leaf = name.rpartition(".")
        if a.shape == b.shape and a.dim() == 0 and a.is_floating_point():
            values.setdefault(path, {})[leaf] = [float(a)]
            continue
        if a.dim() != 1 or not a.is_floating_point() or lengths.get(len(a)) != len(b) or len(a) < 2:
            return None
        more = a[-1].double() * (a[-1].double() / a[-2].double()) ** torch.arange(1, len(b) - len(a) + 1)
        values.setdefault(path, {})[leaf] = torch.cat([a, more.to(a.dtype)]).tolist()
        for other, held in before.items():  # copies that the module keeps beside it
            if other != name and other.rpartition(".")[0] == path and torch.equal(held, a):
                values[path][other.rpartition(".")[2]] = values[path][leaf]
    return tuple({"path": path, "module": "buffers", "values": held} for path, held in values.items())


def replaced(patches: Iterable[Patch]) -> frozenset[str]:
    """Paths of the modules that patches replace."""
    return frozenset(p["path"] for p in patches if p["module"] not in (*KEEPS, "parameter"))


def _by_config(
    trial: Trial, trace: Trace, wanted: Shapes, sizes: Mapping[int, set[int]], reasons: list[str]
) -> Iterator[tuple[dict[str, Any], tuple[Patch, ...]]]:
    if trial.config is None:
        return
    leaves = dict(_leaves(trial.resolved))
    pins = {key: n for key, n in leaves.items() if _at(trial.config, key) is None and n is not None}
    options = {key: sorted(sizes[n]) for key, n in leaves.items() if n is not None and n in sizes}
    blank = sorted({m for new in sizes.values() for m in new})
    unset = {key: blank for key, n in leaves.items() if n is None}
    tried = 0
    for group in (options, {**options, **unset}):
        for chosen in _choices(group, fresh=None if group is options else set(unset)):
            tried += 1
            if tried > MOST_TRIALS:
                return
            held = {**pins, **chosen}
            if not _has(trial, _changes(trial.config, held), (), trace, wanted):
                continue
            for key in [key for key in pins if key not in chosen]:
                without = {k: n for k, n in held.items() if k != key}
                if _has(trial, _changes(trial.config, without), (), trace, wanted):
                    held = without
            yield _changes(trial.config, held), ()


def _choices(options: Mapping[Key, Sequence[int]], fresh: set[Key] | None) -> Iterator[dict[Key, int]]:
    """Few entries first; with ``fresh`` only choices that set exactly one of these."""
    for count in range(1, len(options) + 1):
        for keys in itertools.combinations(options, count):
            if fresh is not None and (count > 2 or sum(key in fresh for key in keys) != 1):
                continue
            for values in itertools.product(*(options[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))


def _leaves(content: Mapping[str, Any], path: Key = ()) -> Iterator[tuple[Key, int | None]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif value is None or type(value) is int:
            yield (*path, key), value


def _at(content: Any, key: Key) -> Any:
    for part in key:
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _changes(config: Mapping[str, Any], chosen: Mapping[Key, int]) -> dict[str, Any]:
    """Top-level entries with the chosen leaves put in."""
    changes: dict[str, Any] = {}
    for key, value in chosen.items():
        top = key[0]
        if len(key) == 1:
            changes[top] = value
            continue
        section: dict[str, Any] = _copied(changes.get(top, config.get(top) or {}))
        inner = section
        for part in key[1:-1]:
            inner = inner.setdefault(part, {})
        inner[str(key[-1])] = value
        changes[top] = section
    return changes


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _has(
    trial: Trial, config: Mapping[str, Any], patches: Sequence[Patch], trace: Trace, wanted: Shapes
) -> bool:
    """Whether the rebuilt model has the shapes asked for, and nothing else changed."""
    try:
        model, _ = trial.build(config, patches)
    except (RegaugeError, ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError):
        return False
    found = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    found |= {name: tuple(b.shape) for name, b in model.named_buffers() if name in trace.canonical}
    expected = {alias: shape for name, shape in trace.shapes.items() for alias in trace.aliases[name]}
    for name, shape in wanted.items():
        expected |= dict.fromkeys(trace.aliases.get(name, (name,)), shape)
    return found == expected


def _by_patches(
    trial: Trial, trace: Trace, wanted: Shapes, sizes: Mapping[int, set[int]], reasons: list[str]
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
    held: dict[Key, list[tuple[str, int]]] = {}
    for path, module in model.named_modules():
        if path in inside and path not in ours:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            for attribute, value in vars(module).items():
                if type(value) is int and value in sizes and not attribute.startswith("_"):
                    held.setdefault((kind, attribute), []).append((path, value))
    options = {key: sorted({m for _, n in places for m in sizes[n]}) for key, places in held.items()}
    for tried, chosen in enumerate(_choices(options, None)):
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
    if module.weight is None:
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
