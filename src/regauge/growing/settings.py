"""Entries of a configuration that give parameters other shapes, found by trying.

Nothing is looked up by name: entries that equal a size that grows are changed, and the model is built.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from regauge.config_paths import Path, at, changes, leaves
from regauge.growing.trial import Shapes, Trial, built, expected
from regauge.patches import Patch
from regauge.trace import Trace

MOST_TRIALS = 96
Place = TypeVar("Place")


def by_config(
    trial: Trial, trace: Trace, wanted: Shapes, sizes: Mapping[int, set[int]]
) -> Iterator[tuple[dict[str, Any], tuple[Patch, ...]]]:
    """Changes to the configuration after which every parameter has the shape wanted, likeliest first.

    Each entry is first changed alone: what then changes axes that are to stay is left aside.
    """
    if trial.config is None:
        return
    numbers = {key: n for key, n in leaves(trial.resolved) if n is None or type(n) is int}
    pins = {key: n for key, n in numbers.items() if at(trial.config, key) is None and n is not None}
    options = {key: sorted(sizes[n]) for key, n in numbers.items() if n is not None and n in sizes}
    blank = sorted({m for new in sizes.values() for m in new})
    unset = {key: blank for key, n in numbers.items() if n is None}
    before, after = expected(trace, wanted)
    useful: dict[Path, list[int]] = {}

    def shapes(held: Mapping[Path, int]) -> Shapes | None:
        return built(trial, changes(trial.config or {}, held), (), trace)

    def freed(held: dict[Path, int], chosen: Mapping[Path, int]) -> dict[Path, int]:
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
            yield changes(trial.config, freed(held, chosen)), ()
        elif found is None or _on_the_way(before, found, after):
            for key, value in chosen.items():
                useful.setdefault(key, []).append(value)
    together = choices(useful, None, range(len(useful), 1, -1))
    completed = choices({**useful, **unset}, set(unset), (1, 2))
    for several in (together, completed):
        for chosen in itertools.islice(several, MOST_TRIALS):
            held = {**pins, **chosen}
            if shapes(held) == after:
                yield changes(trial.config, freed(held, chosen)), ()


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
