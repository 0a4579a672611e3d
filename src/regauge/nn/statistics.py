"""Sums and means over the positions of a batch, and over all processes that share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from regauge.errors import BadInput


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype in which statistics are taken: float32, or float64 if x is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("regauge::hold", mutates_args=())
def _hold(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@_hold.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def hold(x: torch.Tensor) -> torch.Tensor:
    """x, detached, as it is now: for what comes from a buffer that moves in the same step.

    A compiled backward pass may compute a value again from the buffers it came from, and finds them moved
    already. It does not do so through an operation it cannot see into.
    """
    x = x.detach()
    return _hold(x) if torch.compiler.is_compiling() else x.clone()


def _shared() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Total(torch.autograd.Function):
    """The sum over processes; its gradient is that of the sum of the losses of all processes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def total(x: torch.Tensor) -> torch.Tensor:
    """Σ over processes of x, differentiable; x itself where there is one process.

    Every process must call it, equally often and with the same shape. Its gradient is that of the sum of the
    losses of all processes, as in ``torch.nn.SyncBatchNorm``.
    """
    return _Total.apply(x) if _shared() else x  # type: ignore[no-any-return]


def kept(x: torch.Tensor, pad_mask: torch.Tensor | None) -> torch.Tensor | None:
    """1 where a position counts and 0 where it is padding, [..., 1] in the dtype of x; None without a mask.

    Args:
        x: [..., c].
        pad_mask: the shape of x without c, true (or not 0) at padding; None if nothing is.

    Raises:
        BadInput: the mask has another shape.
    """
    if pad_mask is None:
        return None
    if pad_mask.shape != x.shape[:-1]:
        raise BadInput(
            "the padding mask does not fit the input",
            expected=f"{tuple(x.shape[:-1])}, true at padding",
            found=f"{tuple(pad_mask.shape)}",
        )
    return (~pad_mask.to(torch.bool)).to(x.dtype).unsqueeze(-1)


def position_mean(
    x: torch.Tensor, keep: torch.Tensor | None = None, *, local: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean[c] = Σ keep · x[..., c] / Σ keep over all positions of all processes, and Σ keep.

    Args:
        x: [..., c].
        keep: [..., 1], 0 or 1; None counts every position.
        local: over this process alone.

    Returns:
        the mean, [c], differentiable; the count, [], at least 1.
    """
    rows = x.reshape(-1, x.shape[-1])
    if keep is None:
        count = torch.full((1,), float(rows.shape[0]), dtype=x.dtype, device=x.device)
        values = rows.sum(0)
    else:
        flat = keep.reshape(-1, 1)
        count, values = flat.sum(0), (rows * flat).sum(0)
    if not local:
        both = total(torch.cat((values, count)))
        values, count = both[:-1], both[-1:]
    count = count.clamp_min(1)
    return values / count, count.squeeze(0)


def variance(x: torch.Tensor, axes: tuple[int, ...], *, unbiased: bool = False) -> torch.Tensor:
    """Σ (x − mean x)² / n over these axes, which are kept with length 1; n is their size, less 1 if unbiased.

    On a CPU ``torch.var`` goes through x in one slow pass; there it is written out, in several fast ones.
    """
    if x.device.type != "cpu":
        return x.var(axes, unbiased=unbiased, keepdim=True)
    squares = (x - x.mean(axes, keepdim=True)).square().sum(axes, keepdim=True)
    return squares / (x.numel() // squares.numel() - int(unbiased))


def randomise(buffer: torch.Tensor, random: torch.Generator, low: float = 0.5, high: float = 1.5) -> None:
    """buffer ← uniform in [low, high]: generic running statistics."""
    with torch.no_grad():
        buffer.copy_(low + (high - low) * torch.rand(buffer.shape, generator=random, dtype=torch.float64))
