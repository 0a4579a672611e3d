"""Rules that name the kind of change from what alignment leaves (see :mod:`regauge.comparing.features`).

Set on the pairs of ``benchmarks/compare_pairs.py``, where each kind is known; see ``benchmarks/README.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

SAME = 1e-5
ROUNDED = 0.01


class Kind(StrEnum):
    COPY = "copy"
    BFLOAT16 = "rounded to bfloat16"
    QUANTISED = "quantised"
    ZEROED = "units set to zero"
    RESIZED = "units removed or added"
    TRAINED = "trained further"
    LOW_RANK = "low-rank update"
    AVERAGED = "averaged with another model"


def kind(found: Mapping[str, float]) -> Kind:
    """The first rule that holds, of a pair known to have a common origin."""
    if found["resized"] > 0:
        return Kind.RESIZED
    if found["largest zero rows"] >= 0.05:
        return Kind.ZEROED
    if found["residual"] <= SAME:
        return Kind.COPY
    if found["bfloat16"] >= 0.99 and found["residual"] <= ROUNDED:
        return Kind.BFLOAT16
    if found["levels"] <= 0.5 or (
        found["kurtosis"] <= 2.7 and found["noise"] <= 0.1 and found["flatness"] >= 0.75
    ):
        return Kind.QUANTISED
    if found["slope"] <= 0.75 and found["residual"] >= 0.4:
        return Kind.AVERAGED
    if found["flatness"] <= 0.4 and found["rank"] <= 0.45:
        return Kind.LOW_RANK
    return Kind.TRAINED


def evidence(named: Kind, found: Mapping[str, float]) -> str:
    """The figures that decided, in one line."""
    residual = f"‖a − b‖ = {found['residual']:.3g} ‖a‖"
    shown = {
        Kind.RESIZED: f"{100 * found['resized']:.0f} % of the matrices have other sizes",
        Kind.ZEROED: f"{100 * found['largest zero rows']:.0f} % of the units of a layer are zero",
        Kind.BFLOAT16: "every stored value is one",
        Kind.QUANTISED: f"{64 * found['levels']:.0f} distinct values in 64 stored ones"
        if found["levels"] <= 0.5
        else f"the difference is as even as rounding errors (kurtosis {found['kurtosis']:.2f}), of full rank,"
        " and independent of a",
        Kind.AVERAGED: f"⟨a, b⟩ = {found['slope']:.2f} ⟨a, a⟩",
        Kind.LOW_RANK: f"{100 * found['rank']:.0f} % of the singular values hold the difference",
        Kind.TRAINED: "a dense difference that is no rounding",
    }
    return f"{shown[named]}; {residual}" if named in shown else residual
