"""Group elements, made and checked: identity, composition, random draws, distance from the group."""

from __future__ import annotations

import math
from typing import Literal

import torch

from regauge.atlas import Kind
from regauge.errors import BadInput, RegaugeError
from regauge.groups import DIAGONAL, Diagonal, Element, Matrix, Permutation, is_subgroup
from regauge.rotations import Householder, Product, RandomHadamard

__all__ = [
    "DIAGONAL",
    "Diagonal",
    "Element",
    "Householder",
    "Matrix",
    "Permutation",
    "Product",
    "RandomHadamard",
    "Style",
    "carry",
    "compose",
    "identity",
    "is_subgroup",
    "random_element",
    "random_hadamard",
    "require_member",
    "residual",
]

Style = Literal["default", "hadamard", "householder"]
_REFLECTIONS = 4


def identity(kind: Kind, n: int, count: int = 1) -> Element:
    """The identity of ``kind`` on K = ``count`` copies of size n.

    Raises:
        RegaugeError: ``kind`` has no elements of this form (translations, null directions).
    """
    if kind is Kind.PERMUTATION:
        return Permutation(torch.arange(n).repeat(count, 1))
    if kind in DIAGONAL:
        return Diagonal(torch.ones(count, n, dtype=torch.float64), kind)
    _need_linear(kind)
    eye = torch.eye(n, dtype=torch.float64).repeat(count, 1, 1)
    return Matrix(eye, kind, eye)


def compose(*elements: Element) -> Element:
    """``elements[0] · elements[1] · …`` (the last acts first), of the smallest kind that holds them all.

    Permutations and diagonals are multiplied out; everything else stays a ``Product``.

    Raises:
        RegaugeError: no element, no common kind, or different K or n.
    """
    kind = next((k for k in Kind if elements and all(is_subgroup(e.kind, k) for e in elements)), None)
    if kind is None:
        found = ", ".join(element.kind for element in elements) or "no element"
        raise RegaugeError("no group holds all the elements", expected="kinds of one group", found=found)
    product = Product(elements, kind)
    if kind is Kind.PERMUTATION or kind in DIAGONAL:
        ones = torch.arange(product.n) if kind is Kind.PERMUTATION else torch.ones(product.n).double()
        data = product.forward(ones.expand(product.count, -1)[:, :, None])[:, :, 0].contiguous()
        return Permutation(data) if kind is Kind.PERMUTATION else Diagonal(data, kind)
    return elements[0] if len(elements) == 1 else product


def random_element(
    kind: Kind, n: int, count: int, generator: torch.Generator, style: Style = "default"
) -> Element:
    """A random element of ``kind`` on K = ``count`` copies of size n, the same for the same seed.

    Args:
        kind: permutation (uniform), sign (fair), positive (exp of a normal of width 0.5), scale (both),
            complex (such a modulus, uniform angle), orthogonal and orthogonal-fixing-ones (Haar), general
            linear (orthogonal · diagonal · orthogonal with condition number below 7.4).
        n: size of the space.
        count: number of independent copies.
        generator: CPU generator; it is advanced.
        style: how the orthogonal matrices are drawn. ``hadamard``: a Hadamard matrix with random signs;
            ``householder``: a product of four reflections, for large n. Other kinds ignore it.

    Raises:
        BadInput: an unknown style.
        Refused: style ``hadamard`` and no Hadamard matrix of order n can be constructed.
        RegaugeError: ``kind`` has no elements of this form (translations, null directions).
    """
    if style not in ("default", "hadamard", "householder"):
        raise BadInput("unknown style", expected="default, hadamard or householder", found=str(style))
    if kind is Kind.PERMUTATION:
        return Permutation(torch.stack([torch.randperm(n, generator=generator) for _ in range(count)]))
    if kind in DIAGONAL:
        signs = _signs(n, count, generator) if kind is not Kind.POSITIVE else 1.0
        sizes = _sizes((count, n), generator) if kind is not Kind.SIGN else 1.0
        return Diagonal(torch.as_tensor(signs * sizes), kind)
    _need_linear(kind)
    if kind is Kind.COMPLEX:
        modulus = _sizes((count,), generator)
        angle = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
        a, b = modulus * angle.cos(), modulus * angle.sin()
        return Matrix(torch.stack([a, -b, b, a], dim=1).view(count, 2, 2), kind)
    if kind is Kind.GENERAL_LINEAR:
        left = random_element(Kind.ORTHOGONAL, n, count, generator, style)
        logs = 2 * torch.rand(count, n, generator=generator, dtype=torch.float64) - 1
        right = random_element(Kind.ORTHOGONAL, n, count, generator, style)
        product = Product((left, Diagonal(logs.exp(), Kind.POSITIVE), right), kind)
        if style != "default":
            return product
        return Matrix(product.matrix(), kind, product.inverse().matrix().mT.contiguous())
    return _orthogonal(n, count, generator, style, fixing_ones=kind is Kind.ORTHOGONAL_ONES)


def random_hadamard(signs: torch.Tensor, *, fixing_ones: bool = False) -> Element:
    """``H diag(signs)``, or ``R H diag(signs)`` with reflections R that send its image of the ones back.

    Args:
        signs: ±1, float64 [K, n].
        fixing_ones: whether the ones vector must be a fixed point.

    Raises:
        Refused: no Hadamard matrix of order n can be constructed.
    """
    rotation = RandomHadamard(signs)
    unit = torch.full((rotation.count, rotation.n, 1), rotation.n**-0.5, dtype=torch.float64)
    image = rotation.forward(unit)
    return Product((carry(image, unit), rotation), Kind.ORTHOGONAL_ONES) if fixing_ones else rotation


def carry(source: torch.Tensor, target: torch.Tensor) -> Householder:
    """Reflections that carry unit columns to unit columns, float64 [K, n, 1] each, without cancellation.

    If they are opposed, the reflection along ``source - target``. Otherwise that along
    ``source + target``, which gives ``-target``, followed by the one along ``target``.
    """
    opposed = (source * target).sum(dim=1, keepdim=True) < 0
    first = torch.where(opposed, source - target, source + target)
    second = torch.where(opposed, torch.zeros_like(target), target)
    return Householder(torch.cat([second, first], dim=2).mT.contiguous())


def residual(element: Element, kind: Kind | None = None) -> float:
    """How far an element is from the group ``kind`` (default: its own); zero up to rounding for a member.

    The laws tested are ``(g p)ᵀ (g⁻ᵀ q) = pᵀ q`` for every linear kind, ``g⁻ᵀ p = g p`` for the orthogonal
    ones and permutations, ``g 1 = 1`` if the ones are fixed, ``[[a, -b], [b, a]]`` for complex, entries ±1
    for signs, positive or nonzero ones for scales. The result is the largest deviation of an entry; infinite
    for a wrong sign, a zero, a value that is not finite or an element of the wrong form. Dense matrices are
    tested completely, structured elements part by part and on eight fixed pseudo-random columns.
    """
    kind = element.kind if kind is None else kind
    if kind in DIAGONAL:
        return _vector_residual(element.vector, kind) if isinstance(element, Diagonal) else math.inf
    if kind is Kind.PERMUTATION and element.kind is not kind:
        return math.inf
    _need_linear(kind)
    deviations = [_pairing_residual(element, kind)]
    if isinstance(element, Diagonal):
        deviations.append(_vector_residual(element.vector, element.kind))
    if isinstance(element, Product):
        deviations.extend(residual(part) for part in element.parts)
    if kind is Kind.ORTHOGONAL_ONES:
        ones = torch.ones(element.count, element.n, 1, dtype=torch.float64)
        deviations.append(_largest(element.forward(ones) - ones))
    if kind is Kind.COMPLEX:
        m = element.matrix() if element.n == 2 else torch.full((1, 2, 2), math.inf)
        deviations += [_largest(m[:, 0, 0] - m[:, 1, 1]), _largest(m[:, 0, 1] + m[:, 1, 0])]
    return max(deviations)


def require_member(element: Element, kind: Kind | None = None, tolerance: float = 1e-9) -> None:
    """Raise ``BadInput`` unless the residual of the element with respect to ``kind`` is within tolerance."""
    kind = element.kind if kind is None else kind
    found = residual(element, kind)
    if not found <= tolerance:
        raise BadInput(
            f"not a member of the group: {kind}",
            expected=f"a residual of at most {tolerance:g}",
            found=f"{found:g}",
            way_out="draw it with random_element, or project it on the group first",
        )


def _need_linear(kind: Kind) -> None:
    if kind in (Kind.TRANSLATION, Kind.NULL):
        raise RegaugeError(f"a {kind} is not a linear group", expected="a kind of linear group", found=kind)


def _largest(deviation: torch.Tensor) -> float:
    value = float(deviation.abs().max())
    return value if math.isfinite(value) else math.inf


def _vector_residual(vector: torch.Tensor, kind: Kind) -> float:
    allowed = vector > 0 if kind is Kind.POSITIVE else vector != 0
    if not bool((allowed & vector.isfinite()).all()):
        return math.inf
    return _largest(vector.abs() - 1) if kind is Kind.SIGN else 0.0


def _pairing_residual(element: Element, kind: Kind) -> float:
    n = element.n
    if isinstance(element, Matrix):
        probe = torch.eye(n, dtype=torch.float64)
    else:
        seeded = torch.Generator().manual_seed(0)
        probe = torch.randn(n, 8, dtype=torch.float64, generator=seeded)
    probe = probe.expand(element.count, -1, -1).contiguous()
    image, dual = element.forward(probe), element.inverse_transpose(probe)
    deviations = [_largest(image.mT @ dual - probe.mT @ probe)]
    if is_subgroup(kind, Kind.ORTHOGONAL):
        deviations.append(_largest(image - dual))
    return max(deviations)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sizes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (0.5 * _normal(shape, generator)).exp()


def _signs(n: int, count: int, generator: torch.Generator) -> torch.Tensor:
    return 1.0 - 2.0 * torch.randint(2, (count, n), generator=generator).double()


def _orthogonal(
    n: int, count: int, generator: torch.Generator, style: Style, *, fixing_ones: bool
) -> Element:
    kind = Kind.ORTHOGONAL_ONES if fixing_ones else Kind.ORTHOGONAL
    if style == "hadamard":
        return random_hadamard(_signs(n, count, generator), fixing_ones=fixing_ones)
    if style == "householder":
        vectors = _normal((count, _REFLECTIONS, n), generator)
        return Householder(vectors - vectors.mean(dim=2, keepdim=True) if fixing_ones else vectors, kind)
    if not fixing_ones:
        return Matrix(_haar(n, count, generator), kind)
    basis = torch.zeros(count, n, 1, dtype=torch.float64)
    basis[:, 0] = 1.0
    turn = carry(basis, torch.full_like(basis, n**-0.5))
    block = torch.eye(n, dtype=torch.float64).repeat(count, 1, 1)
    block[:, 1:, 1:] = _haar(n - 1, count, generator)
    return Matrix(turn.forward(turn.forward(block).mT).mT.contiguous(), kind)


def _haar(n: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform orthogonal matrices [K, n, n]: QR of a normal matrix, with the diagonal of R positive."""
    q, r = torch.linalg.qr(_normal((count, n, n), generator))
    return q * torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)[:, None, :]
