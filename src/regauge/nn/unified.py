"""Unified Normalization: quadratic means smoothed over the last batches, with a filter for outlying ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.statistics import hold, kept, position_mean, randomise, upcast

RATIO_AFTER = 1000
"""Steps before which r is 1."""
RATIO_LIMIT = 5.0
"""r is kept within [1 / RATIO_LIMIT, RATIO_LIMIT]."""


class _Unified(torch.autograd.Function):
    """w · x / sqrt(v + eps), with the gradient of the paper in place of the exact one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        v: torch.Tensor,
        ratio: torch.Tensor,
        step: torch.Tensor,
        skip: torch.Tensor,
        owner: UnifiedNorm,
    ) -> torch.Tensor:
        z = x / torch.sqrt(v + owner.eps)
        ctx.save_for_backward(z, weight, v, ratio, step, skip)
        # The running moments of the gradient change in place, and are read as they are when it arrives.
        ctx.nu, ctx.window = owner.ema_gz, owner.buffer_gz
        ctx.settings = owner.eps, owner.momentum, owner.warmup, not owner.synchronize
        return weight * z

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        z, weight, v, ratio, step, skip = ctx.saved_tensors
        eps, momentum, warmup, local = ctx.settings
        # r and w belong to channels, so Σ r·∂y·z and the mean of r·w·∂y·z are factors times the same sum.
        product = gradient * z
        of_weight = ratio * product.reshape(-1, z.shape[-1]).sum(0)
        with torch.no_grad():
            c = ratio * weight * position_mean(product, local=local)[0]
            nu, window = ctx.nu.to(c.dtype), ctx.window.to(c.dtype)
            size = window.shape[0]
            here = (torch.arange(size, device=c.device) == step % size).unsqueeze(-1)
            window = torch.where(here, torch.where(skip, nu, c), window)
            ctx.window.copy_(window)
            smooth = torch.where((step <= size) | (step < warmup) | skip, c, window.mean(0))
            new = momentum * nu + (1 - momentum) * smooth
            ctx.nu.copy_(new)
            kappa = torch.where(skip, smooth, new)
        inverse = 1 / torch.sqrt(v + eps)
        of_x = gradient * (ratio * weight * inverse) - z * (kappa * inverse)
        return of_x, of_weight, None, None, None, None, None


class UnifiedNorm(Normalisation):
    """y[..., c] = w[c] · x[..., c] / sqrt(v[c] + eps) + b[c], no mean taken off.

    m[c] is the mean of x² over all positions that are not padding; Q holds the last m, one row a step; V is
    the running v; t counts the training steps from 1.

    * Training: v = m while t ≤ window or t < warmup, then the geometric mean of Q over its rows.
      V ← a·V + (1−a)·v.
    * Filter, from t ≥ warmup: where for any channel the arithmetic mean of Q exceeds the geometric one by
      more than window · s, s the variance of all entries of sqrt(Q) before the step, the row of Q becomes V,
      v = m, and ``skip_counter`` grows.
    * Evaluation: v = V.
    * Gradient, of the paper and not of the formula above: with z = x / sqrt(v + eps), g = r·w·∂y and c the
      mean of g·z over all positions, ∂x = (g − κ·z) / sqrt(v + eps), ∂w = Σ r·∂y·z, ∂b = Σ ∂y. κ is ν ← a·ν +
      (1−a)·(mean of the last c), or c itself in a skipped step. r = sqrt((v + eps) / (V + eps)), V before the
      step, within [1/5, 5], after max(1000, warmup) steps; 1 before, and in a skipped step.

    Statistics are those of all processes where ``torch.distributed`` is running.

    Args:
        size: entries of c, the last axis of x. A batch is x [..., size], such as [batch, positions, size].
        window: steps smoothed over, forward and backward, or one number for both.
        warmup: steps that use the batch itself.
        filtered: whether outlying batches are skipped; the authors do so in vision, not in language.
        eps: added under the roots.
        momentum: a.
        synchronize: take statistics over all processes.

    Statistics are float32 at least; the output has the dtype of the input. The filter waits until the window
    is full, as an empty row has a geometric mean of 0.

    Raises:
        BadInput: a window below 1, or a padding mask of another shape than x without c.

    Source: Yang et al., Unified Normalization for Accelerating and Stabilizing Transformers (2022), section
        3,
    and the authors' code, which multiplies the gradient by r and not the output.
    """

    running_var: torch.Tensor
    ema_gz: torch.Tensor
    buffer_x2: torch.Tensor
    buffer_gz: torch.Tensor
    iters: torch.Tensor
    skip_counter: torch.Tensor

    def __init__(
        self,
        size: int,
        window: int | tuple[int, int] = 4,
        warmup: int = 4000,
        filtered: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        *,
        synchronize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        forward, backward = (window, window) if isinstance(window, int) else window
        if min(forward, backward) < 1:
            raise BadInput("a window has at least one step", expected="1 or more", found=f"{window}")
        self.size, self.window, self.warmup, self.filtered = size, forward, warmup, filtered
        self.eps, self.momentum, self.synchronize = eps, momentum, synchronize
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(size, device=device, dtype=dtype))
        self.register_buffer("ema_gz", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("buffer_x2", torch.zeros(forward, size, device=device, dtype=dtype))
        self.register_buffer("buffer_gz", torch.zeros(backward, size, device=device, dtype=dtype))
        self.register_buffer("iters", torch.zeros((), device=device, dtype=torch.long))
        self.register_buffer("skip_counter", torch.zeros((), device=device, dtype=torch.long))

    def forward(self, input: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """y for x = ``input``; ``pad_mask``, the shape of x without c, is true at padding."""
        x = upcast(input)
        if not self.training:
            product = x * (self.weight / torch.sqrt(self.running_var.to(x.dtype) + self.eps))
        else:
            with torch.no_grad():
                mean = position_mean(x * x, kept(x, pad_mask), local=not self.synchronize)[0]
                v, ratio, skip = map(hold, self._step(mean))
                step = hold(self.iters)
            product = _Unified.apply(x, self.weight.to(x.dtype), v, ratio, step, skip, self)
        return (product + self.bias).to(input.dtype)  # type: ignore[operator]

    def _step(self, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advance the window and V by the mean of this batch; v, r and whether the step is skipped."""
        self.iters.add_(1)
        step, running, window = self.iters, self.running_var.to(mean.dtype), self.buffer_x2.to(mean.dtype)
        here = (torch.arange(self.window, device=mean.device) == step % self.window).unsqueeze(-1)
        spread = torch.sqrt(window).flatten()
        window = torch.where(here, mean, window)
        skip = torch.full((), self.window == 1, device=mean.device)
        if self.filtered and spread.numel() > 1:
            gap = window.mean(0) - torch.exp(torch.log(window).mean(0))
            judged = (step >= self.warmup) & (step >= self.window)
            outlier = judged & (gap > spread.var() * self.window).any()
            window = torch.where(here & outlier, running, window)
            skip = skip | outlier
            self.skip_counter.add_(outlier)
        self.buffer_x2.copy_(window)
        own = (step <= self.window) | (step < self.warmup) | skip
        v = torch.where(own, mean, torch.exp(torch.log(window).mean(0)))
        ratio = torch.sqrt((v + self.eps) / (running + self.eps)).clamp(1 / RATIO_LIMIT, RATIO_LIMIT)
        ratio = torch.where((step <= max(RATIO_AFTER, self.warmup)) | skip, torch.ones_like(ratio), ratio)
        self.running_var.copy_(self.momentum * running + (1 - self.momentum) * v)
        return v, ratio, skip

    def fold(self) -> nn.Module:
        """An Affine along the last axis: g = w / sqrt(V + eps), b.

        Raises:
            Refused: in training mode.
        """
        self._settled()
        return Affine(self.weight / torch.sqrt(self.running_var + self.eps), self.bias).eval()

    def extra_repr(self) -> str:
        windows = f"({self.window}, {self.buffer_gz.shape[0]})"
        return f"{self.size}, window={windows}, warmup={self.warmup}, filtered={self.filtered}"


def _bare(size: int, random: torch.Generator) -> nn.Module:
    layer = UnifiedNorm(size).to(torch.float64).eval()
    randomise(layer.running_var, random)
    return layer


def _make(size: int, random: torch.Generator) -> nn.Module:
    return generic(_bare(size, random), random)


def _rescale(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    new = copy.deepcopy(layer)
    assert isinstance(new, UnifiedNorm)
    scale = 0.5 + torch.rand(new.size, generator=random, dtype=torch.float64)
    with torch.no_grad():
        new.running_var.copy_(scale**2 * (new.running_var + new.eps) - new.eps)
    return new, scale * x, lambda y: y


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "unified",
        "Unified Normalization",
        "Yang et al. 2022, section 3",
        _make,
        _bare,
        laws=(Law("x[c] → s[c]·x[c], V + eps → s²·(V + eps)", _rescale),),
    ),
)
