"""Weight decay by what a parameter does, derived from the trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from regauge.api import given_inputs
from regauge.errors import BadInput
from regauge.optim.invariant import invariant_in, trainable
from regauge.optim.uses import Reach, Use, Uses
from regauge.trace import module_path, trace


class Role(StrEnum):
    INPUT_SCALE = "input scale"
    OUTPUT_SCALE = "output scale"
    SCALE = "scale"
    INVARIANT = "invariant weight"
    BIAS = "bias"
    EMBEDDING = "embedding"
    WEIGHT = "weight"


DECAY: dict[Role, float] = {
    Role.INPUT_SCALE: 1.0,
    Role.OUTPUT_SCALE: 0.0,
    Role.SCALE: 0.0,
    Role.INVARIANT: 1.0,
    Role.BIAS: 0.0,
    Role.EMBEDDING: 0.0,
    Role.WEIGHT: 1.0,
}
"""Factor of the weight decay for each role."""


@dataclass(frozen=True)
class Assigned:
    """The role of a parameter, and why, in one line."""

    role: Role
    reason: str


def roles(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any], *, batch_norm: str = "training"
) -> dict[str, Assigned]:
    """The role of every parameter, in the order of the model. No weight is read.

    ``input scale``: a gain whose product goes into linear maps only, which could take it over.
    ``output scale``: a gain whose product is added to another activation, the residual stream.
    ``scale``: any other gain. ``invariant weight``: see :func:`regauge.optim.scale_invariant`.
    ``bias``: only ever added. ``embedding``: a table that is looked up, or that gives the logits.
    ``weight``: all else.

    Args:
        model, inputs, batch_norm: as in :func:`regauge.optim.scale_invariant`.

    Raises:
        TraceError: the model cannot be exported. BadInput: no inputs.

    Source: the distinction of scales is that of arXiv 2605.26895 (norms before linear maps and on the outputs
    of branches).
    """
    args, kwargs = given_inputs(inputs)
    traced = trace(model, args, kwargs)
    names = trainable(model)
    uses = Uses(traced)
    invariant = invariant_in(traced, names, batch_norm=batch_norm)
    found: dict[str, Assigned] = {}
    for name in names:
        view = invariant.get(name)
        kinds = {used.use for used in uses.of(name)}
        if not kinds:
            found[name] = Assigned(Role.WEIGHT, "is not used")
        elif uses.embedding(name):
            looked = Use.LOOKUP in kinds
            found[name] = Assigned(Role.EMBEDDING, "its rows are looked up" if looked else "gives the logits")
        elif kinds == {Use.SCALE}:
            found[name] = _scale(uses, name)
        elif view is not None:
            cut = "as a whole" if view.whole else f"in {view.blocks} blocks of axis {view.axis}"
            by = f", by {view.norms[0]}" if view.norms else ""
            found[name] = Assigned(Role.INVARIANT, f"its scale is removed {cut}{by}")
        elif kinds == {Use.SHIFT}:
            found[name] = Assigned(Role.BIAS, f"is added in {_place(uses, name)}")
        else:
            found[name] = Assigned(Role.WEIGHT, " and ".join(sorted(f"is {kind}" for kind in kinds)))
    return found


def _place(uses: Uses, name: str) -> str:
    node = uses.of(name)[0].node
    return module_path(node) or node.name


def _scale(uses: Uses, name: str) -> Assigned:
    reached = {reach for used in uses.of(name) for reach in uses.reaches(used.node)}
    where = " and ".join(sorted(reached)) or "nothing"
    if Reach.STREAM in reached:
        return Assigned(Role.OUTPUT_SCALE, f"what it multiplies goes to {where}")
    if reached == {Reach.LINEAR}:
        return Assigned(Role.INPUT_SCALE, f"what it multiplies goes to {where} only")
    return Assigned(Role.SCALE, f"what it multiplies goes to {where}")


def groups(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    weight_decay: float,
    *,
    decay: Mapping[Role | str, float] | None = None,
    batch_norm: str = "training",
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, one for each role that occurs, with weight_decay · factor of it.

    Parameters go in with their names, so that views by name can be used with them. Those that need no
    gradient are left out.

    Args:
        model, inputs, batch_norm: as in :func:`roles`.
        weight_decay: of a factor of one.
        decay: role -> factor, in place of those in :data:`DECAY`.

    Raises:
        BadInput: a role that does not exist, or no inputs. TraceError: the model cannot be exported.
    """
    factors = dict(DECAY)
    for role, factor in (decay or {}).items():
        if role not in set(Role):
            raise BadInput("unknown role", expected=", ".join(Role), found=str(role))
        factors[Role(role)] = factor
    assigned = roles(model, inputs, batch_norm=batch_norm)
    held: dict[Role, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            held.setdefault(assigned[name].role, []).append((name, parameter))
    return [
        {"params": held[role], "weight_decay": weight_decay * factors[role], "role": str(role)}
        for role in Role
        if role in held
    ]


def table(assigned: Mapping[str, Assigned]) -> str:
    """Parameter, role and reason, one line each."""
    rows = [("parameter", "role", "because it"), *((n, str(a.role), a.reason) for n, a in assigned.items())]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a.ljust(first)}  {b.ljust(second)}  {c}" for a, b, c in rows)
