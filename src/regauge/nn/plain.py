"""LayerNorm, RMSNorm and the norm of a stream with one coordinate less."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn

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
from regauge.norms_regauge import Gained, Normed, normalise, wide


class LayerNorm(Normed, Normalisation):
    """y[…, c] = g[c] · (x[…, c] − mean(x)) / sqrt(mean((x − mean(x))²) + eps) + b[c] over the last axis.

    x, y: [..., size], any floating dtype, the same for both; statistics in float32 or better.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450).

    Args:
        size: entries of c.
        eps: added under the root.
        weight, bias: whether g and b exist.
    """

    def __init__(self, size: int, eps: float = 1e-5, *, bias: bool = True, **gained: Any) -> None:
        super().__init__(size, eps, "layer", bias=bias, **gained)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.plain(input).to(input.dtype)

    def fold(self) -> nn.Module:
        """x̂ without gain and shift, then :class:`regauge.nn.Affine`."""
        self._settled()
        return with_affine(bare_norm("layer", self.size, self.eps), self.weight, self.bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From any LayerNorm: the same parameters."""
        plain = read(norm, ("layer",), cls.__name__, options)
        return taken(cls(plain.size, **arguments(plain), **options), plain)


class RMSNorm(Gained, Normalisation):
    """y[…, c] = g[c] · x[…, c] / sqrt(mean(x²) + eps) + b[c] over the last axis.

    x, y: [..., size], any floating dtype, the same for both; statistics in float32 or better.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467): eps stands under the
    root in the authors' TensorFlow file and in most language models, outside it in their PyTorch file.

    Args:
        size: entries of c.
        eps: added under the root.
        outside: x / (sqrt(mean(x²)) + eps) instead.
        fraction: the mean is that of the first int(fraction · size) entries (the authors' pRMSNorm); all
            entries are divided by its root.
        weight, bias: whether g and b exist.

    Raises:
        ValueError: the fraction leaves no entry, or is above one.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        outside: bool = False,
        fraction: float = 1.0,
        **gained: Any,
    ) -> None:
        super().__init__(size, **gained)
        self.eps, self.outside, self.fraction = eps, outside, fraction
        self.counted = int(fraction * size)
        if not 0 < self.counted <= size:
            raise ValueError(f"the mean of {self.counted} of {size} entries")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._usual():
            return normalise(input, "rms", self.eps, self.gain(), self.bias).to(input.dtype)
        x = wide(input)
        part = x[..., : self.counted]
        if self.outside:
            # The derivative of this norm at zero is zero, that of a root of a mean is not a number.
            root = torch.linalg.vector_norm(part, dim=-1, keepdim=True) / self.counted**0.5
            y = x / (root + self.eps)
        else:
            y = x * torch.rsqrt(part.square().mean(-1, keepdim=True) + self.eps)
        return self.affine(y).to(input.dtype)

    def _usual(self) -> bool:
        """Whether it is the RMSNorm of torch."""
        return not self.outside and self.counted == self.size

    def fold(self) -> nn.Module:
        """x̂ without gain and shift, then :class:`regauge.nn.Affine`."""
        self._settled()
        bare = bare_norm("rms", self.size, self.eps) if self._usual() else without_gain(self)
        return with_affine(bare, self.weight, self.bias)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From any RMSNorm with eps under the root: the same parameters.

        Raises:
            Refused: another norm, or ``outside`` or a ``fraction``, with which the function is another.
        """
        if options.get("outside") or options.get("fraction", 1.0) != 1.0:
            raise Refused(
                "no parameters of this RMSNorm give the function of the usual one",
                expected="eps under the root and the mean of all entries",
                found="outside or fraction",
                way_out="leave these options out",
            )
        plain = read(norm, ("rms",), cls.__name__, options)
        return taken(cls(plain.size, **arguments(plain), **options), plain)


class CRMSNorm(Normalisation):
    """y[…, c] = x[…, c] / sqrt((Σ x² + (Σ x)²) / (n + 1) + eps): RMSNorm of n + 1 entries that sum to zero,
    of which the last is left out.

    x, y: [..., n], any floating dtype, the same for both; statistics in float32 or better.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers (arXiv 2305.14858, section 3).

    Args:
        size: n.
        eps: added under the root; the same number as in the LayerNorm of n + 1 entries.
    """

    def __init__(self, size: int, eps: float = 1e-5, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        del device, dtype  # no parameters; taken for the sake of the other layers
        self.size, self.eps = size, eps

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = wide(input)
        total = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
        return (x * torch.rsqrt(total / (self.size + 1) + self.eps)).to(input.dtype)

    def fold(self) -> nn.Module:
        """A copy: there is no gain."""
        self._settled()
        return copy.deepcopy(self)

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """Refused: the stream around the norm changes with it."""
        raise Refused(
            "a CRMSNorm reads a stream with one coordinate less than the norm it stands for",
            expected="a model, whose stream is narrowed with its norms",
            found=type(norm).__name__,
            way_out="regauge rewrite --move center:norm=crms",
        )

    def extra_repr(self) -> str:
        return f"size={self.size}, eps={self.eps}"


def _sign(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    sign = signs(x, random)
    bias = dict(layer.named_parameters())["bias"]
    return moved(layer, {"bias": sign * bias}), sign * x, lambda y: sign * y


def _rotate(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    """x → x R with R = M^(1/2) Q M^(−1/2), Q orthogonal and M = 1 + ones: xᵀ M x stays."""
    n = x.shape[-1]
    q = torch.linalg.qr(torch.randn((n, n), generator=random, dtype=x.dtype)).Q
    along = torch.full((n, n), 1 / n, dtype=x.dtype)
    root = torch.eye(n, dtype=x.dtype) + ((n + 1) ** 0.5 - 1) * along
    turned = torch.linalg.multi_dot((root, q, torch.linalg.inv(root)))
    return copy.deepcopy(layer), x @ turned, lambda y: torch.matmul(y, turned)


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "layernorm",
        "LayerNorm",
        "Ba et al., arXiv 1607.06450",
        lambda size, random: generic(LayerNorm(size), random),
        lambda size, random: LayerNorm(size, dtype=torch.float64).eval(),
        laws=(permuting("x → P·x, g → P·g, b → P·b", {"weight": 0, "bias": 0}),),
    ),
    Entry(
        "rmsnorm",
        "RMSNorm",
        "Zhang and Sennrich, arXiv 1910.07467",
        lambda size, random: generic(RMSNorm(size, bias=True), random),
        lambda size, random: RMSNorm(size, bias=True, dtype=torch.float64).eval(),
        laws=(
            permuting("x → P·x, g → P·g, b → P·b", {"weight": 0, "bias": 0}),
            Law("x → σ·x, b → σ·b for signs σ[c]", _sign, training=True),
        ),
    ),
    Entry(
        "crmsnorm",
        "CRMSNorm",
        "Jiang et al., arXiv 2305.14858, section 3",
        lambda size, random: generic(CRMSNorm(size), random),
        lambda size, random: CRMSNorm(size, dtype=torch.float64).eval(),
        laws=(Law("x → x·M^(1/2)·Q·M^(−1/2), Q orthogonal, M = 1 + ones", _rotate, training=True),),
    ),
)
