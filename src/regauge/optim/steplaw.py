"""Step Law: peak learning rate and batch size for pre-training, from parameters and tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from regauge.api import given_inputs
from regauge.errors import BadInput
from regauge.optim.invariant import trainable
from regauge.optim.uses import Uses
from regauge.trace import Trace, trace

LR = (0.5863077907399268, -0.7129222911869904, 0.30749095041206964)
"""ln lr = a + b ln N + c ln D: means of 1000 bootstrap fits."""
BATCH = (-0.5435421736103339, 0.5709443646895045)
"""ln batch = a + c ln D, the batch in tokens."""
FINAL_LR = 1e-5
"""What the schedule of the fits ends at, whatever the peak."""
RANGES = {"parameters": (2.146e8, 1.075e9), "tokens": (4e9, 1e11)}
"""What the released runs of dense models cover."""


@dataclass(frozen=True)
class StepLaw:
    """What the law gives.

    Attributes:
        parameters: N, without embeddings.
        tokens: D.
        lr: peak learning rate of AdamW, for a schedule with warm-up that ends at ``final_lr``.
        batch_tokens: tokens in a batch.
        final_lr: 1e-5, not a share of the peak.
        warnings: where N or D lies outside of what was measured.
    """

    parameters: float
    tokens: float
    lr: float
    batch_tokens: float
    final_lr: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "warnings": list(self.warnings)}


def step_law(parameters: float, tokens: float) -> StepLaw:
    """lr = 1.797 · N^−0.713 · D^0.307, batch = 0.581 · D^0.571 tokens; N parameters, D tokens.

    Fitted on models of 0.21 to 1.07 billion parameters without embeddings and 4 to 100 billion tokens:
    outside of these ranges the result says so. Not for fine-tuning, for other optimizers than AdamW, for
    other rules of the final learning rate, or for models with muP.

    Args:
        parameters: N > 0 without embeddings, see :func:`non_embedding`.
        tokens: D > 0 in all of the training.

    Raises:
        BadInput: a number that is not positive and finite.

    Source: Li et al., Predictable Scale: Part I, Step Law, arXiv 2503.04715; coefficients are the means of
    the 1000 bootstrap fits that the authors released.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if not 0 < value < math.inf:
            raise BadInput(f"the number of {name} is not positive", found=str(value))
    warned: list[str] = []
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        low, high = RANGES[name]
        if not low <= value <= high:
            side, factor = ("below", low / value) if value < low else ("above", value / high)
            warned.append(
                f"{value:.3g} {name} lie {factor:.3g}× {side} what was measured, {low:.3g} to {high:.3g}:"
                " this is an extrapolation"
            )
    n, d = math.log(parameters), math.log(tokens)
    return StepLaw(
        parameters,
        tokens,
        math.exp(LR[0] + LR[1] * n + LR[2] * d),
        math.exp(BATCH[0] + BATCH[1] * d),
        FINAL_LR,
        tuple(warned),
    )


@dataclass(frozen=True)
class Counted:
    """Parameters of a model, tied ones once.

    Attributes:
        total: all of them.
        embedding: those of tables that are looked up or give the logits.
        tables: their names.
    """

    total: int
    embedding: int
    tables: tuple[str, ...]

    @property
    def rest(self) -> int:
        return self.total - self.embedding


def non_embedding(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> Counted:
    """Count parameters; an embedding is a table that is looked up, or that gives the logits.

    Derived from the trace; the model may be on the meta device.

    Raises:
        TraceError: the model cannot be exported. BadInput: no inputs.
    """
    args, kwargs = given_inputs(inputs)
    return counted_in(trace(model, args, kwargs), trainable(model))


def counted_in(traced: Trace, names: Sequence[str]) -> Counted:
    """The same for a model that has been traced."""
    uses = Uses(traced)
    sizes = {name: math.prod(traced.shapes[name]) for name in names}
    tables = tuple(name for name in names if uses.embedding(name))
    return Counted(sum(sizes.values()), sum(sizes[name] for name in tables), tables)
