"""PowerNorm: quadratic means over the batch in place of variances over the features."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from regauge.errors import BadInput, Refused
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.read import read_norm
from regauge.nn.statistics import hold, kept, position_mean, randomise, upcast


class GroupScaling(nn.Module):
    """u[..., g, i] = x[..., g, i] / sqrt(mean_i x[..., g, i]² + eps), the last axis cut into groups g.

    Args:
        groups: how many equal parts the last axis has.
        eps: added to the mean.
    """

    def __init__(self, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = upcast(input).unflatten(-1, (self.groups, -1))
        return functional.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2).to(input.dtype)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}"


class _Power(torch.autograd.Function):
    """z = u / sqrt(used + eps), with the gradient of the paper in place of the exact one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        u: torch.Tensor,
        used: torch.Tensor,
        batch: torch.Tensor,
        nu: torch.Tensor,
        eps: float,
        momentum: float,
        local: bool,
    ) -> torch.Tensor:
        z = u / torch.sqrt(used + eps)
        ctx.save_for_backward(z, batch)
        # Not a saved tensor: it changes in place, and must be read as it is when the gradient arrives.
        ctx.nu, ctx.eps, ctx.momentum, ctx.local = nu, eps, momentum, local
        return z

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        z, batch = ctx.saved_tensors
        g = gradient - (1 - ctx.momentum) * ctx.nu * z
        with torch.no_grad():
            ctx.nu.add_(position_mean(g * z, local=ctx.local)[0])
        return g / torch.sqrt(batch + ctx.eps), None, None, None, None, None, None


class PowerNorm(Normalisation):
    """y[..., c] = w[c] · u[..., c] / sqrt(s[c] + eps) + b[c], u = GroupScaling(x).

    m[c] is the mean of u² over all positions that are not padding, t counts the training steps from 1.

    * Training: s = m while t ≤ warmup, then s = φ as it was before the step. φ ← ((t−1)·φ + m) / t while
      t < warmup, and in every step, after that, φ ← a·φ + (1−a)·m.
    * Evaluation: s = φ.
    * Gradient, of the paper and not of the formula above: with g = w·∂y and h = g − (1−a')·ν·z, z = (y−b)/w,
      ∂u = h / sqrt(m + eps), and ν ← ν + mean of h·z over all positions, padding too.

    φ and m are those of all processes where ``torch.distributed`` is running, and so is ν.

    Args:
        size: entries of c, the last axis of x. A batch is x [..., size], such as [positions, batch, size].
        groups: of GroupScaling; the authors use the number of heads.
        eps: added under both roots.
        momentum: a of φ.
        gradient_momentum: a' of ν.
        warmup: steps that use the batch itself.
        synchronize: take statistics over all processes.

    Statistics are float32 at least; the output has the dtype of the input.

    Raises:
        BadInput: groups do not divide size, or a padding mask has another shape than x without c.

    Source: Shen et al., PowerNorm: Rethinking Batch Normalization in Transformers (2020), section 4. Backward
    and warm-up are those of the authors' code: it divides by the running mean forward and by that of the
    batch backward.
    """

    running_phi: torch.Tensor
    ema_gz: torch.Tensor
    iters: torch.Tensor

    def __init__(
        self,
        size: int,
        groups: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.9,
        gradient_momentum: float = 0.9,
        warmup: int = 10000,
        *,
        synchronize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or size % groups:
            raise BadInput("groups must divide size", expected=f"a divisor of {size}", found=f"{groups}")
        self.size, self.groups, self.eps, self.warmup = size, groups, eps, warmup
        self.momentum, self.gradient_momentum, self.synchronize = momentum, gradient_momentum, synchronize
        self.scaling = GroupScaling(groups, eps)
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_phi", torch.ones(size, device=device, dtype=dtype))
        self.register_buffer("ema_gz", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("iters", torch.zeros((), device=device, dtype=torch.long))

    def forward(self, input: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """y for x = ``input``; ``pad_mask``, the shape of x without c, is true at padding."""
        u = self.scaling(upcast(input))
        if not self.training:
            gain = self.weight / torch.sqrt(self.running_phi.to(u.dtype) + self.eps)
            return (u * gain + self.bias).to(input.dtype)
        with torch.no_grad():
            mean = position_mean(u * u, kept(u, pad_mask), local=not self.synchronize)[0]
            used = hold(self._step(mean))
        z = _Power.apply(u, used, mean, self.ema_gz, self.eps, self.gradient_momentum, not self.synchronize)
        return (self.weight * z + self.bias).to(input.dtype)  # type: ignore[operator]

    def _step(self, mean: torch.Tensor) -> torch.Tensor:
        """Advance φ by the mean of this batch; the s of this step."""
        self.iters.add_(1)
        phi = self.running_phi.to(mean.dtype)
        used = torch.where(self.iters <= self.warmup, mean, phi)
        average = ((self.iters - 1) * phi + mean) / self.iters
        phi = torch.where(self.iters < self.warmup, average, phi)
        self.running_phi.copy_(self.momentum * phi + (1 - self.momentum) * mean)
        return used

    def fold(self) -> nn.Module:
        """``Sequential(GroupScaling, Affine)``, g = w / sqrt(φ + eps); an RMSNorm first where there is one
        group.

        GroupScaling depends on every token and stays.

        Raises:
            Refused: in training mode.
        """
        self._settled()
        gain = self.weight / torch.sqrt(self.running_phi + self.eps)
        first = nn.RMSNorm(self.size, self.eps, elementwise_affine=False)
        scaling = first if self.groups == 1 else GroupScaling(self.groups, self.eps)
        return nn.Sequential(scaling, Affine(gain, self.bias)).eval()

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From an RMSNorm in evaluation mode: one group, w = gain, b = 0, φ = 1 − eps, so φ + eps = 1.

        In training mode PowerNorm also divides by the mean over the batch, which no RMSNorm does; φ then
        moves to what the data give.

        Raises:
            Refused: another kind of norm, more than one group, or training mode.
        """
        plain = read_norm(norm).need(("rms",), cls.__name__, shift=False)
        groups = options.pop("groups", 1)
        if groups != 1 or options.get("eps", plain.eps) != plain.eps:
            raise Refused(
                "an RMSNorm is a PowerNorm of one group with the same eps",
                expected=f"groups=1, eps={plain.eps}",
                found=f"groups={groups}, eps={options.get('eps', plain.eps)}",
            )
        if plain.training:
            raise Refused(
                "an RMSNorm is a PowerNorm in evaluation mode only",
                expected="evaluation mode",
                found="training mode, in which PowerNorm divides by the mean over the batch",
                way_out="call eval() before it",
            )
        options["eps"] = plain.eps
        layer = cls(plain.size, 1, device=plain.like.device, dtype=plain.like.dtype, **options)
        with torch.no_grad():
            if plain.gain is not None:
                layer.weight.copy_(plain.gain)
            layer.running_phi.fill_(1 - plain.eps)
        return layer.eval()

    def extra_repr(self) -> str:
        return f"{self.size}, groups={self.groups}, eps={self.eps}, warmup={self.warmup}"


def _bare(size: int, random: torch.Generator) -> nn.Module:
    layer = PowerNorm(size, groups=1 if size % 2 else 2).to(torch.float64).eval()
    randomise(layer.running_phi, random)
    return layer


def _make(size: int, random: torch.Generator) -> nn.Module:
    return generic(_bare(size, random), random)


def _rescale(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    new = copy.deepcopy(layer)
    assert isinstance(new, PowerNorm)
    scale = 0.5 + torch.rand(new.size, generator=random, dtype=torch.float64)
    with torch.no_grad():
        new.weight.mul_(scale)
        new.running_phi.copy_(scale**2 * (new.running_phi + new.eps) - new.eps)
    return new, x, lambda y: y


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "powernorm",
        "PowerNorm",
        "Shen et al. 2020, section 4",
        _make,
        _bare,
        laws=(Law("w → s·w, φ + eps → s²·(φ + eps)", _rescale),),
    ),
)
