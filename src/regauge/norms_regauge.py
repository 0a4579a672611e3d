"""Normalisation layers of the literature that existing norms can become, or that stand in their place.

regauge writes a copy of this file beside a checkpoint whose norms it has replaced, so that the checkpoint can
be loaded without regauge. The file needs torch and nothing else.

Throughout, x and y are [..., c] with ``size`` entries of c, and x̂ is x normalised over c:

======== ============================================================
form     x̂[…, c]
======== ============================================================
rms      x[…, c] / sqrt(mean(x²) + eps)
layer    (x[…, c] − mean(x)) / sqrt(mean((x − mean(x))²) + eps)
======== ============================================================

g and b stand for a gain and a shift [size], ``weight`` and ``bias``, which start at one and zero. Statistics
are computed in float32 or better; y has the dtype of x. An argument out of range is a ValueError.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32 or better."""
    return _cast(x, torch.promote_types(x.dtype, torch.float32))


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in this dtype, without an operation where it has it."""
    return x if x.dtype == dtype else x.to(dtype)


def normalise(
    x: torch.Tensor,
    form: str,
    eps: float,
    gain: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """g ⊙ x̂ + b as one operation of torch, and one addition where an RMSNorm has a shift.

    Torch computes its statistics in float32 or better whatever the dtype of x, and rounds at the end. It is
    given x in float32 or better where another operation follows, or where g or b has another dtype than x.
    """
    dtype = x.dtype
    others = (gain is not None and gain.dtype != dtype) or (shift is not None and shift.dtype != dtype)
    if others or (form == "rms" and shift is not None):
        for held in (torch.float32, gain, shift):
            if held is not None:
                dtype = torch.promote_types(dtype, held if isinstance(held, torch.dtype) else held.dtype)
        x = _cast(x, dtype)
        gain = None if gain is None else _cast(gain, dtype)
        shift = None if shift is None else _cast(shift, dtype)
    if form == "layer":
        return functional.layer_norm(x, x.shape[-1:], gain, shift, eps)
    y = functional.rms_norm(x, x.shape[-1:], gain, eps)
    return y if shift is None else y + shift


class Gained(nn.Module):
    """What has a gain and a shift: y ← g ⊙ y + b along the last axis.

    Args:
        size: entries of that axis.
        weight, bias: whether g and b exist.
        offset: g is ``offset`` + ``weight``, which starts at 1 − offset.
    """

    def __init__(
        self,
        size: int,
        weight: bool = True,
        bias: bool = False,
        offset: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.size, self.offset = size, offset
        start = torch.full((size,), 1.0 - offset, device=device, dtype=dtype)
        self.weight = nn.Parameter(start) if weight else None
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None

    def gain(self) -> torch.Tensor | None:
        """g, [size]; None without one."""
        return self.weight if self.weight is None or not self.offset else wide(self.weight) + self.offset

    def affine(self, y: torch.Tensor) -> torch.Tensor:
        g = self.gain()
        y = y if g is None else y * g
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Every plain setting of the layer and the names of g and b."""
        plain = {key: value for key, value in vars(self).items() if type(value) in (int, float, str)}
        has = [name for name in ("weight", "bias") if getattr(self, name) is not None]
        return ", ".join([*(f"{key}={value}" for key, value in plain.items()), *has])


class Normed(Gained):
    """What has an x̂.

    Args:
        size: entries of c.
        eps: added under the root.
        form: row of the table, ``rms`` or ``layer``.
        weight, bias: whether g and b exist.
    """

    def __init__(self, size: int, eps: float = 1e-6, form: str = "rms", **gained: Any) -> None:
        super().__init__(size, **gained)
        if form not in ("layer", "rms"):
            raise ValueError(f"unknown form of norm: {form}")
        self.eps, self.form = eps, form

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """x̂, in float32 or better."""
        return normalise(wide(x), self.form, self.eps)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """g ⊙ x̂ + b, in the dtype of x or a wider one."""
        return normalise(x, self.form, self.eps, self.gain(), self.bias)


class SeeDNorm(Normed):
    """y[…, c] = (g[c] + α[c] · tanh(scale · Σ_{j in head of c} x[…, j] β[j])) · x̂[…, c] + b[c].

    The entries of x are cut into ``heads`` slices of equal length, each with a tanh of its own. ``rescale`` α
    starts at one and ``probe`` β at zero, where the layer is its plain norm and α gets no gradient.

    Source: Cai et al., SeeDNorm: Self-Rescaled Dynamic Normalization (arXiv 2510.22777). For language models:
    heads 1, scale 1, no dropout. For vision: several heads (16 of ViT-B), dropout, and the product of α and β
    divided by the dimension, which is read here as a factor inside the tanh: scale 1 / size.

    Args:
        size, eps, plain: as for :class:`Normed`.
        heads: slices; must divide ``size``.
        scale: constant factor of the sum.
        dropout: probability with which an entry of the dynamic term is zero in training.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        heads: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **plain: Any,
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype, **plain)
        if heads < 1 or size % heads:
            raise ValueError(f"{heads} heads do not divide {size} entries")
        if not 0 <= dropout < 1:
            raise ValueError(f"a probability of dropout of {dropout}")
        self.heads, self.scale, self.dropout = heads, scale, dropout
        self.rescale = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.probe = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        heads = (self.heads, self.size // self.heads)
        sums = (wide(input) * self.probe).unflatten(-1, heads).sum(-1, keepdim=True)
        gain = (torch.tanh(self.scale * sums) * self.rescale.unflatten(0, heads)).flatten(-2)
        gain = functional.dropout(gain, self.dropout, self.training)
        g = self.gain()
        y = (gain + (1.0 if g is None else g)) * self.normalised(input)
        return (y if self.bias is None else y + self.bias).to(input.dtype)


class GatedNorm(Normed):
    """y[…, c] = z[…, c] · sigmoid(Σ_r U[c, r] silu(Σ_j D[r, j] z[…, j])) with z = g ⊙ x̂ + b and r < rank.

    ``up`` U [size, rank] starts at zero, where the gate is 1/2 and ``down`` D [rank, size] gets no gradient;
    D starts as N(0, 1 / size).

    Source: arXiv 2601.22966 (outlier-driven rescaling), GatedNorm; rank 16.

    Args:
        size, eps, plain: as for :class:`Normed`.
        rank: entries of r.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        rank: int = 16,
        device: Any = None,
        dtype: Any = None,
        **plain: Any,
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype, **plain)
        if rank < 1:
            raise ValueError(f"a rank of {rank}")
        self.rank = rank
        self.down = nn.Parameter(torch.empty((rank, size), device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros((size, rank), device=device, dtype=dtype))
        nn.init.normal_(self.down, std=size**-0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        z = self.plain(wide(input))
        inner = functional.silu(functional.linear(z.to(self.down.dtype), self.down))
        return (torch.sigmoid(wide(functional.linear(inner, self.up))) * z).to(input.dtype)


class PreAffine(Normed):
    """y[…, c] = g[c] · ẑ[…, c] + b[c] with z[…, c] = λ[c] · x[…, c]; ẑ is z normalised.

    ``scale`` λ [size] starts at one.

    Source: arXiv 2601.22966 (outlier-driven rescaling), PreAffine.
    """

    def __init__(
        self, size: int, eps: float = 1e-6, *, device: Any = None, dtype: Any = None, **plain: Any
    ) -> None:
        super().__init__(size, eps, device=device, dtype=dtype, **plain)
        self.scale = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.plain(wide(input) * self.scale).to(input.dtype)


class ScaledNorm(Normed):
    """y[…, c] = scale · (g[c] · x̂[…, c] + b[c]) with a constant ``scale``.

    Source: LayerNorm Scaling, Sun et al., The Curse of Depth in Large Language Models; scale 1/√ℓ in layer
    ℓ = 1, 2, ….
    """

    def __init__(self, size: int, eps: float = 1e-6, *, scale: float = 1.0, **plain: Any) -> None:
        super().__init__(size, eps, **plain)
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"a scale of {scale}")
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (self.plain(wide(input)) * self.scale).to(input.dtype)


class MagnitudeNorm(Normed):
    """y[…, c] = m · v[c] / ‖v‖ · x̂[…, c] + b[c].

    ``magnitude`` m [1] starts at √size and ``direction`` v [size] at ones, so that the gain starts at one.

    Source: arXiv 2605.26895 (scale vectors), magnitude and direction; the factor √size is chosen here.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        **plain: Any,
    ) -> None:
        super().__init__(size, eps, weight=False, bias=bias, device=device, dtype=dtype, **plain)
        self.magnitude = nn.Parameter(torch.full((1,), size**0.5, device=device, dtype=dtype))
        self.direction = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def gain(self) -> torch.Tensor:
        """m · v / ‖v‖, [size]."""
        v = wide(self.direction)
        return self.magnitude * (v / torch.linalg.vector_norm(v))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.plain(input).to(input.dtype)


class BranchedNorm(Normed):
    """y_k[…, c] = g[k, c] · x̂[…, c] + b[k, c] for each branch k: a tuple, one entry for each reader of x.

    Source: arXiv 2605.26895 (scale vectors), one vector for each projection (q, k, v; gate, up).
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        branches: int = 3,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        **plain: Any,
    ) -> None:
        super().__init__(size, eps, weight=False, device=device, dtype=dtype, **plain)
        if branches < 1:
            raise ValueError(f"{branches} branches")
        self.branches = branches
        self.weight = nn.Parameter(torch.ones((branches, size), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((branches, size), device=device, dtype=dtype)) if bias else None

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.affine(self.normalised(input).unsqueeze(-2)).to(input.dtype).unbind(-2)


class ScaledLinear(nn.Module):
    """y[…, o] = η[o] · Σ_i W[o, i] γ[i] x[…, i] + b[o]; ``outside`` η and ``inside`` γ start at one.

    W is stored [out, in], or [in, out] if ``transposed``.

    Source: arXiv 2605.26895 (scale vectors), vectors on both sides of a linear map.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = True,
        transposed: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.outside = nn.Parameter(torch.ones(outputs, device=device, dtype=dtype))
        self.inside = nn.Parameter(torch.ones(inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        y = functional.linear((input * self.inside).to(weight.dtype), weight) * self.outside
        return (y if self.bias is None else y + self.bias).to(input.dtype)

    def extra_repr(self) -> str:
        transposed = ", transposed" if self.transposed else ""
        return f"{len(self.inside)}, {len(self.outside)}, bias={self.bias is not None}{transposed}"


class DyT(Gained):
    """y[…, c, …] = g[c] · tanh(a · x[…, c, …]) + b[c]; ``alpha`` a [1] is one number for all c.

    Source: Zhu et al., Transformers without Normalization (arXiv 2503.10622). Language models have no b and
    start at other a, by width and place.

    Args:
        size: entries of c.
        alpha: a at the start.
        axis: of x that c counts: -1 for tokens, 1 for images [batch, c, height, width].
        weight, bias: whether g and b exist.
    """

    def __init__(
        self,
        size: int,
        alpha: float = 0.5,
        *,
        axis: int = -1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **gained: Any,
    ) -> None:
        super().__init__(size, bias=bias, device=device, dtype=dtype, **gained)
        if axis not in (-1, 1):
            raise ValueError(f"axis {axis}")
        self.axis = axis
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = wide(input) if self.axis == -1 else wide(input).movedim(1, -1)
        y = self.affine(torch.tanh(self.alpha * x)).to(input.dtype)
        return y if self.axis == -1 else y.movedim(-1, 1)


class BHyT(Gained):
    """y[…, c] = g[c] · tanh(λ / κ · x[…, c] / sqrt(m + eps)) with m = mean_c x[…, c]² or as given.

    Source: MLAI-Yonsei, BHyT (bounded hyperbolic tanh), exact form; m is given where it is estimated from
    that of another place, see :class:`regauge.nn.tanh.AttentionVariance`.

    Args:
        size: entries of c.
        eps: added under the root.
        lam: λ at the start, ``lam`` [1].
        kappa: κ, a constant.
        weight, bias: whether g and a shift exist.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        *,
        lam: float = 2.0,
        kappa: float = 10.0,
        device: Any = None,
        dtype: Any = None,
        **gained: Any,
    ) -> None:
        super().__init__(size, device=device, dtype=dtype, **gained)
        if not kappa > 0:
            raise ValueError(f"a kappa of {kappa}")
        self.eps, self.kappa = eps, kappa
        self.lam = nn.Parameter(torch.full((1,), lam, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor, square_mean: torch.Tensor | None = None) -> torch.Tensor:
        x = wide(input)
        m = x.square().mean(-1, keepdim=True) if square_mean is None else square_mean
        inverse = self.lam / self.kappa * torch.rsqrt(m + self.eps)
        return self.affine(torch.tanh(x * inverse)).to(input.dtype)


MODULES: dict[str, Any] = {
    "seed-norm": SeeDNorm,
    "gated-norm": GatedNorm,
    "pre-affine-norm": PreAffine,
    "scaled-norm": ScaledNorm,
    "magnitude-norm": MagnitudeNorm,
    "scaled-linear": ScaledLinear,
}
"""Name in a patch -> what it stands for."""
