"""Entries of a configuration that give parameters other shapes, found by trying.

Nothing is looked up by name: entries that equal a size that grows are changed, and the model is built.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from regauge.growing.trial import Shapes, Trial, built, expected
from regauge.patches import Patch
from regauge.trace import Trace

MOST_TRIALS = 96
Key = tuple[str, ...]
Place = TypeVar("Place")


def by_config(
    trial: Trial, trace: Trace, wanted: Shapes, sizes: Mapping[int, set[int]]
) -> Iterator[tuple[dict[str, Any], tuple[Patch, ...]]]:
    """Changes to the configuration after which every parameter has the shape wanted, likeliest first.

    Each entry is first changed alone: what then changes axes that are to stay is left aside.
    """
    if trial.config is None:
        return
    leaves = dict(_leaves(trial.resolved))
    pins = {key: n for key, n in leaves.items() if _at(trial.config, key) is None and n is not None}
    options = {key: sorted(sizes[n]) for key, n in leaves.items() if n is not None and n in sizes}
    blank = sorted({m for new in sizes.values() for m in new})
    unset = {key: blank for key, n in leaves.items() if n is None}
    before, after = expected(trace, wanted)
    useful: dict[Key, list[int]] = {}

    def shapes(held: Mapping[Key, int]) -> Shapes | None:
        return built(trial, _changes(trial.config or {}, held), (), trace)

    def freed(held: dict[Key, int], chosen: Mapping[Key, int]) -> dict[Key, int]:
        """Without the defaults that need not be written down."""
        for key in [key for key in pins if key not in chosen]:
            without = {k: n for k, n in held.items() if k != key}
            if shapes(without) == after:
                held = without
        return held

    for chosen in ({key: value} for key in options for value in options[key]):
        held = {**pins, **chosen}
        found = shapes(held)
        if found == after:
            yield _changes(trial.config, freed(held, chosen)), ()
        elif found is None or _on_the_way(before, found, after):
            for key, value in chosen.items():
                useful.setdefault(key, []).append(value)
    together = choices(useful, None, range(len(useful), 1, -1))
    completed = choices({**useful, **unset}, set(unset), (1, 2))
    for several in (together, completed):
        for chosen in itertools.islice(several, MOST_TRIALS):
            held = {**pins, **chosen}
            if shapes(held) == after:
                yield _changes(trial.config, freed(held, chosen)), ()


def _on_the_way(before: Shapes, found: Shapes, after: Shapes) -> bool:
    """Whether something changed, and only axes that are to change."""
    if found.keys() != after.keys() or found == before:
        return False
    for name, shape in found.items():
        if len(shape) != len(after[name]):
            return False
        if any(n != a and a == m for n, a, m in zip(shape, before[name], after[name], strict=True)):
            return False
    return True


def choices(
    options: Mapping[Place, Sequence[int]], fresh: set[Place] | None, counts: Iterable[int]
) -> Iterator[dict[Place, int]]:
    """Choices of so many entries; with ``fresh`` only those that set exactly one of these."""
    for count in counts:
        for keys in itertools.combinations(options, count):
            if fresh is not None and sum(key in fresh for key in keys) != 1:
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
