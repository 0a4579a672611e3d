"""From which similarity on models count as derived: measured on pairs whose origin is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Calibration:
    """What ``benchmarks/compare_pairs.py`` measured.

    Attributes:
        threshold: similarity from which a pair counts as derived.
        false_positive: probability that an unrelated pair reaches it, by a normal law for artanh(similarity).
        found, missed: derived pairs at or above it, and below.
        false, rejected: unrelated pairs likewise.
        highest_unrelated: the largest similarity of an unrelated pair.
    """

    threshold: float
    false_positive: float
    found: int
    missed: int
    false: int
    rejected: int
    highest_unrelated: float


@cache
def calibration() -> Calibration:
    """The calibration that the library ships, see ``benchmarks/README.md``."""
    text = resources.files("regauge.comparing").joinpath("calibration.json").read_text(encoding="utf-8")
    content = json.loads(text)
    held = content["chosen"]
    return Calibration(
        held["threshold"],
        held["false-positive rate"],
        held["found"],
        held["missed"],
        held["false"],
        held["rejected"],
        content["unrelated"]["highest"],
    )
