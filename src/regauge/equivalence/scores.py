"""Losses, classes and vectors of rows of text, from a traced graph whose weights are streamed.

Logits are read a block of columns at a time and only at the positions that are scored. What cannot be scored
soundly is refused after looking: a loss where a position sees the token it is scored on, or anything that
depends on padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from regauge.certify.figures import Held, Output
from regauge.certify.parts import Product
from regauge.certify.run import run, run_in_parts
from regauge.equivalence.models import IDS, MASK, TextModel
from regauge.equivalence.paired import Vector
from regauge.errors import NotEquivalent, Refused

UNSCORED = -1
"""In place of a target where nothing is scored."""

LOOKED_AT = 8
"""Positions of each row at which a loss is looked at again."""

NEAR = 1e-5
"""Relative difference in float32 up to which two runs give the same."""


def token_losses(model: TextModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each target given the tokens up to its place.

    Args:
        model: gives logits over tokens.
        ids: int64 (rows, length).
        targets: int64 (rows, length), the token to come after each position, or ``UNSCORED``.

    Returns:
        float64, one entry a target that is scored, in the order of rows and positions.
    """
    function = model.side.function
    inputs = {IDS: ids} | ({MASK: torch.ones_like(ids)} if MASK in model.side.model.inputs else {})
    (logits,) = run_in_parts(function.trace, function.weights, function.buffers, inputs, dtype="stored")
    places = (targets.reshape(-1) != UNSCORED).nonzero()[:, 0]
    wanted = targets.reshape(-1)[places]
    scored = _at(logits, places)
    total = torch.full((len(places),), -torch.inf, dtype=torch.float64)
    hit = torch.full_like(total, torch.nan)
    with torch.no_grad():
        for start in range(0, scored.shape[-1], scored.step):
            stop = min(start + scored.step, scored.shape[-1])
            part = scored.columns(start, stop)
            total = torch.logaddexp(total, torch.logsumexp(part, 1).double())
            inside = ((wanted >= start) & (wanted < stop)).nonzero()[:, 0]
            hit[inside] = part[inside, wanted[inside] - start].double()
    return total - hit


def _at(logits: Output, places: torch.Tensor) -> Output:
    """The logits at some positions only, of which nothing else need be computed."""
    shape = (len(places), logits.shape[-1])
    if isinstance(logits, Product):
        return replace(logits, x=logits.x.reshape(-1, logits.x.shape[-1])[places], shape=shape)
    return Held(logits.columns(0, shape[1])[places])


def class_of(model: TextModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """int64 (rows,): the class with the largest logit, the first of equals."""
    (logits,) = _outputs(model, ids, mask)
    return _finite(model, logits).argmax(1)


def vector_of(model: TextModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float64 (rows, width): the first output; the mean over tokens where it has one vector a token."""
    states = _finite(model, _outputs(model, ids, mask)[0].double())
    if states.ndim == 2:
        return states
    weight = mask.double()[:, :, None]
    return (states * weight).sum(1) / weight.sum(1)


def _outputs(model: TextModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    function = model.side.function
    inputs: Mapping[str, Any] = {IDS: ids, MASK: mask}
    return run(function.trace, function.weights, function.buffers, inputs, dtype="stored")


def _finite(model: TextModel, values: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise not_finite(model)
    return values


def not_finite(model: TextModel) -> NotEquivalent:
    return NotEquivalent(f"an output of {model.side.path.name} on this text is NaN or infinite")


def check_causal(model: TextModel, ids: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
    """Refuse a model whose loss at a position depends on what comes after it.

    The second half of every row is replaced by other tokens; the last losses of the first half must stay.

    Args:
        model, ids, targets: as for :func:`token_losses`.
        losses: what that gave.

    Raises:
        Refused: they do not.
    """
    half = ids.shape[1] // 2
    scored = targets != UNSCORED
    earlier = scored.clone()
    earlier[:, half:] = False
    earlier &= earlier.flip(1).cumsum(1).flip(1) <= LOOKED_AT
    if not bool(earlier.any()):
        return
    changed = ids.clone()
    changed[:, half:] = _others(ids)[:, half:]
    after = token_losses(model, changed, targets.where(earlier, torch.tensor(UNSCORED)))
    if not _same(losses[earlier[scored]], after):
        raise Refused(
            f"{model.side.path.name} has no loss per token on plain text",
            expected="a model of each token given those before it",
            found="later tokens change it: every position sees the token it would be scored on",
            way_out="compare the base model without its head (by its vectors), or leave out the margin",
        )


def check_padding(model: TextModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse a model in which tokens that the mask hides change what comes out.

    Raises:
        Refused: they do.
    """
    kept = mask.clone()
    kept[:, (ids.shape[1] + 1) // 2 :] = 0
    changed = torch.where(kept.bool(), ids, _others(ids))
    first, second = (_first(model, given, kept) for given in (ids, changed))
    if not _same(first, second):
        raise Refused(
            f"{model.side.path.name} reads tokens that its mask hides",
            expected="the same output whatever stands in the padding",
            found="another one",
        )


def _first(model: TextModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    (output, *_) = _outputs(model, ids, mask)
    return output.double() * (mask.double()[:, :, None] if output.ndim == 3 else 1.0)


def _others(ids: torch.Tensor) -> torch.Tensor:
    """Other tokens of the same row; tokens that a row has are tokens that the model knows."""
    rolled = ids.flip(1).roll(1, 1)
    spare = torch.where(ids.amax(1, keepdim=True) != ids, ids.amax(1, keepdim=True), 0)
    return torch.where(rolled != ids, rolled, spare)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(((x - y).norm() <= NEAR * x.norm()).item())


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> Vector:
    """float64 (documents,): 1 - cosine of the rows of two matrices; exactly 0 where they are equal.

    From the difference of the unit vectors, which loses no digits where the two are close.
    """
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return np.asarray(((unit_a - unit_b).square().sum(1) / 2).tolist(), dtype=np.float64)
