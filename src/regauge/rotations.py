"""Elements that are never written out as matrices: reflections, Hadamard rotations, products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from regauge.atlas import Kind
from regauge.errors import RegaugeError
from regauge.groups import Element, need
from regauge.hadamard import fast_hadamard


@dataclass(frozen=True, eq=False)
class Householder(Element):
    """Product ``R_1 R_2 … R_r`` of reflections ``I - 2 v vᵀ / vᵀv``; vectors float64 [K, r, n].

    A zero vector stands for the identity. Kind orthogonal, or orthogonal-fixing-ones if every vector
    sums to zero. Costs 2 r n m operations instead of n² m.
    """

    vectors: torch.Tensor
    kind: Kind = Kind.ORTHOGONAL

    def __post_init__(self) -> None:
        if self.kind not in (Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES):
            raise RegaugeError("reflections are orthogonal", expected="an orthogonal kind", found=self.kind)
        need(self.vectors, torch.float64, "K, r, n", self.kind)

    @property
    def count(self) -> int:
        return self.vectors.shape[0]

    @property
    def n(self) -> int:
        return self.vectors.shape[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in reversed(range(self.vectors.shape[1])):
            v = self.vectors[:, step, :, None]
            square = (v * v).sum(dim=1, keepdim=True)
            weight = torch.where(square > 0, 2.0 / square.clamp_min(1e-300), 0.0)
            x = x - v @ ((v.mT @ x) * weight)
        return x

    def inverse(self) -> Householder:
        return Householder(self.vectors.flip(1), self.kind)


@dataclass(frozen=True, eq=False)
class RandomHadamard(Element):
    """``H diag(signs)`` with the normalised Hadamard matrix of order n; signs float64 [K, n], ±1.

    With ``transposed`` it is the inverse, ``diag(signs) Hᵀ``. Costs n K_core m + n m log n.
    """

    signs: torch.Tensor
    transposed: bool = False
    kind: Kind = field(default=Kind.ORTHOGONAL, init=False)

    def __post_init__(self) -> None:
        need(self.signs, torch.float64, "K, n", self.kind)

    @property
    def count(self) -> int:
        return self.signs.shape[0]

    @property
    def n(self) -> int:
        return self.signs.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = self.signs[:, :, None]
        if self.transposed:
            return signs * fast_hadamard(x, 1, transpose=True)
        return fast_hadamard(x * signs, 1)

    def inverse(self) -> RandomHadamard:
        return RandomHadamard(self.signs, not self.transposed)


@dataclass(frozen=True, eq=False)
class Product(Element):
    """``parts[0] parts[1] …``: the last part acts first. All parts have the same K and n."""

    parts: tuple[Element, ...]
    kind: Kind = Kind.GENERAL_LINEAR

    def __post_init__(self) -> None:
        if len({(part.count, part.n) for part in self.parts}) != 1:
            found = ", ".join(f"K={part.count} n={part.n}" for part in self.parts)
            raise RegaugeError(
                "elements of different shapes", expected="one K and one n", found=found or "none"
            )

    @property
    def count(self) -> int:
        return self.parts[0].count

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def moves_only(self) -> bool:
        return all(part.moves_only for part in self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            x = part.forward(x)
        return x

    def inverse_transpose(self, x: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            x = part.inverse_transpose(x)
        return x

    def inverse(self) -> Product:
        return Product(tuple(part.inverse() for part in reversed(self.parts)), self.kind)
