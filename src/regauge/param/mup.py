"""μP relative to a base width: which sizes grow, and how initialisation and learning rates follow them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regauge.errors import BadInput, Refused
from regauge.nn.init.weights import fill, is_convolution, is_linear, normal


@dataclass(frozen=True)
class Widths:
    """Sizes of a parameter, and those of the base model along axes that grow.

    Attributes:
        sizes: of the model.
        base: size of the base model where the axis grows ("infinite"), else None.
    """

    sizes: tuple[int, ...]
    base: tuple[int | None, ...]

    @property
    def infinite(self) -> int:
        """How many axes grow."""
        return sum(base is not None for base in self.base)

    def ratio(self, axis: int) -> float:
        """Size / base size of an axis, 1 where it does not grow."""
        base = self.base[axis]
        return 1.0 if base is None else self.sizes[axis] / base

    @property
    def mult(self) -> float:
        """The ratio of the last axis that grows: of the fan-in of a hidden matrix [out, in]; 1 if none
        does."""
        growing = [axis for axis, base in enumerate(self.base) if base is not None]
        return self.ratio(growing[-1]) if growing else 1.0


def widths(model: nn.Module, base: nn.Module, delta: nn.Module | None = None) -> dict[str, Widths]:
    """Name of a parameter -> which of its axes grow: those that differ between base and model.

    A model as wide as the base in one axis hides that it grows: then, and to check that nothing else differs,
    give ``delta``, a model of the same kind that differs from the base in every axis that shall grow. Models
    on the meta device will do for both.

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466, appendix B) and microsoft/mup.

    Raises:
        Refused: the parameters are not the same, or an axis differs that does not between base and delta.
    """
    models = (model, base, delta or model)
    shapes = [{name: tuple(p.shape) for name, p in part.named_parameters()} for part in models]
    found: dict[str, Widths] = {}
    for name in [*shapes[0], *(name for other in shapes[1:] for name in other if name not in shapes[0])]:
        sizes = [part.get(name) for part in shapes]
        own, first, second = sizes
        if own is None or first is None or second is None or len({len(own), len(first), len(second)}) > 1:
            raise Refused(
                "the models do not have the same parameters",
                parameter=name,
                expected="the same names and numbers of axes",
                found=" | ".join("none" if size is None else str(size) for size in sizes),
            )
        grows = [a != b for a, b in zip(first, second, strict=True)]
        if any(a != b and not g for a, b, g in zip(own, first, grows, strict=True)):
            raise Refused(
                "an axis differs from the base that is not meant to grow",
                parameter=name,
                expected=str(first),
                found=str(own),
                way_out="let delta differ there too",
            )
        found[name] = Widths(own, tuple(size if g else None for size, g in zip(first, grows, strict=True)))
    return found


class MuReadout(nn.Linear):
    """y[…, o] = W (μ x / m) + b: a linear map from an axis that grows to one that does not; m = width / base.

    m is 1 until :func:`rescale_` sets it; it is kept in the state dict.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
        mult: μ.
        zero: start with W = b = 0, as is recommended.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mult: float = 1.0,
        zero: bool = False,
    ) -> None:
        self.zero = zero
        super().__init__(in_features, out_features, bias, device, dtype)
        self.mult = mult
        # Whole numbers, which no change of dtype rounds: width, base width (0: not yet set).
        self.register_buffer("width", torch.tensor([1, 0], device=device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero:
            for parameter in self.parameters():
                fill(parameter, torch.zeros_like(parameter))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        width = self.get_buffer("width").to(torch.float64)
        inverse = torch.where(width[1] > 0, width[1] / width[0], 1.0)
        return F.linear(input * (self.mult * inverse).to(input.dtype), self.weight, self.bias)


def rescale_(model: nn.Module, found: Mapping[str, Widths]) -> None:
    """Standard initialisation -> μP: W, b of readouts × √m; b of other linear maps × √(ratio of fan-in).

    Weights of hidden layers are right as PyTorch draws them, with standard deviation ∝ fan_in^{−1/2}. This
    also sets m of each :class:`MuReadout`. It is done once, before training.

    Source: as of :func:`widths`.

    Args:
        model: changed in place.
        found: of :func:`widths`.

    Raises:
        Refused: it was done before; a linear map from a growing axis to another is no MuReadout; the weight
            of a readout is shared; nothing is changed then.
    """
    modules = dict(model.named_modules())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    work: list[tuple[nn.Module, Widths]] = []
    for path, module in modules.items():
        readout = isinstance(module, MuReadout)
        if not (readout or is_linear(module) or is_convolution(module)):
            continue
        weight = module.get_parameter("weight")
        width = _width(found, names[id(weight)])
        if readout:
            if int(module.get_buffer("width")[1]):
                raise Refused("this readout is rescaled already", node=path, way_out="build the model anew")
            if owners[id(weight)] > 1:
                raise Refused(
                    "the weight of this readout is tied to another layer",
                    node=path,
                    expected="a weight of its own",
                    found=f"{owners[id(weight)]} uses",
                )
        elif width.base[0] is None and width.base[1] is not None:
            raise Refused(
                "this layer leads from an axis that grows to one that does not",
                node=path,
                expected="a MuReadout",
                found=type(module).__name__,
            )
        work.append((module, width))
    for module, width in work:
        bias = module.bias
        if isinstance(module, MuReadout):
            fill(module.weight, module.weight.detach() * math.sqrt(width.mult))
            base = width.base[1] or width.sizes[1]
            module.get_buffer("width").copy_(torch.tensor([width.sizes[1], base]))
        if isinstance(bias, nn.Parameter):
            fill(bias, bias.detach() * math.sqrt(width.ratio(1)))


def mu_normal_(
    tensor: torch.Tensor, width: Widths, std: float = 1.0, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """N(0, s²), s = std/√m for a tensor with two growing axes, std otherwise: what std is at the base
    width."""
    factor = 1 / math.sqrt(width.mult) if width.infinite == 2 else 1.0
    return fill(tensor, std * factor * normal(tensor.shape, generator))


def adam_groups(
    model: nn.Module,
    found: Mapping[str, Widths],
    lr: float,
    weight_decay: float = 0.0,
    *,
    decoupled: bool = False,
) -> list[dict[str, Any]]:
    """Groups for Adam: matrices with two growing axes have η/m and decay λ m, all other parameters η and λ.

    Source: as of :func:`widths` (table 3). torch.optim.AdamW multiplies λ by the rate, and η λ stays as it
    is.

    Args:
        model, found: as of :func:`rescale_`.
        lr, weight_decay: η and λ at the base width.
        decoupled: whether the optimizer does not multiply the decay by the rate: then λ stays.

    Raises:
        Refused: more than two axes grow.
    """
    return _groups(
        model,
        found,
        lr,
        weight_decay,
        decoupled,
        lambda width: 1 / width.mult if width.infinite == 2 else 1.0,
    )


def sgd_groups(
    model: nn.Module,
    found: Mapping[str, Widths],
    lr: float,
    weight_decay: float = 0.0,
    *,
    decoupled: bool = False,
) -> list[dict[str, Any]]:
    """Groups for SGD: η × ratio(out)/ratio(in) for matrices with two growing axes, η m with one, η with none.

    λ is divided by the same factor. Source and arguments as of :func:`adam_groups`.
    """

    def factor(width: Widths) -> float:
        if width.infinite == 2:
            return width.ratio(0) / width.ratio(1)
        return width.mult if width.infinite else 1.0

    return _groups(model, found, lr, weight_decay, decoupled, factor)


def _groups(
    model: nn.Module,
    found: Mapping[str, Widths],
    lr: float,
    weight_decay: float,
    decoupled: bool,
    factor: Callable[[Widths], float],
) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        width = _width(found, name)
        if width.infinite > 2:
            raise Refused("more than two axes grow", parameter=name, found=str(width.base))
        groups.setdefault(factor(width), []).append(parameter)
    return [
        {
            "params": group,
            "lr": lr * times,
            "weight_decay": weight_decay if decoupled else weight_decay / times,
        }
        for times, group in groups.items()
    ]


def _width(found: Mapping[str, Widths], name: str) -> Widths:
    if name not in found:
        raise BadInput("no widths are known for this parameter", parameter=name, way_out="call widths first")
    return found[name]
