"""A smaller model that starts from some of the weights of a larger one, both given as modules."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from regauge.cuts.select import selected
from regauge.errors import Refused
from regauge.nn.init.weights import fill


def select_(tensor: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """y[i, j, …] = x[k(i), l(j), …] with the positions of :func:`regauge.cuts.select.indices`, not rescaled.

    Source: Xu et al., Initializing Models with Larger Ones (arXiv 2311.18823, uniform selection).

    Args:
        tensor: y, filled in place.
        teacher: x, with as many axes, none shorter.

    Raises:
        Refused: other shapes.
    """
    try:
        return fill(tensor, selected(teacher.detach(), tuple(tensor.shape)))
    except ValueError as error:
        raise Refused(
            "this tensor is no part of that of the teacher",
            expected=f"at least {tuple(tensor.shape)}",
            found=str(tuple(teacher.shape)),
        ) from error


def select_module_(student: nn.Module, teacher: nn.Module, *, skip: Collection[str] = ()) -> tuple[str, ...]:
    """Every parameter and buffer of the student by :func:`select_` from that of the same name.

    With layers that are numbered, these are the first layers of the teacher. Axes of equal sizes keep equal
    positions, so a stream stays aligned; heads do not: two heads of the teacher can interleave in one. The
    result is another function than that of the teacher, and than any cut certified by regauge.

    Args:
        student: changed in place.
        teacher: of the same structure, at least as large in every axis.
        skip: names of tensors that keep what they have, such as those of the classifier.

    Returns:
        the names that were filled.

    Raises:
        Refused: a name is missing in the teacher, or a shape does not fit; nothing is changed then.
    """
    source = teacher.state_dict(keep_vars=True)
    goals = {name: tensor for name, tensor in student.state_dict(keep_vars=True).items() if name not in skip}
    for name, goal in goals.items():
        found = source.get(name)
        fits = (
            found is not None
            and found.dim() == goal.dim()
            and all(m <= n for m, n in zip(goal.shape, found.shape, strict=True))
        )
        if not fits:
            raise Refused(
                "a tensor of the student is no part of one of the teacher",
                parameter=name,
                expected=f"at least {tuple(goal.shape)}",
                found="none" if found is None else str(tuple(found.shape)),
                way_out="skip it, if it shall keep its own values",
            )
    for name, goal in goals.items():
        select_(goal, source[name])
    return tuple(goals)
