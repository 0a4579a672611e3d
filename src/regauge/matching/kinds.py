"""The element of one generator that brings b closest to a, for each kind of group.

Sources: orthogonal Procrustes (Schönemann 1966); linear assignment on inner products (Git Re-Basin, arXiv
2209.04836, section 3.2). Diagonals and complex numbers are in :mod:`regauge.matching.scales`, general linear
maps in :mod:`regauge.matching.general`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.atlas import Generator, Kind
from regauge.elements import Element, Matrix, Permutation
from regauge.errors import RegaugeError
from regauge.groups import need
from regauge.matching.assignment import assigned
from regauge.matching.correlate import crossed, products
from regauge.matching.general import balanced
from regauge.matching.moved import Pair
from regauge.matching.order import View
from regauge.matching.scales import complex_number

_RANK = 1e-9
"""Singular values below this share of the largest leave a rotation undetermined along their directions."""


@dataclass(frozen=True, eq=False)
class Projection(Element):
    """The part of a rotation that is determined: a partial isometry [K, n, n]. It is no element of a group,
    and stands for one only until more is known."""

    data: torch.Tensor
    kind: Kind = field(default=Kind.ORTHOGONAL, init=False)

    def __post_init__(self) -> None:
        need(self.data, torch.float64, "K, n, n", self.kind)

    @property
    def count(self) -> int:
        return self.data.shape[0]

    @property
    def n(self) -> int:
        return self.data.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.data @ x

    def inverse(self) -> Element:
        raise RegaugeError("a partial isometry has no inverse")


def completed(element: Element) -> Element:
    """A group element that agrees with a :class:`Projection` where it is determined; others as they are."""
    if not isinstance(element, Projection):
        return element
    u, _, vh = torch.linalg.svd(element.data)
    q = u @ vh
    return Matrix(q, Kind.ORTHOGONAL, q)


def solve(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """The best element for what ``views`` show; see :class:`Projection` for one that is not determined."""
    kind = generator.kind
    if kind is Kind.PERMUTATION:
        return Permutation(assigned(_scores(pair, generator, views)))
    clear = [view for view in views if view.level == 0 and not view.scaled]
    if kind is Kind.COMPLEX:
        return complex_number(pair, generator, clear)
    if kind is Kind.GENERAL_LINEAR:
        return balanced(pair, generator, clear)
    return _orthogonal(pair, generator, clear)


def improved(pair: Pair, generator: Generator, views: Sequence[View]) -> Element | None:
    """A better permutation by the weighed sum of ⟨a, b⟩ over all its blocks, or None if there is none."""
    total = torch.zeros(generator.count, generator.size, generator.size, dtype=torch.float64)
    for view in views:
        total += pair.weight(view.action.parameter) * crossed(pair, generator, view)
    index = assigned(total)
    now = total.diagonal(dim1=1, dim2=2).sum()
    then = total.gather(2, index[:, :, None]).sum()
    return Permutation(index) if float(then - now) > 1e-9 * float(total.abs().sum()) else None


def _scores(pair: Pair, generator: Generator, views: Sequence[View]) -> torch.Tensor:
    """How alike the units i of a and j of b are, [K, n, n], whatever the unknown elements are.

    Where nothing is loose the cosine, where an unknown diagonal acts its absolute value, where an unknown
    matrix acts the cosine of the Gram matrices that the unit spans; each weighed by its number of features.
    """
    best = min(view.level for view in views)
    total = torch.zeros(generator.count, generator.size, generator.size, dtype=torch.float64)
    for view in views:
        if view.level > best:
            continue
        found = products(pair, generator, view)
        if found is None:
            continue
        if view.mixed or view.apart:
            alike = found.cross.square().sum(dim=(1, 2, 4))
            norm_a, norm_b = (own.square().sum(dim=(1, 3, 4)).sqrt() for own in (found.own_a, found.own_b))
        else:
            alike = found.cross[:, 0, 0, :, 0, :]
            alike = alike.abs() if view.scaled else alike
            norm_a, norm_b = (own[:, 0, :, 0, 0].sqrt() for own in (found.own_a, found.own_b))
        scale = norm_a[:, :, None] * norm_b[:, None, :]
        total += found.features * torch.where(scale > 0, alike / scale.clamp_min(1e-300), 0.0)
    return total


def _orthogonal(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """Q = U Vᵀ of Σ w a bᵀ = U S Vᵀ; with the ones fixed, the same across them."""
    n = generator.size
    total = torch.zeros(generator.count, n, n, dtype=torch.float64)
    for view in views:
        total += pair.weight(view.action.parameter) * crossed(pair, generator, view)
    fixed = generator.kind is Kind.ORTHOGONAL_ONES
    if fixed:
        total = total - total.mean(1, keepdim=True)
        total = total - total.mean(2, keepdim=True)
        total = total + total.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    u, s, vh = torch.linalg.svd(total)
    known = s > _RANK * s[:, :1].clamp_min(1e-300)
    if bool(known.all()):
        q = u @ vh
        return Matrix(q, generator.kind, q)
    return Projection((u * known[:, None, :]) @ vh)
