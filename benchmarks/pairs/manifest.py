"""The list of pairs: what each model is made of, and whether one descends from the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pairs.families import FAMILIES
from pairs.recipes import Made, Source, Step

BASES = (0, 1)
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Pair:
    """Two models.

    Attributes:
        name: of the pair.
        derived: whether one was made from the other, or both from a third.
        kind: what was done, or why they have nothing to do with each other.
        family: of both.
        a, b: the models.
    """

    name: str
    derived: bool
    kind: str
    family: str
    a: Made
    b: Made

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name, "derived": self.derived, "kind": self.kind, "family": self.family,
            "a": self.a.plain(), "b": self.b.plain(),
        }  # fmt: skip


def derived(family: str) -> Iterator[tuple[str, Made, Made]]:
    """(kind, a, b) of pairs that have a common origin; the disguises are numbered by the caller."""
    for seed in BASES:
        base, twin = Made(Source(family, seed)), Made(Source(family, seed + 2))
        one, two = base.then(("tuned", 1)), base.then(("tuned", 2))
        yield "copy", base, base.then(("disguised", 0))
        yield "copy", base.then(("disguised", 0)), base.then(("disguised", 0))
        yield "bf16", base, base.then(("disguised", 0), ("half", None))
        yield "int4", base, base.then(("rounded", None), ("disguised", 0))
        yield "int4 stored", base, base.then(("disguised", 0), ("rounded", None))
        yield "neurons zeroed", base, base.then(("silenced", None), ("disguised", 0))
        yield "neurons removed", base, base.then(("removed", None), ("disguised", 0))
        yield "fine-tuned", base, one.then(("disguised", 0))
        yield "low rank", base, base.then(("adapted", 1), ("disguised", 0))
        yield "average of two tuned", base, one.then(("averaged", two), ("disguised", 0))
        yield "average with a twin", base, base.then(("averaged", twin), ("disguised", 0))
        yield "tuned siblings", one, two.then(("disguised", 0))


def unrelated(family: str) -> Iterator[tuple[str, Made, Made]]:
    """(kind, a, b) of pairs of models trained apart."""
    models = [Made(Source(family, seed)) for seed in SEEDS]
    hide: Step = ("disguised", 0)
    for a, b in itertools.combinations(models, 2):
        yield "other seed", a, b
    yield "other seed", models[0], models[1].then(hide)
    yield "other seed", models[2], models[3].then(hide)
    for seed in BASES:
        other = Made(Source(family, seed, "b"))
        yield "other data", models[seed], other
        yield "other data", models[seed], other.then(hide)
        yield "never trained", models[seed], Made(Source(family, 20 + seed, "new"))
        yield "wider, cut", models[seed], Made(Source(family, 10, "a", "wide")).then(("first", None))
        yield "other activation", models[seed], Made(Source(family, 11, "a", "other"))
    yield "other seed, tuned alike", models[0].then(("tuned", 1)), models[1].then(("tuned", 1))
    yield "other seed, int4", models[2], models[3].then(("rounded", None), hide)


def pairs(families: Sequence[str] | None = None) -> tuple[Pair, ...]:
    """All pairs, always the same; every disguise has a seed of its own.

    Args:
        families: names; None for all.
    """
    found = []
    for family in FAMILIES:
        if families is not None and family not in families:
            continue
        seeds, counts = itertools.count(1), {}
        listed = [(True, *item) for item in derived(family)] + [(False, *item) for item in unrelated(family)]
        for is_derived, kind, a, b in listed:
            number = counts[kind] = counts.get(kind, 0) + 1
            name = f"{family}: {kind} {number}"
            found.append(Pair(name, is_derived, kind, family, _numbered(a, seeds), _numbered(b, seeds)))
    return tuple(found)


def _numbered(made: Made, seeds: Iterator[int]) -> Made:
    return Made(made.source, tuple((n, next(seeds) if n == "disguised" else v) for n, v in made.steps))
