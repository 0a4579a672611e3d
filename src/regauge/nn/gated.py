"""A norm with a gate behind it, and a norm with a diagonal before it."""

from __future__ import annotations

from typing import Any, Self, cast

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
    signs,
    taken,
    with_affine,
    without_gain,
)


class GatedNorm(core.GatedNorm, Normalisation):
    __doc__ = core.GatedNorm.__doc__

    def fold(self) -> nn.Module:
        """The gain goes through the gate: D ← D · diag(g) in a layer without a gain, then
        :class:`regauge.nn.Affine` with g. Where U is zero: the plain norm, then g / 2 and b / 2.

        Raises:
            Refused: training mode, or a shift, which the gate multiplies.
        """
        self._settled()
        if not bool(self.up.detach().any()):
            gain = torch.ones_like(self.up[:, 0]) if self.weight is None else self.weight
            shift = None if self.bias is None else self.bias / 2
            return with_affine(bare_norm(self.form, self.size, self.eps), gain / 2, shift)
        if self.bias is not None and bool(self.bias.detach().any()):
            raise Refused(
                "a GatedNorm with a shift is its gate times a gain and a shift, which do not fold",
                parameter="bias",
                expected="no shift, or one of zero",
                found="a shift",
            )
        bare = without_gain(self)
        if self.weight is not None:
            with torch.no_grad():
                bare.down.mul_(self.weight)
        return with_affine(bare, self.weight, None)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm: twice its gain and shift, and U = 0, where the gate is 1/2.

        D is drawn from torch's generator; U gets a gradient at once, D as soon as U is not zero.
        """
        plain = read(norm, ("rms", "layer"), cls.__name__, options)
        return taken(cls(plain.size, form=plain.form, **arguments(plain), **options), plain, 2.0)


class PreAffine(core.PreAffine, Normalisation):
    __doc__ = core.PreAffine.__doc__

    def fold(self) -> nn.Module:
        """Where λ[c] = ±a in all c: the plain norm with eps / a², then :class:`regauge.nn.Affine`.

        Raises:
            Refused: training mode, or another λ. g ⊙ λ could go to the reader, but λ stays in the statistic.
        """
        self._settled()
        scale = self.scale.detach()
        size = scale.abs() if self.form == "rms" else scale
        level = float(size[0])
        if level == 0 or not bool((size == level).all()):
            raise Refused(
                "the diagonal of a PreAffine stays in its statistic and does not fold",
                parameter="scale",
                expected="entries of one size" + (" and sign" if self.form == "layer" else ""),
                found=f"entries from {float(scale.min()):.3g} to {float(scale.max()):.3g}",
                way_out="move the diagonal into the layers that write x",
            )
        weight = torch.sign(scale) if self.weight is None else torch.sign(scale) * self.weight
        return with_affine(bare_norm(self.form, self.size, self.eps / level**2), weight, self.bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm: its gain and shift, and λ = 1."""
        plain = read(norm, ("rms", "layer"), cls.__name__, options)
        return taken(cls(plain.size, form=plain.form, **arguments(plain), **options), plain)


def _gate_signs(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    sign = signs(x, random)
    return moved(layer, {"down": layer.get_parameter("down") * sign}), sign * x, lambda y: sign * y


def _gate_gain(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    s = _spread(x, random)
    values = {"weight": layer.get_parameter("weight") * s, "down": layer.get_parameter("down") / s}
    return moved(layer, values), x, lambda y: s * y


def _diagonal(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    s = _spread(x, random)
    return moved(layer, {"scale": layer.get_parameter("scale") * s}), x / s, lambda y: y


def _spread(x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    size = 0.5 + 2 * torch.rand(x.shape[-1:], generator=random, dtype=x.dtype)
    return size * signs(x, random)


def _ones(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        cast(nn.Parameter, layer.weight).fill_(1)
    return layer


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "gated",
        "GatedNorm",
        "arXiv 2601.22966",
        lambda size, random: generic(GatedNorm(size, rank=3), random),
        lambda size, random: _ones(generic(GatedNorm(size, rank=3), random)),
        laws=(
            Law("x → σ·x, D → D·diag(σ) for signs σ[c]", _gate_signs, training=True),
            Law("g → s·g, D → D·diag(1/s): y → s·y", _gate_gain, training=True),
            permuting("x → P·x, g → P·g, D → D·Pᵀ, U → P·U", {"weight": 0, "down": 1, "up": 0}),
        ),
    ),
    Entry(
        "preaffine",
        "PreAffine",
        "arXiv 2601.22966",
        lambda size, random: generic(PreAffine(size), random),
        lambda size, random: _ones(generic(PreAffine(size), random)),
        laws=(
            Law("x → x / s, λ → s·λ for s[c] not zero", _diagonal, training=True),
            permuting("x → P·x, g → P·g, λ → P·λ", {"weight": 0, "scale": 0}),
        ),
    ),
)
