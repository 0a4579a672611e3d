"""The element of one generator that brings b closest to a, for each kind of group.

Sources: orthogonal Procrustes (Schönemann 1966); linear assignment on inner products (Git Re-Basin, arXiv
2209.04836, section 3.2); the balanced form of a product (geometric mean of two Gram matrices).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.atlas import Generator, Kind
from regauge.elements import DIAGONAL, Diagonal, Element, Matrix, Permutation, identity
from regauge.errors import RegaugeError
from regauge.groups import need
from regauge.matching.correlate import diagonals, grams, products
from regauge.matching.moved import Pair
from regauge.matching.order import View, sizes_of

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
        return Permutation(_assigned(_scores(pair, generator, views)))
    clear = [view for view in views if view.level == 0 and not view.scaled]
    if kind in DIAGONAL:
        return _diagonal(pair, generator, clear)
    if kind is Kind.COMPLEX:
        return _complex(pair, generator, clear)
    if kind is Kind.GENERAL_LINEAR:
        return _general(pair, generator, clear)
    return _orthogonal(pair, generator, clear)


def improved(pair: Pair, generator: Generator, views: Sequence[View]) -> Element | None:
    """A better permutation by the plain sum ⟨a, b⟩ over all its blocks, or None if there is none."""
    total = torch.zeros(generator.count, generator.size, generator.size, dtype=torch.float64)
    for view in views:
        total += grams(pair, generator, view)[0]
    index = _assigned(total)
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


def _assigned(scores: torch.Tensor) -> torch.Tensor:
    """index[k, i]: which unit of b is unit i of a, so that the sum of the scores is largest."""
    from scipy.optimize import linear_sum_assignment

    found = [linear_sum_assignment(table.numpy(), maximize=True)[1] for table in scores]
    return torch.stack([torch.from_numpy(index).to(torch.int64) for index in found])


def _weight(view: View, generator: Generator) -> float:
    return math.prod(sizes_of(view.action).values()) / (generator.count * generator.size)


def _diagonal(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """log|s| by least squares of log‖a‖ = log‖b‖ + e log|s| over the blocks; the sign of Σ ⟨a, s b⟩."""
    shape = (generator.count, generator.size)
    sign, shift, weights = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for view in views:
        cross, own_a, own_b = diagonals(pair, generator, view)
        exponent, weight = float(view.action.exponent), _weight(view, generator)
        scale = (own_a * own_b).sqrt()
        seen = scale > 0
        if view.action.exponent.numerator % 2:
            sign += torch.where(seen, weight * cross / scale.clamp_min(1e-300), 0.0)
        ratio = 0.5 * (own_a.clamp_min(1e-300).log() - own_b.clamp_min(1e-300).log())
        shift += torch.where(seen, weight * exponent * ratio, 0.0)
        weights += torch.where(seen, weight * exponent**2, 0.0)
    signs = torch.where(sign < 0, -1.0, 1.0).to(torch.float64)
    sizes = (shift / weights.clamp_min(1e-300)).clamp(-300, 300).exp()
    if generator.kind is Kind.SIGN:
        return Diagonal(signs, Kind.SIGN)
    return Diagonal(sizes if generator.kind is Kind.POSITIVE else signs * sizes, generator.kind)


def _complex(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """The angle of Σ ⟨a, b⟩ as complex numbers, and the modulus as for a scale."""
    real, imaginary, shift, weights = (torch.zeros(generator.count, dtype=torch.float64) for _ in range(4))
    for view in views:
        cross, own_a, own_b = grams(pair, generator, view)
        norm_a, norm_b = (own.diagonal(dim1=1, dim2=2).sum(1) for own in (own_a, own_b))
        scale = (norm_a * norm_b).sqrt()
        seen, weight = scale > 0, _weight(view, generator)
        real += torch.where(seen, weight * (cross[:, 0, 0] + cross[:, 1, 1]) / scale.clamp_min(1e-300), 0.0)
        imaginary += torch.where(
            seen, weight * (cross[:, 1, 0] - cross[:, 0, 1]) / scale.clamp_min(1e-300), 0.0
        )
        ratio = 0.5 * (norm_a.clamp_min(1e-300).log() - norm_b.clamp_min(1e-300).log())
        shift += torch.where(seen, weight * float(view.action.exponent) * ratio, 0.0)
        weights += torch.where(seen, weight, 0.0)
    angle = torch.atan2(imaginary, real)
    modulus = (shift / weights.clamp_min(1e-300)).clamp(-300, 300).exp()
    x, y = modulus * angle.cos(), modulus * angle.sin()
    return Matrix(torch.stack([x, -y, y, x], dim=1).view(-1, 2, 2), Kind.COMPLEX)


def _orthogonal(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """Q = U Vᵀ of Σ a bᵀ = U S Vᵀ; with the ones fixed, the same across them."""
    n = generator.size
    total = torch.zeros(generator.count, n, n, dtype=torch.float64)
    for view in views:
        total += grams(pair, generator, view)[0]
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


def _general(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """Both sides balanced, T G T = T⁻¹ H T⁻¹ with Gram matrices G of the writers and H of the readers; then
    the rotation between the balanced forms."""
    k, n = generator.count, generator.size
    zero = torch.zeros(k, n, n, dtype=torch.float64)
    sums = {1: [zero.clone() for _ in range(3)], -1: [zero.clone() for _ in range(3)]}
    for view in views:
        side = sums[1 if view.action.exponent > 0 else -1]
        for total, part in zip(side, grams(pair, generator, view), strict=True):
            total += part
    if not views:
        return identity(Kind.ORTHOGONAL, n, k)
    (cross_w, gram_wa, gram_wb), (cross_r, gram_ra, gram_rb) = sums[1], sums[-1]
    t_a, back_a = _balancing(gram_wa, gram_ra)
    t_b, back_b = _balancing(gram_wb, gram_rb)
    both = t_a @ cross_w @ t_b + back_a @ cross_r @ back_b  # t is symmetric
    u, _, vh = torch.linalg.svd(both)
    turn = u @ vh
    forward = back_a @ turn @ t_b
    return Matrix(forward, Kind.GENERAL_LINEAR)


def _balancing(writers: torch.Tensor, readers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric T with T G T = T⁻¹ H T⁻¹, and T⁻¹; T² is the geometric mean of G⁻¹ and H."""
    root, inverse = _root(writers)
    middle, _ = _root(root @ _ridged(readers) @ root)
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
