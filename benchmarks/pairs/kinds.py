"""Rules that name the kind of change from what alignment leaves (see :mod:`pairs.features`)."""

from __future__ import annotations

from collections.abc import Mapping

GROUPS: Mapping[str, tuple[str, ...]] = {
    "copy": ("copy",),
    "bf16": ("bf16",),
    "int4": ("int4", "int4 stored"),
    "neurons zeroed": ("neurons zeroed",),
    "neurons removed": ("neurons removed",),
    "trained on": ("fine-tuned", "average of two tuned", "tuned siblings"),
    "low rank": ("low rank",),
    "average with another": ("average with a twin",),
}
"""Name that a rule gives -> kinds of pair it is right for."""


def kind(found: Mapping[str, float]) -> str:
    """The first rule that holds, of a pair known to have a common origin."""
    if found["resized"] > 0:
        return "neurons removed"
    if found["largest zero rows"] >= 0.05:
        return "neurons zeroed"
    if found["residual"] <= 1e-5:
        return "copy"
    if found["bfloat16"] >= 0.99 and found["residual"] <= 0.01:
        return "bf16"
    if found["levels"] <= 0.5 or (
        found["kurtosis"] <= 2.7 and found["noise"] <= 0.1 and found["flatness"] >= 0.75
    ):
        return "int4"
    if found["slope"] <= 0.75 and found["residual"] >= 0.4:
        return "average with another"
    if found["flatness"] <= 0.4 and found["rank"] <= 0.45:
        return "low rank"
    return "trained on"
