"""Every changed tensor as it lies in the files against what the plan says, row block by row block.

The function certificate runs on inputs; rows that no input looks up are seen here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regauge.apply import RewrittenView
from regauge.checkpoint import Checkpoint
from regauge.errors import NotEquivalent
from regauge.plan import Rewrite

BLOCK = 1 << 18
"""Entries compared at once."""

LIMIT = 0.76
"""Units in the last place: half of one, and half of another where a cast passes through float32."""


@dataclass(frozen=True)
class Written:
    """Result of the comparison.

    Attributes:
        tensors: how many were compared, each entry of them.
        worst: bound on the largest deviation, in units of the last place of the stored dtype.
    """

    tensors: int
    worst: float


def check_written(
    staged: Checkpoint, view: RewrittenView, plan: Rewrite, names: Mapping[str, str]
) -> Written:
    """Compare every tensor that the plan changes or adds.

    Args:
        staged: the written files.
        view: the source as the plan leaves it, in float64.
        plan: the plan.
        names: parameter -> tensor name; parameters not in it are stored under their own name.

    Raises:
        NotEquivalent: an entry is further from its exact value than rounding allows.
    """
    worst, count = 0.0, 0
    for parameter in dict.fromkeys((*plan.copies, *plan.steps, *plan.made)):
        if parameter in plan.drops:
            continue
        tensor = names.get(parameter, parameter)
        shape = staged.shape(tensor)
        rows = shape[0] if shape else 1
        bound = {axis % max(1, len(shape)) for step in plan.steps.get(parameter, ()) for axis in step.axes}
        step = rows if 0 in bound or not shape else max(1, BLOCK * rows // max(1, _numel(shape)))
        whole = view.read(parameter) if step >= rows else None
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            exact = whole if whole is not None else view.read_rows(parameter, start, stop)
            stored = staged.read(tensor) if not shape else staged.read_rows(tensor, start, stop)
            error = _ulps(stored, exact)
            worst = max(worst, error)
            if not error <= LIMIT:
                raise NotEquivalent(
                    "a written tensor is not what was planned",
                    parameter=parameter,
                    expected="each entry within rounding of its exact value",
                    found=f"{error:.3g} units in the last place, rows {start} to {stop}",
                    way_out="check the disk, and report the recipe",
                )
        count += 1
    return Written(count, worst)


def _ulps(stored: torch.Tensor, exact: torch.Tensor) -> float:
    """An upper bound of the deviation: 0, half a unit, or measured where it is more than rounding once."""
    if stored.dtype == exact.dtype or not exact.is_floating_point():
        return 0.0 if torch.equal(stored, exact) else float("inf")
    if torch.equal(stored, exact.to(stored.dtype)):
        return 0.0 if torch.equal(stored.to(exact.dtype), exact) else 0.5
    info = torch.finfo(stored.dtype)
    wanted = exact.to(torch.float64)
    gap = (stored.to(torch.float64) - wanted).abs_()
    # One unit in the last place: 2 ** (exponent - bits), at least that of the subnormal numbers.
    _, exponent = torch.frexp(wanted)
    unit = torch.ldexp(torch.full_like(wanted, info.eps / 2), exponent).clamp_min_(
        info.smallest_normal * info.eps
    )
    return float(gap.div_(unit).max()) if gap.numel() else 0.0


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
