"""A norm whose gain depends on the token."""

from __future__ import annotations

from collections.abc import Mapping
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
    scaling,
    signs,
    taken,
    with_affine,
)


class SeeDNorm(core.SeeDNorm, Normalisation):
    __doc__ = core.SeeDNorm.__doc__

    def fold(self) -> nn.Module:
        """While α or β is zero in every head: the plain norm, then :class:`regauge.nn.Affine`.

        Raises:
            Refused: training mode, or a head with a tanh: γ and α ⊙ tanh are not one gain.
        """
        self._settled()
        heads = (self.heads, -1)
        still = [(v.detach().reshape(heads) == 0).all(1) for v in (self.alpha, self.beta)]
        if self.scale != 0 and not bool((still[0] | still[1]).all()):
            raise Refused(
                "a SeeDNorm whose α and β are not zero has a gain that depends on the token",
                parameter="alpha, beta",
                expected="α or β zero in every head",
                found=f"{int((~(still[0] | still[1])).sum())} of {self.heads} heads with both",
            )
        weight = torch.ones_like(self.alpha) if self.weight is None else self.weight
        return with_affine(bare_norm(self.form, self.size, self.eps), weight, self.bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm: its gain and shift, α = 1 and β = 0.

        β gets a gradient at once, α as soon as β is not zero.
        """
        plain = read(norm, ("rms", "layer"), cls.__name__, options)
        return taken(cls(plain.size, form=plain.form, **arguments(plain), **options), plain)


def _shrink(layer: nn.Module, s: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"beta": layer.get_parameter("beta") / s}


def _sign(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    sign = signs(x, random)
    return moved(layer, {"beta": sign * layer.get_parameter("beta")}), sign * x, lambda y: sign * y


def _both(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    values = {name: -layer.get_parameter(name) for name in ("alpha", "beta")}
    return moved(layer, values), x, lambda y: y


def _bare(size: int, random: torch.Generator) -> nn.Module:
    layer = cast(SeeDNorm, generic(SeeDNorm(size), random))
    with torch.no_grad():
        cast(nn.Parameter, layer.weight).fill_(1)
    return layer


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "seed",
        "SeeDNorm",
        "Cai et al., arXiv 2510.22777",
        lambda size, random: generic(SeeDNorm(size), random),
        _bare,
        laws=(
            scaling("x → s·x, β → β / s, eps → s²·eps", _shrink),
            Law("x → σ·x, β → σ·β for signs σ[c]", _sign, training=True),
            Law("α → −α, β → −β", _both, training=True),
            permuting("x → P·x, g → P·g, α → P·α, β → P·β", {"weight": 0, "alpha": 0, "beta": 0}),
        ),
    ),
)
