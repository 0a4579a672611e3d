"""Group elements: frozen values that act on the columns of a block [K, n, m], one element per k.

``y[k] = g_k x[k]``. K is the number of copies (1 if the element depends on nothing), n the size of the space.
Elements are never changed, and keep the tensors they are given (float64 or int64) without copying them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from regauge.atlas import Kind
from regauge.errors import RegaugeError

_LARGER: dict[Kind, frozenset[Kind]] = {
    Kind.PERMUTATION: frozenset({Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR}),
    Kind.SIGN: frozenset({Kind.SCALE, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR}),
    Kind.POSITIVE: frozenset({Kind.SCALE, Kind.GENERAL_LINEAR}),
    Kind.SCALE: frozenset({Kind.GENERAL_LINEAR}),
    Kind.COMPLEX: frozenset({Kind.GENERAL_LINEAR}),
    Kind.ORTHOGONAL_ONES: frozenset({Kind.ORTHOGONAL, Kind.GENERAL_LINEAR}),
    Kind.ORTHOGONAL: frozenset({Kind.GENERAL_LINEAR}),
}
DIAGONAL = frozenset({Kind.SIGN, Kind.POSITIVE, Kind.SCALE})


def is_subgroup(small: Kind, large: Kind) -> bool:
    """Whether every element of kind ``small`` is one of kind ``large`` (complex acts on pairs, n = 2)."""
    return small == large or large in _LARGER.get(small, frozenset())


class Element(ABC):
    """One group element per copy.

    Attributes:
        kind: the smallest family of groups the element is declared to belong to.
    """

    kind: Kind

    @property
    @abstractmethod
    def count(self) -> int:
        """K, the number of copies."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Size of the space."""

    @property
    def moves_only(self) -> bool:
        """True if the element only moves entries and flips signs: exact in any dtype, dtype kept."""
        return False

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``g_k x[k]`` for x float64 [K, n, m] (any signed dtype if ``moves_only``); x is left as it is."""

    @abstractmethod
    def inverse(self) -> Element:
        """The inverse element, of the same kind."""

    def inverse_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """``(g_k⁻¹)ᵀ x[k]``; shapes and dtypes as ``forward``. Here: the same, for orthogonal elements."""
        return self.forward(x)

    def apply(self, x: torch.Tensor, exponent: Fraction | int = 1) -> torch.Tensor:
        """``forward`` for exponent +1, ``inverse_transpose`` for -1; diagonals take rational powers.

        Raises:
            RegaugeError: the exponent means nothing for this element.
        """
        if exponent == 1:
            return self.forward(x)
        if exponent == -1:
            return self.inverse_transpose(x)
        raise RegaugeError(f"a {self.kind} has no power", expected="exponent 1 or -1", found=str(exponent))

    def matrix(self) -> torch.Tensor:
        """The element as dense matrices, float64 [K, n, n]."""
        eye = torch.eye(self.n, dtype=torch.float64)
        return self.forward(eye.expand(self.count, -1, -1).contiguous())


def need(tensor: torch.Tensor, dtype: torch.dtype, dims: str, kind: Kind) -> None:
    """Raise ``RegaugeError`` unless a tensor has this dtype and these dimensions, e.g. ``"K, n, n"``."""
    shape = tuple(tensor.shape)
    square = not dims.endswith("n, n") or (len(shape) > 1 and shape[-1] == shape[-2])
    if tensor.dtype != dtype or len(shape) != dims.count(",") + 1 or not square or 0 in shape:
        raise RegaugeError(
            f"not the data of a {kind} element", expected=f"{dtype} [{dims}]", found=f"{tensor.dtype} {shape}"
        )


def _negative(x: torch.Tensor) -> torch.Tensor:
    """``-x`` in any signed dtype; float8 has no arithmetic of its own, but float32 holds it exactly."""
    if not x.dtype.is_signed or x.dtype is torch.float8_e8m0fnu:
        raise RegaugeError("entries without a sign", expected="a signed dtype", found=str(x.dtype))
    return (-x.to(torch.float32)).to(x.dtype) if x.is_floating_point() and x.itemsize == 1 else -x


@dataclass(frozen=True, eq=False)
class Permutation(Element):
    """``y[k, i] = x[k, index[k, i]]``; index int64 [K, n]."""

    index: torch.Tensor
    kind: Kind = field(default=Kind.PERMUTATION, init=False)

    def __post_init__(self) -> None:
        need(self.index, torch.int64, "K, n", self.kind)

    @property
    def count(self) -> int:
        return self.index.shape[0]

    @property
    def n(self) -> int:
        return self.index.shape[1]

    @property
    def moves_only(self) -> bool:
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.count == 1:
            return x.index_select(1, self.index[0])
        return torch.stack([block.index_select(0, index) for block, index in zip(x, self.index, strict=True)])

    def inverse(self) -> Permutation:
        return Permutation(self.index.argsort(dim=1))


@dataclass(frozen=True, eq=False)
class Diagonal(Element):
    """``y[k, i] = vector[k, i] x[k, i]``; vector float64 [K, n], kind sign, positive or scale."""

    vector: torch.Tensor
    kind: Kind = Kind.SCALE

    def __post_init__(self) -> None:
        if self.kind not in DIAGONAL:
            raise RegaugeError("not a kind of diagonal", expected="sign, positive, scale", found=self.kind)
        need(self.vector, torch.float64, "K, n", self.kind)

    @property
    def count(self) -> int:
        return self.vector.shape[0]

    @property
    def n(self) -> int:
        return self.vector.shape[1]

    @property
    def moves_only(self) -> bool:
        return self.kind is Kind.SIGN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.moves_only:
            return torch.where((self.vector < 0)[:, :, None], _negative(x), x)
        return x * self.vector[:, :, None]

    def inverse_transpose(self, x: torch.Tensor) -> torch.Tensor:
        if self.moves_only:
            return self.forward(x)
        return x / self.vector[:, :, None]

    def power(self, exponent: Fraction | int) -> Diagonal:
        """Every entry to a rational power; of a negative entry, the real root if there is one.

        Raises:
            RegaugeError: an even root of a negative entry.
        """
        exponent = Fraction(exponent)
        if exponent.denominator % 2 == 0 and bool((self.vector < 0).any()):
            raise RegaugeError(
                "an even root of a negative scale is not real",
                expected="positive entries, or an exponent with an odd denominator",
                found=str(exponent),
            )
        size = self.vector.abs() ** float(exponent)
        odd = exponent.numerator % 2 == 1
        return Diagonal(torch.where(self.vector < 0, -size, size) if odd else size, self.kind)

    def apply(self, x: torch.Tensor, exponent: Fraction | int = 1) -> torch.Tensor:
        """``vector ** exponent`` times x, for any rational exponent (see ``power``)."""
        if exponent in (1, -1):
            return super().apply(x, exponent)
        return self.power(exponent).forward(x)

    def inverse(self) -> Diagonal:
        return Diagonal(1.0 / self.vector, self.kind)


_MATRIX_KINDS = frozenset({Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES, Kind.GENERAL_LINEAR, Kind.COMPLEX})


@dataclass(frozen=True, eq=False)
class Matrix(Element):
    """Dense matrices float64 [K, n, n]; kind orthogonal, orthogonal-fixing-ones, general-linear or complex.

    A complex number a + bi is the 2 × 2 matrix ``[[a, -b], [b, a]]``. ``contragredient`` is the inverse
    transpose; it is computed if not given, and is the matrix itself for the orthogonal kinds.
    """

    values: torch.Tensor
    kind: Kind = Kind.GENERAL_LINEAR
    contragredient: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in _MATRIX_KINDS:
            raise RegaugeError("not a kind of matrix", expected=", ".join(_MATRIX_KINDS), found=self.kind)
        need(self.values, torch.float64, "K, n, n", self.kind)
        if self.kind is Kind.COMPLEX and self.n != 2:
            raise RegaugeError("a complex number acts on a pair", expected="n = 2", found=f"n = {self.n}")
        if self.contragredient is None:
            object.__setattr__(self, "contragredient", self._inverse_transposed())

    def _inverse_transposed(self) -> torch.Tensor:
        if self.kind is Kind.COMPLEX:
            return self.values / self.values[:, :, :1].square().sum(dim=1, keepdim=True)
        if self.kind is Kind.GENERAL_LINEAR:
            inverse, info = torch.linalg.inv_ex(self.values)
            if bool(info.any()):
                raise RegaugeError("a matrix of the element is singular", expected="an invertible matrix")
            return inverse.mT.contiguous()
        return self.values

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def n(self) -> int:
        return self.values.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.values, x)

    def inverse_transpose(self, x: torch.Tensor) -> torch.Tensor:
        assert self.contragredient is not None
        return torch.bmm(self.contragredient, x)

    def inverse(self) -> Matrix:
        assert self.contragredient is not None
        return Matrix(self.contragredient.mT.contiguous(), self.kind, self.values.mT.contiguous())
