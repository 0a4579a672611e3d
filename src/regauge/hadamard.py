"""Hadamard matrices: entries ±1 and ``H Hᵀ = n I``, built at run time from number theory.

Constructions: Sylvester doubling, Paley I and II over any finite field, Williamson from four symmetric
circulants, and Kronecker products of these. Every matrix has the form ``H_K ⊗ H_{2^m}`` with the core
``K`` as small as these constructions allow, so that a fast Walsh-Hadamard transform does most of the work.
The matrices are in general *not* symmetric: the inverse is the transpose over n, never a second application.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from regauge.errors import Refused

Signs = npt.NDArray[np.int8]

# Four symmetric circulants A, B, C, D of order w with A² + B² + C² + D² = 4wI. The first entry of each is
# +1; bit i-1 of a number says that the entries i and w-i are -1. Checked by the test of H Hᵀ = nI.
_WILLIAMSON: dict[int, tuple[int, int, int, int]] = {
    23: (671, 752, 794, 1162),
    29: (9397, 11325, 5936, 8263),
    39: (88569, 512838, 179255, 248183),
    43: (1189991, 1993998, 1709460, 634626),
}


def hadamard(n: int) -> torch.Tensor:
    """A Hadamard matrix of order ``n``, always the same one: int8 [n, n], entries ±1, ``H Hᵀ = n I``.

    Raises:
        Refused: no construction known here gives this order; the way out names the nearest that do.
    """
    core, power = factor(n)
    return torch.from_numpy(_kron(_core(core), _sylvester(power)))


def hadamard_exists(n: int) -> bool:
    """Whether ``hadamard(n)`` can be constructed here. (False does not prove that none exists.)"""
    return _factor(n) is not None


def factor(n: int) -> tuple[int, int]:
    """``(K, P)`` with ``n = K P``, P a power of two, K the smallest core: ``H_n = H_K ⊗ H_P``.

    Raises:
        Refused: as ``hadamard``.
    """
    found = _factor(n)
    if found is None:
        raise Refused(
            f"no Hadamard matrix of order {n} can be constructed",
            expected="1, 2 or a multiple of 4 reached by the constructions of Sylvester, Paley or Williamson",
            found=str(n),
            way_out=f"use a random orthogonal or Householder element, or a nearby order: {_nearest(n)}",
        )
    return found


def fast_hadamard(x: torch.Tensor, axis: int, *, transpose: bool = False) -> torch.Tensor:
    """``(H_K ⊗ H_P) x / sqrt(n)`` along one axis, or with the transpose; orthogonal.

    Args:
        x: any floating-point tensor; left as it is.
        axis: the axis of size n to transform.
        transpose: apply the transpose, which is the inverse.

    Returns:
        float64, same shape as ``x``. Entry by entry the power-of-two part does the same additions in the
        same order however the other axes are cut.

    Raises:
        Refused: as ``hadamard``.
    """
    n = x.shape[axis]
    core, power = factor(n)
    moved = x.detach().to(torch.float64).movedim(axis, 0)
    y = moved.reshape(n, -1).clone(memory_format=torch.contiguous_format)
    spare = torch.empty_like(y)
    half = 1
    while half < power:
        pairs, result = y.view(-1, 2, half * y.shape[1]), spare.view(-1, 2, half * y.shape[1])
        torch.add(pairs[:, 0], pairs[:, 1], out=result[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=result[:, 1])
        y, spare = spare, y
        half *= 2
    if core > 1:
        matrix = torch.from_numpy(_core(core).astype(np.float64))
        torch.mm(matrix.T if transpose else matrix, y.view(core, -1), out=spare.view(core, -1))
        y = spare
    y *= n**-0.5
    return y.view(moved.shape).movedim(0, axis).contiguous()


@lru_cache(maxsize=4096)
def _factor(n: int) -> tuple[int, int] | None:
    """Smallest core first: K = odd part times as few twos as possible."""
    if n < 1:
        return None
    odd = n
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1, n
    core = 4 * odd
    while n % core == 0:
        if _recipe(core) is not None:
            return core, n // core
        core *= 2
    return None


@lru_cache(maxsize=4096)
def _recipe(n: int) -> tuple[str, int] | None:
    """How to build a core of order ``n``, a multiple of four that is no power of two."""
    if n % 4:
        return None
    if _prime_power(n - 1) is not None:  # n - 1 is 3 mod 4
        return "paley-1", n - 1
    if (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1) is not None:
        return "paley-2", n // 2 - 1
    if n // 4 in _WILLIAMSON:
        return "williamson", n // 4
    for left in range(12, int(n**0.5) + 1, 4):
        right = n // left
        proper = left * right == n and left & (left - 1) and right & (right - 1)
        if proper and _factor(left) is not None and _factor(right) is not None:
            return "kronecker", left
    return None


@lru_cache(maxsize=16)
def _core(n: int) -> Signs:
    if n == 1:
        return np.ones((1, 1), dtype=np.int8)
    recipe = _recipe(n)
    assert recipe is not None  # factor() chose n
    kind, order = recipe
    if kind == "kronecker":
        matrix = _kron(hadamard(order).numpy(), hadamard(n // order).numpy())
    else:
        matrix = {"paley-1": _paley_one, "paley-2": _paley_two, "williamson": _williamson}[kind](order)
    matrix.setflags(write=False)
    return matrix


def _kron(left: Signs, right: Signs) -> Signs:
    return np.kron(left, right).astype(np.int8, copy=False)


def _sylvester(n: int) -> Signs:
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < n:
        matrix = _kron(np.array([[1, 1], [1, -1]], dtype=np.int8), matrix)
    return matrix


def _paley_one(q: int) -> Signs:
    """``I + [[0, 1ᵀ], [-1, Q]]`` for q = 3 mod 4: Q is skew and ``Q Qᵀ = q I - 1 1ᵀ``, ``Q 1 = 0``."""
    matrix = np.ones((q + 1, q + 1), dtype=np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _jacobsthal(q)
    matrix[np.arange(1, q + 1), np.arange(1, q + 1)] = 1
    return matrix


def _paley_two(q: int) -> Signs:
    """``C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]`` for q = 1 mod 4, with ``C = [[0, 1ᵀ], [1, Q]]``."""
    conference = np.ones((q + 1, q + 1), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    first = np.array([[1, 1], [1, -1]], dtype=np.int8)
    second = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return _kron(conference, first) + _kron(np.eye(q + 1, dtype=np.int8), second)


def _williamson(w: int) -> Signs:
    """``[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]`` of symmetric circulants."""
    lag = (np.arange(w)[:, None] - np.arange(w)) % w
    lag = np.minimum(lag, w - lag)
    a, b, c, d = (
        np.array([1] + [1 - 2 * (bits >> i & 1) for i in range((w - 1) // 2)], dtype=np.int8)[lag]
        for bits in _WILLIAMSON[w]
    )
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def _jacobsthal(q: int) -> Signs:
    """``Q[a, b] = χ(a - b)`` over the field of q elements, χ(0) = 0, χ = 1 on squares, else -1."""
    prime_power = _prime_power(q)
    assert prime_power is not None  # _recipe() chose q
    p, degree = prime_power
    digits = _digits(np.arange(q), p, degree)
    character = np.full(q, -1, dtype=np.int8)
    character[_squares(digits, p)] = 1
    character[0] = 0
    difference = np.zeros((q, q), dtype=np.int32)
    for place in range(degree):
        column = digits[:, place].astype(np.int32)
        difference += p**place * ((column[:, None] - column) % p)
    return np.take(character, difference)


def _squares(digits: npt.NDArray[np.int64], p: int) -> npt.NDArray[np.int64]:
    """Index of x² for every x of the field whose elements are the polynomials with these digits."""
    degree = digits.shape[1]
    modulus = _irreducible(p, degree)
    square = np.zeros((len(digits), 2 * degree - 1), dtype=np.int64)
    for i in range(degree):
        for j in range(degree):
            square[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * degree - 2, degree - 1, -1):
        square[:, top - degree : top] -= square[:, top : top + 1] * modulus[:-1]
        square %= p
    return (square[:, :degree] % p) @ p ** np.arange(degree)


def _irreducible(p: int, degree: int) -> npt.NDArray[np.int64]:
    """Coefficients, constant first, of the first monic polynomial with no divisor of lower degree."""
    for code in range(p**degree):
        candidate = np.append(_digits(np.array([code]), p, degree)[0], 1)
        divisors = (
            np.append(_digits(np.array([low]), p, size)[0], 1)
            for size in range(1, degree // 2 + 1)
            for low in range(p**size)
        )
        if all(_remainder(candidate, divisor, p).any() for divisor in divisors):
            return candidate
    raise AssertionError(f"an irreducible polynomial of degree {degree} exists over every prime field")


def _remainder(
    dividend: npt.NDArray[np.int64], divisor: npt.NDArray[np.int64], p: int
) -> npt.NDArray[np.int64]:
    rest = dividend.copy()
    size = len(divisor) - 1
    for top in range(len(rest) - 1, size - 1, -1):
        rest[top - size : top + 1] = (rest[top - size : top + 1] - rest[top] * divisor) % p
    return rest[:size]


def _digits(values: npt.NDArray[Any], p: int, count: int) -> npt.NDArray[np.int64]:
    return (values[:, None] // p ** np.arange(count)) % p


@lru_cache(maxsize=4096)
def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with q = p^k and p an odd prime, else None."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, int(q**0.5) + 2, 2) if q % d == 0), q)
    power = 0
    while q % p == 0:
        q, power = q // p, power + 1
    return (p, power) if q == 1 else None


def _nearest(n: int) -> str:
    below = next((k for k in range(n - 1, 0, -1) if hadamard_exists(k)), None)
    above = next(k for k in range(max(n, 0) + 1, 8 * max(n, 1) + 2) if hadamard_exists(k))
    return " or ".join(str(k) for k in (below, above) if k is not None)
