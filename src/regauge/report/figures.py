"""Figures of tensors: how entries spread, how far apart two tensors are, singular values. In float64.

Everything here is rounded to six significant digits, so that a report does not depend on the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

DIGITS = 6
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Spread:
    """How the entries of a tensor spread. None where a figure does not exist (all zero, NaN, infinite).

    Attributes:
        rms: square root of the mean square.
        outlier: largest magnitude divided by ``rms``; 1 if all magnitudes are equal.
        kurtosis: fourth central moment over the square of the second; 3 for a normal distribution.
    """

    rms: float | None
    outlier: float | None
    kurtosis: float | None


def rounded(value: float) -> float | None:
    """To six significant digits; None if it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def spread(blocks: Callable[[], Iterable[torch.Tensor]]) -> Spread:
    """Figures over all entries of a tensor that is read in blocks.

    Args:
        blocks: gives the blocks, of any shape, each time it is called (twice); real numbers.
    """
    count, total, square, largest = 0, 0.0, 0.0, 0.0
    for block in _wide(blocks()):
        count += block.numel()
        total += float(block.sum())
        square += float(block.square().sum())
        largest = max(largest, float(block.abs().max()))
    if count == 0 or not math.isfinite(square):
        return Spread(None, None, None)
    mean, rms = total / count, math.sqrt(square / count)
    second, fourth = 0.0, 0.0
    for block in _wide(blocks()):
        power = (block - mean).square_()
        second += float(power.sum())
        fourth += float(power.square_().sum())
    flat = second <= 1e-24 * square
    return Spread(
        rounded(rms),
        rounded(largest / rms) if rms > 0 else None,
        None if flat else rounded(fourth * count / second**2),
    )


def spread_of(tensor: torch.Tensor) -> Spread:
    """:func:`spread` of a tensor in memory."""
    blocks: tuple[torch.Tensor, ...] = torch.split(tensor.reshape(-1), _BLOCK)
    return spread(lambda: blocks)


def _wide(blocks: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (block.to(torch.float64) for block in blocks if block.numel())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """``‖a − b‖ / ‖a‖`` over all entries of two tensors of a shape; None if ``a`` is zero or not finite."""
    a, b = a.reshape(-1), b.reshape(-1)
    difference, norm = 0.0, 0.0
    for x, y in zip(a.split(_BLOCK), b.split(_BLOCK), strict=True):
        wide = x.to(torch.float64)
        norm += float(wide.square().sum())
        difference += float((wide - y.to(torch.float64)).square_().sum())
    return rounded(math.sqrt(difference / norm)) if norm > 0 and math.isfinite(norm) else None


def gram_error(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """``‖A·Aᵀ − B·Bᵀ‖ / ‖A·Aᵀ‖``: 0 exactly if ``b`` is ``a`` with its columns turned by an orthogonal map.

    Less than 1e-13 is what the order of sums in float64 makes, and given as 0.

    Args:
        a, b: (positions, features); as many positions, any features.
    """
    grams = [x.to(torch.float64) @ x.to(torch.float64).T for x in (a, b)]
    norm = float(grams[0].norm())
    if norm == 0 or not math.isfinite(norm):
        return None
    error = float((grams[0] - grams[1]).norm()) / norm
    return 0.0 if error < 1e-13 else rounded(error)


def singular_values(matrix: torch.Tensor) -> list[float]:
    """All singular values of a matrix, computed in float64, largest first, to six significant digits.

    Where rounding leaves nothing of a value (below 1e-15 of the largest) it is given as 0.
    """
    values = torch.linalg.svdvals(matrix.to(torch.float64)).tolist()
    least = 1e-15 * values[0] if values else 0.0
    return [(rounded(value) or 0.0) if value > least else 0.0 for value in values]


@contextmanager
def one_thread() -> Generator[None]:
    """Sums must not depend on how many threads are free; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
