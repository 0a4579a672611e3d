"""From which distance on models have nothing to do with each other: measured on pairs of known origin."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources


@cache
def threshold() -> float:
    """Distance below which models count as related: one derived from the other, or both from a third.

    Models trained apart come as near with probability 0.001, by a normal law for artanh(1 − distance) fitted
    to small models; see ``benchmarks/fingerprint_pairs.py``.
    """
    text = resources.files("regauge.provenance").joinpath("calibration.json").read_text(encoding="utf-8")
    return float(json.loads(text)["threshold"])
