"""What a cut is: a change after which the model is another function, by an amount that is measured.

A cut is no move: nothing about its function is proved, and no certificate calls its result equivalent. It is
made only where that is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from regauge.certify import Certificate, Verdict
from regauge.moves.base import Change, Option, Scene


@dataclass(frozen=True)
class Cut:
    """A named change of the function.

    Attributes:
        name: as written in a recipe.
        identity: what is done, in one line, axes named.
        loses: what is lost.
        options: its options by name.
        plan: ``(scene, options) -> Change``, as that of a move.
    """

    name: str
    identity: str
    loses: str
    plan: Callable[[Scene, Mapping[str, Any]], Change]
    options: Mapping[str, Option] = field(default_factory=dict)


def measured(certificate: Certificate, cuts: Sequence[str]) -> Certificate:
    """The certificate of a recipe with cuts: never *equivalent*; its reason says how far apart they are."""
    exact = certificate.evidence.exact or certificate.evidence.float64
    parts = [f"relative error {exact.relative:.3g} in float64"]
    if exact.kl_mean is not None:
        parts.append(f"KL {exact.kl_mean:.3g} nats in the mean")
    if exact.top1 is not None:
        parts.append(f"the same first choice at {100 * exact.top1:.1f}% of the positions")
    reason = f"cut by {', '.join(cuts)}: {', '.join(parts)}"
    return replace(certificate, verdict=Verdict.DIFFERENT, reason=reason)
