"""Norms and linear maps whose scale vectors are written in another way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from regauge import norms_regauge as core
from regauge.errors import Refused
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.support import (
    arguments,
    bare_norm,
    moved,
    permuting,
    read,
    scaling,
    set_parameters,
    taken,
    with_affine,
)


class ScaledNorm(core.ScaledNorm, Normalisation):
    __doc__ = core.ScaledNorm.__doc__

    def fold(self) -> nn.Module:
        """The plain norm, then :class:`regauge.nn.Affine` with scale · g and scale · b."""
        self._settled()
        like = torch.ones(self.size) if self.bias is None else torch.ones_like(self.bias)
        weight = like if self.weight is None else self.weight
        bias = None if self.bias is None else self.scale * self.bias
        return with_affine(bare_norm(self.form, self.size, self.eps), self.scale * weight, bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm: its gain and shift divided by ``scale``.

        LayerNorm Scaling: with scale = 1/√ℓ they are multiplied by √ℓ.
        """
        plain = read(norm, ("rms", "layer"), cls.__name__, options)
        layer = cls(plain.size, form=plain.form, **arguments(plain), **options)
        return taken(layer, plain, 1 / layer.scale)


class MagnitudeNorm(core.MagnitudeNorm, Normalisation):
    __doc__ = core.MagnitudeNorm.__doc__

    def fold(self) -> nn.Module:
        """The plain norm, then :class:`regauge.nn.Affine` with m · v / ‖v‖ and b."""
        self._settled()
        gain = self.gain().to(self.direction.dtype)
        return with_affine(bare_norm(self.form, self.size, self.eps), gain, self.bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm: m = ‖g‖ and v = g; where g is zero, m = 0 and v = 1."""
        plain = read(norm, ("rms", "layer"), cls.__name__, options)
        layer = cls(plain.size, form=plain.form, **arguments(plain), **options)
        gain = torch.ones_like(layer.direction) if plain.gain is None else plain.gain
        length = torch.linalg.vector_norm(core.wide(gain))
        values = {"magnitude": length, "direction": gain if float(length) > 0 else torch.ones_like(gain)}
        set_parameters(layer, values if plain.shift is None else {**values, "bias": plain.shift})
        return layer.train(plain.training)


class BranchedNorm(core.BranchedNorm, Normalisation):
    __doc__ = core.BranchedNorm.__doc__

    def branch(self, index: int) -> nn.Module:
        """What one reader gets: the plain norm, then :class:`regauge.nn.Affine` with g[k] and b[k].

        Raises:
            Refused: training mode.
        """
        self._settled()
        bias = None if self.bias is None else self.bias[index]
        weight = self.weight[index]
        return with_affine(bare_norm(self.form, self.size, self.eps), weight, bias)

    def fold(self) -> nn.Module:
        """Refused: every reader has a gain of its own, see :meth:`branch`."""
        raise Refused(
            "a norm with several outputs does not collapse to one layer",
            expected="one reader",
            found=f"{self.branches} branches",
            way_out="fold them one by one: branch(k)",
        )

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm: its gain and shift in every branch."""
        plain = read(norm, ("rms", "layer"), cls.__name__, options)
        return taken(cls(plain.size, form=plain.form, **arguments(plain), **options), plain)


class ScaledLinear(core.ScaledLinear):
    __doc__ = core.ScaledLinear.__doc__

    def fold(self) -> nn.Linear:
        """The same map as one matrix: W[o, i] ← η[o] W[o, i] γ[i]."""
        outputs, inputs = self.weight.shape
        here = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear = nn.Linear(inputs, outputs, self.bias is not None, **here)
        set_parameters(linear, {"weight": self.outside[:, None] * self.weight * self.inside})
        if self.bias is not None:
            set_parameters(linear, {"bias": self.bias})
        return linear

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Self:
        """The map y = W x + b for W [outputs, inputs] and b [outputs], with η = 1 and γ = 1."""
        outputs, inputs = weight.shape
        layer = cls(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
        set_parameters(layer, {"weight": weight.detach()})
        if bias is not None:
            set_parameters(layer, {"bias": bias.detach()})
        return layer


def _lengthen(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    s = 0.5 + 2 * torch.rand((), generator=random, dtype=x.dtype)
    return moved(layer, {"direction": s * layer.get_parameter("direction")}), x, lambda y: y


def _opposite(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    values = {name: -layer.get_parameter(name) for name in ("magnitude", "direction")}
    return moved(layer, values), x, lambda y: y


def _same(layer: nn.Module, s: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {}


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "scaled",
        "LayerNorm Scaling",
        "Sun et al., The Curse of Depth in Large Language Models",
        lambda size, random: generic(ScaledNorm(size, scale=3**-0.5), random),
        lambda size, random: ScaledNorm(size, scale=3**-0.5, dtype=torch.float64).eval(),
        laws=(
            scaling("x → s·x, eps → s²·eps", _same),
            permuting("x → P·x, g → P·g", {"weight": 0}),
        ),
    ),
    Entry(
        "magnitude",
        "magnitude and direction of the gain",
        "arXiv 2605.26895",
        lambda size, random: generic(MagnitudeNorm(size), random),
        lambda size, random: MagnitudeNorm(size, dtype=torch.float64).eval(),
        laws=(
            Law("v → s·v, s > 0", _lengthen, training=True),
            Law("m → −m, v → −v", _opposite, training=True),
            permuting("x → P·x, v → P·v", {"direction": 0}),
        ),
    ),
)
