"""Figures of the distance between outputs, summed up a part of the last axis at a time.

No output needs to exist as a whole: a row of logits is read in columns, with the running maximum and sum of
each softmax (as in an online softmax), and all functions that are compared advance together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from regauge.errors import BadInput

COLUMNS = 1 << 21
"""Entries of an output that are compared at once: 16 MiB in float64."""

_LARGE = 30.0
"""Difference of logits from which the plain formula of KL is as accurate as the one for small ones."""


@dataclass(frozen=True)
class Figures:
    """Distance of b from a over all inputs.

    Attributes:
        relative: ``||a - b|| / ||a||`` (Frobenius, over all inputs; the largest over the outputs).
        max_abs: largest ``|a - b|`` of any entry.
        kl_mean, kl_max: ``KL(a || b)`` of the softmax over the last axis, in nats, over positions.
        top1: share of positions where both have the same largest entry.
        finite: no NaN anywhere, and no infinity that the two do not share. If not, the other figures
            are meaningless and ``relative`` is infinite.
    """

    relative: float
    max_abs: float
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    finite: bool = True


class Output(Protocol):
    """An output that can be read in parts.

    Attributes:
        shape: its shape.
        step: how many columns make a good part.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def step(self) -> int: ...

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Entries ``start:stop`` of the last axis, all other axes flattened: [positions, stop - start]."""
        ...


@dataclass(frozen=True)
class Held:
    """An output that exists as a whole."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def step(self) -> int:
        return max(1, COLUMNS // max(1, math.prod(self.shape[:-1])))

    def columns(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor.reshape(-1, self.shape[-1] if self.shape else 1)[:, start:stop]

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """The columns ``index``, int64."""
        return self.columns(0, self.shape[-1])[:, index]


class Distance:
    """Figures of one function against the reference, summed over inputs."""

    def __init__(self, logits: bool) -> None:
        self.logits = logits
        self.bits = True
        self._squares: list[list[float]] = []
        self._max_abs = 0.0
        self._kl = 0.0
        self._kl_max = 0.0
        self._agree = 0
        self._count = 0
        self._finite = True
        self._softmax: _Softmax | None = None

    def begin(self, index: int) -> None:
        while len(self._squares) <= index:
            self._squares.append([0.0, 0.0])
        self._softmax = None

    def add(self, index: int, a: _Reference, p: torch.Tensor, q: torch.Tensor) -> None:
        """One part of one output: ``p`` of the reference and ``q``, both wide, [positions, columns]."""
        self.bits = self.bits and torch.equal(p, q)
        difference = p - q
        largest = _largest(difference)
        if not math.isfinite(largest):
            difference = torch.where(p == q, torch.zeros_like(difference), difference)
            largest = _largest(difference)
            self._finite &= math.isfinite(largest)
        self._max_abs = max(self._max_abs, largest)
        squares = self._squares[index]
        squares[0] += _square(difference)
        squares[1] += a.square
        if self.logits and self._finite:
            if self._softmax is None:
                self._softmax = _Softmax(len(p))
            self._softmax.add(a, difference, q, largest)

    def end(self, a: _Reference) -> None:
        """All parts of an output have been seen."""
        if self._softmax is not None and self._finite:
            kl = self._softmax.divergence(a)
            self._kl += float(kl.sum())
            self._kl_max = max(self._kl_max, float(kl.max()))
            self._agree += int((a.top.index == self._softmax.top.index).sum())
            self._count += len(kl)

    def figures(self) -> Figures:
        if not self._finite:
            return Figures(math.inf, math.inf, finite=False)
        ratios = [math.sqrt(d / n) if n else (math.inf if d else 0.0) for d, n in self._squares]
        relative = max(ratios, default=0.0)
        if not (self.logits and self._count):
            return Figures(relative, self._max_abs)
        kl = self._kl / self._count
        return Figures(relative, self._max_abs, kl, self._kl_max, self._agree / self._count)


def compare(a: Sequence[Output], others: Sequence[tuple[Distance, Sequence[Output]]]) -> None:
    """Add the distance of each of ``others`` from ``a``, reading all of them part by part together.

    Raises:
        BadInput: the outputs differ in number or shape.
    """
    for _, outputs in others:
        if [x.shape for x in a] != [x.shape for x in outputs]:
            raise BadInput(
                "the two functions return different shapes",
                expected=", ".join(str(x.shape) for x in a),
                found=", ".join(str(x.shape) for x in outputs),
            )
    for index, x in enumerate(a):
        width = x.shape[-1] if x.shape else 1
        step = min([x.step, *(outputs[index].step for _, outputs in others)])
        reference = _Reference(math.prod(x.shape[:-1]), any(distance.logits for distance, _ in others))
        for distance, _ in others:
            distance.begin(index)
        for start in range(0, width if math.prod(x.shape) else 0, step):
            stop = min(start + step, width)
            p = _wide(x.columns(start, stop))
            reference.add(p)
            for distance, outputs in others:
                distance.add(index, reference, p, _wide(outputs[index].columns(start, stop)))
        for distance, _ in others:
            distance.end(reference)


class _Top:
    """Largest entry of each row, the first of equal ones."""

    def __init__(self, rows: int) -> None:
        self.value = torch.full((rows,), -math.inf, dtype=torch.float64)
        self.index = torch.zeros(rows, dtype=torch.int64)
        self._seen = 0

    def add(self, x: torch.Tensor) -> None:
        value, index = x.max(dim=1)
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.index = torch.where(better, index + self._seen, self.index)
        self._seen += x.shape[1]


class _Reference:
    """What is needed of the reference: squares, the largest entry and the running softmax."""

    def __init__(self, rows: int, logits: bool) -> None:
        self.top, self.logits = _Top(rows), logits
        self.total = torch.zeros(rows, dtype=torch.float64)
        self.shrink = torch.zeros(rows, dtype=torch.float64)
        self.weight = torch.zeros(0)
        self.square = 0.0

    def add(self, p: torch.Tensor) -> None:
        self.square = _square(p)
        if not math.isfinite(self.square):
            self.square = _square(torch.where(torch.isfinite(p), p, torch.zeros_like(p)))
        if self.logits:
            before = self.top.value
            self.top.add(p)
            base = _finite(self.top.value)
            self.shrink = (before - base).exp_()  # how much the sums so far weigh from now on
            self.weight = (p - base[:, None]).exp_()
            self.total = self.total * self.shrink + self.weight.sum(dim=1)


class _Softmax:
    """KL(a || b) of each row, with p = softmax(a), d = a - b:  Σ p d + log Σ p exp(-d).

    The second term is written as ``log1p(Σ p expm1(-d))`` where d is small, so that a divergence far below
    the rounding of the logarithms is still seen; otherwise it is ``lse(b) - lse(a)``.
    """

    def __init__(self, rows: int) -> None:
        self.top = _Top(rows)
        self._mean, self._ratio, self._total = (torch.zeros(rows, dtype=torch.float64) for _ in range(3))
        self._largest = 0.0

    def add(self, a: _Reference, difference: torch.Tensor, q: torch.Tensor, largest: float) -> None:
        self._largest = max(self._largest, largest)
        before = self.top.value
        self.top.add(q)
        base = _finite(self.top.value)
        self._total = self._total * (before - base).exp_() + (q - base[:, None]).exp_().sum(dim=1)
        self._mean = self._mean * a.shrink + _dot(a.weight, difference)
        ratio = difference.neg_().clamp_(max=_LARGE).expm1_()
        self._ratio = self._ratio * a.shrink + _dot(a.weight, ratio)

    def divergence(self, a: _Reference) -> torch.Tensor:
        mean = self._mean / a.total
        if self._largest < _LARGE:
            rest = torch.log1p(self._ratio / a.total)
        else:
            rest = (_finite(self.top.value) + self._total.log()) - (_finite(a.top.value) + a.total.log())
        return (mean + rest).clamp(min=0)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """Rows of nothing but -inf are based on zero."""
    return torch.where(torch.isneginf(x), torch.zeros_like(x), x)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(a, b, dim=1)


def _square(x: torch.Tensor) -> float:
    flat = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)
    return float(torch.dot(flat, flat))


def _largest(x: torch.Tensor) -> float:
    """Largest absolute value; NaN if there is one."""
    if x.is_complex():
        return float(x.abs().max())
    low, high = torch.aminmax(x)
    return max(float(-low), float(high)) if math.isfinite(float(low)) else math.inf
