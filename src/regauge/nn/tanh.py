"""Bounded maps in the place of a norm: tanh of x, or of x over its root mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from regauge import norms_regauge as core
from regauge.errors import BadInput, Refused
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.support import (
    arguments,
    moved,
    permuting,
    read,
    scaling,
    set_parameters,
    signs,
    taken,
    with_affine,
    without_gain,
)


class DyT(core.DyT, Normalisation):
    __doc__ = core.DyT.__doc__

    def fold(self) -> nn.Module:
        """tanh(a · x), then :class:`regauge.nn.Affine`."""
        self._settled()
        return with_affine(without_gain(self), self.weight, self.bias, self.axis)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """Refused: DyT has no statistic of the token."""
        raise Refused(
            "no norm becomes a DyT without another function",
            expected="a layer that divides by a statistic of the token",
            found="tanh(a · x), entry by entry",
            way_out="train it from scratch",
        )


class BHyT(core.BHyT, Normalisation):
    __doc__ = core.BHyT.__doc__

    def fold(self) -> nn.Module:
        """The layer without gain and shift, then :class:`regauge.nn.Affine`; for m of its own input."""
        self._settled()
        return with_affine(without_gain(self), self.weight, self.bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """Refused: a BHyT is close to an RMSNorm, never equal."""
        raise Refused(
            "no norm becomes a BHyT without another function",
            expected="a layer that is linear along every ray of x̂",
            found="tanh(ρ · x̂)",
            way_out="BHyT.approximate(norm, small), which is not exact",
        )

    @classmethod
    def approximate(cls, norm: nn.Module, small: float = 0.01, **options: Any) -> Self:
        """Close to an RMSNorm: λ = small · κ and g / small. NOT exact.

        The error of y[…, c] relative to itself is about small² · x̂[…, c]² / 3.

        Args:
            norm: any RMSNorm; it is left as it is.
            small: ρ = λ / κ, above zero.
            options: the further arguments of the class.

        Raises:
            Refused: ``norm`` is not an RMSNorm.
            BadInput: ``small`` is not above zero.
        """
        if not small > 0:
            raise BadInput("ρ = λ / κ must be above zero", found=str(small))
        plain = read(norm, ("rms",), cls.__name__, options)
        layer = taken(cls(plain.size, **arguments(plain), **options), plain)
        set_parameters(layer, {"lam": torch.tensor([small * layer.kappa])})
        if plain.gain is None:
            set_parameters(layer, {"weight": torch.tensor([1 / small])})
        else:
            set_parameters(layer, {"weight": plain.gain / small})
        return layer


def attention_gain(value: torch.Tensor, output: torch.Tensor, length: int, head: int) -> torch.Tensor:
    """c = ‖W_O W_V‖² / (length · size), the square of the Frobenius norm.

    Args:
        value: W_V, [value heads · head, size].
        output: W_O, [size, heads · head]; each value head serves heads / (value heads) heads in a row.
        length: tokens that are averaged.
        head: entries of one head.

    Raises:
        BadInput: the shapes do not fit.
    """
    size = output.shape[0]
    heads, held = output.shape[1] // head, value.shape[0] // head
    fits = value.shape == (held * head, size) and output.shape[1] == heads * head and held
    if not fits or heads % held or length < 1:
        raise BadInput(
            "these weights are not those of one attention layer",
            expected=f"value [k · {head}, {size}] and output [{size}, n · {head}] with n a multiple of k",
            found=f"value {list(value.shape)}, output {list(output.shape)}, length {length}",
        )
    wide = core.wide(value).unflatten(0, (held, head)).repeat_interleave(heads // held, 0).flatten(0, 1)
    return torch.linalg.matrix_norm(core.wide(output) @ wide).square() / (length * size)


class AttentionVariance(nn.Module):
    """m₂ = m₁ + c · λ₁² / κ²: the mean square behind an attention layer, estimated from that before it.

    c is :func:`attention_gain` of the weights as they are; neither c nor λ₁ gets a gradient. m₂ goes to the
    second :class:`BHyT` of a block as ``square_mean``. ``length`` is a constant, so that a token gets the
    same m₂ however the sequence is cut.

    Source: MLAI-Yonsei, BHyT. The authors compute c once, in the first call, with the length of that call,
    and do not save it: trained with the c of the first weights, a reloaded model has that of the last ones.
    ``stale`` does the same.

    Args:
        length: tokens that attention averages over; in ``stale`` mode ignored.
        head: entries of one head.
        kappa: κ.
        stale: keep the c of the first call, with the length of its m₁.
    """

    c: torch.Tensor

    def __init__(
        self, length: int, head: int, kappa: float = 10.0, stale: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.length, self.head, self.kappa, self.stale = length, head, kappa, stale
        unknown = torch.full((), torch.nan, device=device)
        self.register_buffer("c", unknown if stale else None, persistent=False)

    def forward(
        self, square_mean: torch.Tensor, lam: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """m₂ [batch, positions, 1] from m₁ [batch, positions, 1], λ₁ [1], W_V and W_O."""
        length = square_mean.shape[-2] if self.stale else self.length
        c = attention_gain(value.detach(), output.detach(), length, self.head)
        if self.stale:
            c = torch.where(torch.isnan(self.c), c.to(self.c.dtype), self.c)
            with torch.no_grad():
                self.c.copy_(c)
        return square_mean + c * (lam.detach() / self.kappa).square()


def _shrink(layer: nn.Module, s: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {"alpha": layer.get_parameter("alpha") / s}


def _same(layer: nn.Module, s: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {}


def _sign(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    sign = signs(x, random)
    held = dict(layer.named_parameters())
    values = {"bias": sign * held["bias"]} if "bias" in held else {}
    return moved(layer, values), sign * x, lambda y: sign * y


def _bare_dyt(size: int, random: torch.Generator) -> nn.Module:
    layer = DyT(size, dtype=torch.float64).eval()
    return moved(layer, {"alpha": 0.5 + torch.rand(1, generator=random, dtype=torch.float64)})


def _bare_bhyt(size: int, random: torch.Generator) -> nn.Module:
    layer = BHyT(size, dtype=torch.float64).eval()
    return moved(layer, {"lam": 2.0 + torch.rand(1, generator=random, dtype=torch.float64)})


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "dyt",
        "DyT",
        "Zhu et al., arXiv 2503.10622",
        lambda size, random: generic(DyT(size, alpha=0.9), random, 0.2),
        _bare_dyt,
        laws=(
            scaling("x → s·x, a → a / s", _shrink),
            Law("x → σ·x, b → σ·b for signs σ[c]", _sign, training=True),
            permuting("x → P·x, g → P·g, b → P·b", {"weight": 0, "bias": 0}),
        ),
    ),
    Entry(
        "bhyt",
        "BHyT",
        "MLAI-Yonsei/BHyT",
        lambda size, random: generic(BHyT(size), random),
        _bare_bhyt,
        laws=(
            scaling("x → s·x, eps → s²·eps", _same),
            Law("x → σ·x for signs σ[c]", _sign, training=True),
            permuting("x → P·x, g → P·g", {"weight": 0}),
        ),
    ),
)
