"""From which similarity on models count as derived: measured on pairs whose origin is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        threshold: similarity from which a pair counts as derived.
        false_positive: probability that an unrelated pair reaches it, by the law fitted.
        positives, negatives: pairs it was measured on.
        highest_unrelated, lowest_derived: similarities.
    """

    threshold: float
    false_positive: float
    positives: int
    negatives: int
    highest_unrelated: float
    lowest_derived: float


@cache
def calibration() -> Calibration:
    """The calibration that the library ships, see ``benchmarks/README.md``."""
    text = resources.files("regauge.comparing").joinpath("calibration.json").read_text(encoding="utf-8")
    return Calibration(**json.loads(text))
