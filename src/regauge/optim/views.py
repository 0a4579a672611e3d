"""Projection of a step onto the directions that change a scale-invariant parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from regauge.errors import BadInput
from regauge.optim.base import Group, GroupedOptimizer
from regauge.optim.invariant import View

Views = Literal["cosine"] | Mapping[str, View] | Mapping[Tensor, View]
Cut = tuple[int, int]
"""Axis and number of blocks, as in :class:`View`."""


def in_units(x: Tensor, cut: Cut) -> Tensor:
    """x as [before, unit, inside]: what lies before the axis, the units of the axis, all the rest."""
    axis, blocks = cut
    return x.reshape(math.prod(x.shape[:axis]), blocks, -1)


def project_(step: Tensor, param: Tensor, cut: Cut, eps: float) -> None:
    """step[u] ← step[u] − p̂[u] (p̂[u] · step[u]) for every unit u, with p̂ = p / (‖p‖ + eps)."""
    units = in_units(param, cut)
    unit = units / torch.linalg.vector_norm(units, dim=(0, 2), keepdim=True).add_(eps)
    along = (unit * in_units(step, cut)).sum((0, 2), keepdim=True)
    step.sub_((unit * along).reshape(step.shape))


def cosine_cut(param: Tensor, grad: Tensor, delta: float, eps: float) -> Cut | None:
    """The original's test: rows, then the whole tensor; the first in which every |cos(g, p)| is below
    delta / sqrt(length). None for vectors, and where neither is."""
    if param.dim() < 2:
        return None
    for cut in ((0, param.shape[0]), (0, 1)):
        p, g = in_units(param, cut)[0], in_units(grad, cut)[0]
        cosine = torch.nn.functional.cosine_similarity(g, p, dim=1, eps=eps).abs_()
        if bool(cosine.max() < delta / math.sqrt(p.shape[1])):
            return cut
    return None


class Projected(GroupedOptimizer):
    """An optimizer that takes out of a step what only changes the length of scale-invariant units."""

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["views"] = _resolved(group)

    def _cut(self, group: Group, place: dict[Tensor, int], param: Tensor, grad: Tensor) -> Cut | None:
        views = group["views"]
        if views == "cosine":
            return cosine_cut(param, grad, group["delta"], group["eps"])
        found = views[place[param]]
        return None if found is None else (int(found[0]), int(found[1]))

    def _cuts(self, group: Group, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Cut | None]:
        place = {} if group["views"] == "cosine" else {p: i for i, p in enumerate(group["params"])}
        return [self._cut(group, place, p, g) for p, g in zip(params, grads, strict=True)]


def _resolved(group: Group) -> Any:
    """Views as plain data in the order of the parameters, so that a state dict holds them."""
    views = group["views"]
    if views == "cosine" or isinstance(views, list):
        return views
    if not isinstance(views, Mapping):
        raise BadInput(
            "views say which parameters are scale-invariant",
            expected='a mapping from parameters or their names, or "cosine"',
            found=repr(views)[:80],
            way_out="views=scale_invariant(model, inputs)",
        )
    named = any(isinstance(key, str) for key in views)
    names = group.get("param_names")
    if named and names is None:
        raise BadInput(
            "views go by name, and these parameters have none",
            expected="named parameters",
            found="parameters alone",
            way_out="give the optimizer model.named_parameters(), or views by parameter",
        )
    found: list[Cut | None] = []
    for index, param in enumerate(group["params"]):
        view = views.get(names[index] if named and names is not None else param)
        if view is not None:
            fits = view.axis < param.dim() or (view.axis == 0 and param.dim() == 0)
            if not fits or (param.dim() and param.shape[view.axis] % view.blocks):
                raise BadInput(
                    "a view does not fit its parameter",
                    parameter=names[index] if names is not None else None,
                    expected=f"{view.blocks} equal blocks of axis {view.axis}",
                    found=f"shape {tuple(param.shape)}",
                )
        found.append(None if view is None else (view.axis, view.blocks))
    return found
