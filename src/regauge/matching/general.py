"""The general linear map that brings b closest to a, from writers a = G b and readers a = G⁻ᵀ b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regauge.atlas import Generator, Kind
from regauge.elements import Element, Matrix
from regauge.matching.correlate import grams
from regauge.matching.moved import Pair
from regauge.matching.order import View

_HALVINGS = 12


@dataclass(frozen=True)
class _Sums:
    """Weighed inner products ⟨a, b⟩, ⟨a, a⟩, ⟨b, b⟩ between all acting indices, [K, n, n] each."""

    cross: torch.Tensor
    own_a: torch.Tensor
    own_b: torch.Tensor

    @property
    def empty(self) -> bool:
        return not bool(self.own_a.any()) or not bool(self.own_b.any())


def _sums(pair: Pair, generator: Generator, views: Sequence[View]) -> tuple[_Sums, _Sums]:
    """Of the writers and of the readers."""
    shape = (generator.count, generator.size, generator.size)
    found = [[torch.zeros(shape, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    for view in views:
        weight = pair.weight(view.action.parameter)
        side = found[0 if view.action.exponent > 0 else 1]
        for total, part in zip(side, grams(pair, generator, view), strict=True):
            total += weight * part
    return _Sums(*found[0]), _Sums(*found[1])


def balanced(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """Both sides balanced, T G T = T⁻¹ H T⁻¹ with Gram matrices G of the writers and H of the readers; then
    the rotation between the balanced forms. Where only one side is seen, T G T = 1 or T⁻¹ H T⁻¹ = 1."""
    writers, readers = _sums(pair, generator, views)
    t_a, back_a = _frame(writers, readers, writers.own_a, readers.own_a)
    t_b, back_b = _frame(writers, readers, writers.own_b, readers.own_b)
    both = torch.zeros_like(writers.cross)
    if not writers.empty:
        both = both + t_a @ writers.cross @ t_b  # t is symmetric
    if not readers.empty:
        both = both + back_a @ readers.cross @ back_b
    u, _, vh = torch.linalg.svd(both)
    turn = u @ vh
    return Matrix(back_a @ turn @ t_b, Kind.GENERAL_LINEAR)


def descended(pair: Pair, generator: Generator, views: Sequence[View]) -> Element | None:
    """A map near the identity that lowers Σ w ‖a − G b‖² + Σ w ‖a − G⁻ᵀ b‖², or None where none is found.

    The step X of G = 1 + X solves X (Σ b bᵀ) + (Σ c cᵀ) X = Σ (a − b) bᵀ − Σ c (a − c)ᵀ, with b of the
    writers and c of the readers: a Sylvester equation, solved in the eigenvectors of both sums.
    """
    writers, readers = _sums(pair, generator, views)
    left, right = readers.own_b, writers.own_b
    difference = writers.cross - right - (readers.cross - left).mT
    values_l, vectors_l = torch.linalg.eigh(left)
    values_r, vectors_r = torch.linalg.eigh(right)
    sums = values_l.clamp_min(0)[:, :, None] + values_r.clamp_min(0)[:, None, :]
    sums = sums.clamp_min(1e-12 * float(sums.max()) + 1e-300)
    step = vectors_l @ ((vectors_l.mT @ difference @ vectors_r) / sums) @ vectors_r.mT
    eye = torch.eye(generator.size, dtype=torch.float64).expand_as(step)
    found, contragredient = eye.clone(), eye.clone()
    best = _left(writers, readers, found, contragredient)
    waiting = torch.ones_like(best, dtype=torch.bool)
    moved = False
    for halving in range(_HALVINGS):
        tried = eye + step * 0.5**halving
        inverse, info = torch.linalg.inv_ex(tried)
        now = _left(writers, readers, tried, inverse.mT)
        better = waiting & (info == 0) & (now < best * (1 - 1e-12))
        found[better], contragredient[better] = tried[better], inverse.mT[better]
        waiting &= ~better
        moved = moved or bool(better.any())
    return Matrix(found, Kind.GENERAL_LINEAR, contragredient) if moved else None


def _left(writers: _Sums, readers: _Sums, g: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """Σ w ‖a − G b‖² + Σ w ‖a − G⁻ᵀ b‖², [K]."""
    total = torch.zeros(g.shape[0], dtype=torch.float64)
    for side, m in ((writers, g), (readers, dual)):
        square = (m @ side.own_b * m).sum((1, 2)) - 2 * (m * side.cross).sum((1, 2))
        total += square + side.own_a.diagonal(dim1=1, dim2=2).sum(1)
    return total


def _frame(
    writers: _Sums, readers: _Sums, gram_w: torch.Tensor, gram_r: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric T with T G T = T⁻¹ H T⁻¹, and T⁻¹; T² is the geometric mean of G⁻¹ and H."""
    if writers.empty:
        return _root(gram_r)
    root, inverse = _root(gram_w)
    if readers.empty:
        return inverse, root
    middle, _ = _root(root @ _ridged(gram_r) @ root)
    return _root(inverse @ middle @ inverse)


def _ridged(gram: torch.Tensor) -> torch.Tensor:
    n = gram.shape[-1]
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
    return gram + 1e-13 * mean[:, None, None] * torch.eye(n, dtype=gram.dtype)


def _root(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """G^½ and G^-½."""
    values, vectors = torch.linalg.eigh(_ridged(0.5 * (gram + gram.mT)))
    values = values.clamp_min(values[:, -1:].clamp_min(1e-300) * 1e-14).sqrt()
    return (vectors * values[:, None, :]) @ vectors.mT, (vectors / values[:, None, :]) @ vectors.mT
