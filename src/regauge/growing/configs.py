"""Which entries of a configuration give a model other shapes: found by trial, not by name.

An entry is tried alone first. One that leaves all shapes alone, or that changes one which is to stay, is
no part of the answer unless it fails alone, as a number of heads does that no longer divides another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from regauge.errors import RegaugeError
from regauge.growing.trial import MOST_TRIALS, Key, Shapes, Trial, choices
from regauge.trace import Trace

_FAILURES = (RegaugeError, ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError)


def configurations(
    trial: Trial, trace: Trace, wanted: Shapes, sizes: Mapping[int, set[int]]
) -> Iterator[dict[str, Any]]:
    """Changes to the top level of the configuration after which the parameters have the shapes wanted.

    Args:
        trial: how models are rebuilt; nothing is found for a plain module.
        trace: of the model as it is.
        wanted: parameter -> new shape, for those that change.
        sizes: old size -> sizes it may become.
    """
    if trial.config is None:
        return
    before = {alias: shape for name, shape in trace.shapes.items() for alias in trace.aliases[name]}
    after = dict(before)
    for name, shape in wanted.items():
        after |= dict.fromkeys(trace.aliases.get(name, (name,)), shape)
    leaves = dict(_leaves(trial.resolved))
    # What the configuration leaves to the class may follow from what changes: it is held where it was.
    pins = {key: n for key, n in leaves.items() if _at(trial.config, key) is None and n is not None}
    blank = sorted({m for new in sizes.values() for m in new})
    known = [(key, m) for key, n in leaves.items() if n is not None for m in sorted(sizes.get(n, ()))]
    unset = [(key, m) for key, n in leaves.items() if n is None for m in blank]
    useful: dict[Key, list[int]] = {}
    for group in (known, unset):
        fresh = {key for key, _ in group}
        for key, m in group:
            if _useful(_shapes(trial, {**pins, key: m}, before), before, after):
                useful.setdefault(key, []).append(m)
        for chosen in itertools.islice(choices(useful), MOST_TRIALS):
            if fresh.isdisjoint(chosen) or _shapes(trial, {**pins, **chosen}, before) != after:
                continue
            yield _changes(trial.config, _fewest(trial, pins, chosen, before, after))


def _useful(found: Shapes | None, before: Shapes, after: Shapes) -> bool:
    """Whether something changed, and nothing that is to stay; or whether the model could not be built."""
    if found is None:
        return True
    if found == before or found.keys() != before.keys():
        return False
    return all(
        len(shape) == len(before[name])
        and all(m == n or n != w for m, n, w in zip(shape, before[name], after[name], strict=True))
        for name, shape in found.items()
    )


def _fewest(
    trial: Trial, pins: Mapping[Key, int], chosen: Mapping[Key, int], before: Shapes, after: Shapes
) -> dict[Key, int]:
    """The choice with only those entries held that would change otherwise."""
    held = {**pins, **chosen}
    for key in (key for key in pins if key not in chosen):
        without = {other: n for other, n in held.items() if other != key}
        if _shapes(trial, without, before) == after:
            held = without
    return held


def _shapes(trial: Trial, chosen: Mapping[Key, int], known: Shapes) -> Shapes | None:
    """Shapes of the parameters of the rebuilt model; None if it cannot be built."""
    assert trial.config is not None
    try:
        model, _ = trial.build(_changes(trial.config, chosen), ())
    except _FAILURES:
        return None
    found = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return found | {name: tuple(b.shape) for name, b in model.named_buffers() if name in known}


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
