"""Weights kept in a bounded range and away from zero, as a parametrisation of torch.

Source: Weight Compander (arXiv 2306.16993), whose abstract asks for an odd, bounded function that is steep at
zero, with parameters that are learnt. The arctangent is taken here; the authors' may be another one.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from regauge.errors import BadInput, Refused


class Compander(nn.Module):
    """w = a · arctan(v / b), entry by entry; v is trained, |w| < a π / 2, dw/dv = a b / (b² + v²).

    Args:
        bound: a π / 2, the open bound of |w|.
        slope: a / b, the derivative at zero.
        learned: whether a and b are parameters, ``outer`` and ``inner`` [], or buffers.

    Raises:
        BadInput: the bound or the slope is not above zero.
    """

    outer: torch.Tensor
    inner: torch.Tensor

    def __init__(
        self, bound: float, slope: float = 1.0, learned: bool = False, like: torch.Tensor | None = None
    ):
        super().__init__()
        if not (bound > 0 and slope > 0):
            raise BadInput("bound and slope must be above zero", found=f"bound {bound}, slope {slope}")
        like = torch.empty(()) if like is None else like
        outer = torch.full((), 2 * bound / math.pi, dtype=like.dtype, device=like.device)
        for name, value in (("outer", outer), ("inner", outer / slope)):
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.outer * torch.atan(v / self.inner)

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        """v = b · tan(w / a).

        Raises:
            Refused: an entry of w is outside the bound.
        """
        bound = math.pi / 2 * float(self.outer.detach().abs())
        most = float(w.detach().abs().max()) if w.numel() else 0.0
        if not most < bound:
            raise Refused(
                "a weight is outside the range of its parametrisation",
                expected=f"|w| < {bound:.6g}",
                found=f"{most:.6g}",
                way_out="a larger bound",
            )
        return self.inner * torch.tan(w / self.outer)


def compand(
    module: nn.Module,
    name: str = "weight",
    bound: float | None = None,
    slope: float = 1.0,
    learned: bool = False,
) -> nn.Module:
    """Let one parameter of a module be w = a · arctan(v / b) with the values it has; returns the module.

    ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` stores w again. Weight decay acts on
    v; gains and shifts of norms are better left as they are.

    Args:
        module: owner of the parameter; changed in place.
        name: of the parameter.
        bound: a π / 2; None for twice the largest |w|.
        slope: a / b.
        learned: whether a and b are trained.

    Raises:
        BadInput: there is no such parameter, or it is zero and no bound is given.
        Refused: an entry of w is outside the bound.
    """
    weight = dict(module.named_parameters(recurse=False)).get(name)
    if weight is None:
        raise BadInput("no such parameter", parameter=name, found=type(module).__name__)
    largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if bound is None and largest == 0:
        raise BadInput("a weight of zeros has no range", parameter=name, way_out="give the bound")
    chosen = 2 * largest if bound is None else bound
    compander = Compander(chosen, slope, learned, weight)
    compander.right_inverse(weight)
    parametrize.register_parametrization(module, name, compander)
    return module
