"""Steps that several layers share: folding a gain out, taking over the parameters of a norm, moving them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from regauge.nn.affine import Affine
from regauge.nn.base import PlainNorm
from regauge.nn.entry import Law, Moved
from regauge.nn.read import read_norm

Layer = TypeVar("Layer", bound=nn.Module)


def bare_norm(form: str, size: int, eps: float) -> nn.Module:
    """The plain norm of this form, ``layer`` or ``rms``, without gain and shift, in evaluation mode."""
    kind = nn.LayerNorm if form == "layer" else nn.RMSNorm
    return kind(size, eps=eps, elementwise_affine=False).eval()


def with_affine(
    bare: nn.Module, weight: torch.Tensor | None, bias: torch.Tensor | None, axis: int = -1
) -> nn.Module:
    """y = weight ⊙ bare(x) + bias; ``bare`` itself where both are None."""
    if weight is None and bias is None:
        return bare
    return nn.Sequential(bare, Affine(weight, bias, axis)).eval()


def without_gain(layer: Layer) -> Layer:
    """A copy without its ``weight`` and ``bias``."""
    bare: Any = copy.deepcopy(layer)
    bare.weight = bare.bias = None
    return bare


def read(norm: nn.Module, forms: tuple[str, ...], target: str, options: dict[str, Any]) -> PlainNorm:
    """What ``norm`` is, if it has one of these forms; takes ``size`` out of the options.

    Raises:
        Refused: it is another, or none.
    """
    return read_norm(norm, options.pop("size", None)).need(forms, target)


def arguments(plain: PlainNorm) -> dict[str, Any]:
    """What a layer is built with in the place of this norm: eps, bias, device, dtype."""
    return {
        "eps": plain.eps,
        "bias": plain.shift is not None,
        "device": plain.like.device,
        "dtype": plain.like.dtype,
    }


def taken(layer: Layer, plain: PlainNorm, factor: float = 1.0) -> Layer:
    """The layer with ``weight`` = factor · gain and ``bias`` = factor · shift, in the mode of the norm."""
    values = {"weight": torch.ones(plain.size) if plain.gain is None else plain.gain, "bias": plain.shift}
    set_parameters(layer, {key: factor * value for key, value in values.items() if value is not None})
    return layer.train(plain.training)


def set_parameters(layer: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values, cast to the dtype of the parameters, into parameters of these names."""
    with torch.no_grad():
        for name, value in values.items():
            layer.get_parameter(name).copy_(value.expand_as(layer.get_parameter(name)))


def moved(layer: Layer, values: Mapping[str, torch.Tensor]) -> Layer:
    """A copy with other values of some parameters."""
    other = copy.deepcopy(layer)
    set_parameters(other, values)
    return other


def permuting(text: str, names: Mapping[str, int]) -> Law:
    """The law of permuting the channels of x, of y, and of these parameters (name: axis) alike."""

    def act(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
        order = torch.randperm(x.shape[-1], generator=random)
        held = dict(layer.named_parameters())
        values = {name: held[name].index_select(axis, order) for name, axis in names.items() if name in held}
        return moved(layer, values), x[..., order], lambda y: y[..., order]

    return Law(text, act, training=True)


def scaling(text: str, values: Callable[[nn.Module, torch.Tensor], Mapping[str, torch.Tensor]]) -> Law:
    """The law of x → s · x with parameters changed as ``values(layer, s)`` says, s one number above zero.

    eps, where the layer has it, becomes s² · eps; y stays.
    """

    def act(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
        s = 0.5 + 2 * torch.rand((), generator=random, dtype=x.dtype)
        other = moved(layer, values(layer, s))
        settings: dict[str, Any] = vars(other)
        if "eps" in settings:
            settings["eps"] *= float(s) ** 2
        return other, s * x, lambda y: y

    return Law(text, act, training=True)


def signs(x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """±1 for each channel of x."""
    return (2 * torch.randint(0, 2, x.shape[-1:], generator=random) - 1).to(x.dtype)
