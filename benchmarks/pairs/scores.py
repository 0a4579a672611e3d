"""How well a number tells pairs with a common origin from pairs without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Confusion:
    """Counts at a threshold: at or above it a pair is called derived."""

    threshold: float
    found: int
    missed: int
    false: int
    rejected: int


def confusion(derived: Sequence[float], unrelated: Sequence[float], threshold: float) -> Confusion:
    """Counts of both kinds of pair on both sides of a threshold."""
    yes = sum(bool(value >= threshold) for value in derived)
    wrong = sum(bool(value >= threshold) for value in unrelated)
    return Confusion(float(threshold), yes, len(derived) - yes, wrong, len(unrelated) - wrong)


def auc(derived: Sequence[float], unrelated: Sequence[float]) -> float:
    """Area under the ROC curve: how often a derived pair scores above an unrelated one, ties for half."""
    ranks = stats.rankdata([*derived, *unrelated])
    n, m = len(derived), len(unrelated)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def roc(derived: Sequence[float], unrelated: Sequence[float]) -> list[tuple[float, float, float]]:
    """(threshold, false-positive rate, true-positive rate) at every score, highest threshold first."""
    steps = sorted({*derived, *unrelated}, reverse=True)
    found = []
    for threshold in steps:
        at = confusion(derived, unrelated, threshold)
        found.append((threshold, at.false / len(unrelated), at.found / len(derived)))
    return found


def best(derived: Sequence[float], unrelated: Sequence[float]) -> Confusion:
    """At the threshold with the most right answers, each kind of pair weighted alike; half way to the next
    lower score. Of equally good ones the highest."""
    values = sorted({*derived, *unrelated}, reverse=True)
    lower = [*values[1:], values[-1] - 1.0]
    found = [confusion(derived, unrelated, (high + low) / 2) for high, low in zip(values, lower, strict=True)]
    return max(found, key=lambda at: at.found * len(unrelated) - at.false * len(derived))


def without_false(derived: Sequence[float], unrelated: Sequence[float]) -> Confusion:
    """Half way between the highest unrelated score and the lowest derived one above it."""
    top = max(unrelated)
    above = [value for value in derived if value > top]
    return confusion(derived, unrelated, (top + min(above)) / 2 if above else np.nextafter(top, np.inf))


def judged(derived: Mapping[str, Sequence[float]], unrelated: Sequence[float]) -> dict[str, Any]:
    """Everything above, for all derived pairs and for disguised copies alone.

    Args:
        derived: kind of change -> scores.
        unrelated: scores.
    """
    every = [value for values in derived.values() for value in values]
    found = {}
    for name, values in (("all", every), ("copies", derived.get("copy", ()))):
        if values:
            found[name] = {
                "auc": auc(values, unrelated),
                "best": asdict(best(values, unrelated)),
                "no false positive": asdict(without_false(values, unrelated)),
            }
    return found


def threshold(unrelated: Sequence[float], rates: Sequence[float] = (1e-2, 1e-3, 1e-6)) -> dict[str, Any]:
    """Where a false positive has a stated probability, if scores of unrelated pairs keep to a fitted law.

    Scores are taken as correlations: the laws are fitted to artanh(score) (Fisher's z). Two laws: a normal
    distribution by its mean and deviation, and a Gumbel distribution by maximum likelihood, whose right tail
    is heavier. Without a law, the rate above the highest score is below 3 / n with 95 % confidence (the rule
    of three), had the pairs been independent; those that share a model are not.

    Args:
        unrelated: scores of pairs without a common origin.
        rates: of false positives.
    """
    z = np.arctanh(np.clip(np.asarray(unrelated, dtype=np.float64), -1 + 1e-9, 1 - 1e-9))
    n, mean, deviation = len(z), float(z.mean()), float(z.std(ddof=1))
    location, scale = stats.gumbel_r.fit(z)
    laws = {
        "normal": lambda rate: stats.norm.isf(rate, mean, deviation),
        "gumbel": lambda rate: stats.gumbel_r.isf(rate, location, scale),
    }
    return {
        "pairs": n, "mean of z": mean, "deviation of z": deviation, "highest": max(unrelated),
        "at false-positive rate": {
            name: {f"{rate:g}": float(np.tanh(law(rate))) for rate in rates} for name, law in laws.items()
        },
        "rule of three": 3 / n,
        "fits": {"gumbel": [float(location), float(scale)]},
    }  # fmt: skip
