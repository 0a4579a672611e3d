"""What of a tensor stays when its model is moved along its gauge, measured against tables known already.

An *anchor* of a size n is a table E, [rows, n], of which the same rows are known in both models: of a
vocabulary, of positions, of what is named already. A rotation or permutation of an axis of size n acts on E
and on every tensor W with that axis alike, so that E W does not change; where signs differ, E² W² does not.
An orthogonal map of the other axes of W leaves E W (E W)ᵀ as it is, and a scale of single entries does if
columns are brought to norm one. A vector is carried from one model to the other by E_A⁺ E_B. With the wrong
axis or the wrong anchor both models give numbers that have nothing to do with each other: a cosine near zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROWS = 128
"""Rows of an anchor that matrices are compared by."""
LARGEST = 4096
"""Rows of an anchor at most, and the largest size of vectors that are carried over."""

_ROUNDING = 2e-2
"""Singular values below this share of the largest are not trusted."""


def anchors_of(value: torch.Tensor) -> list[torch.Tensor]:
    """The tables, [rows, n] float64, of a tensor: one for each axis, its other axes taken together."""
    if value.dim() < 2:
        return []
    found: list[torch.Tensor] = []
    for axis in range(value.dim()):
        table = value.movedim(axis, -1).reshape(-1, value.shape[axis])
        rows = min(LARGEST, max(ROWS, 2 * table.shape[1]))
        found.append(evenly(table, rows).to(torch.float64))
    return found


def crossing(weight: torch.Tensor, size: int) -> torch.Tensor:
    """W⁺, [size, n], of a matrix W, [n, size] or [size, n]: with E of the one axis E W⁺ is of the other.

    A map G of that axis sends W to G W and a vector b on it to G b, and leaves E W⁺ b as it is.
    """
    w = weight.to(torch.float64)
    return _inverse(w if w.shape[1] == size else w.mT)


def carriers(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What brings the vectors of each model to a common frame, [n, n], from the same anchor in both.

    E_A⁺ E_A, which is one where E_A has full rank, and E_A⁺ E_B.
    """
    inverse = _inverse(a)
    return inverse @ a, inverse @ b


def _inverse(table: torch.Tensor) -> torch.Tensor:
    """The pseudoinverse, without directions that rounding may have made."""
    values, vectors = torch.linalg.eigh(table.mT @ table)
    kept = values > _ROUNDING**2 * values[-1].clamp_min(1e-300)
    return (vectors[:, kept] / values[kept]) @ vectors[:, kept].mT @ table.mT


def evenly(table: torch.Tensor, count: int = ROWS) -> torch.Tensor:
    """So many rows of a table, evenly."""
    rows = table.shape[0]
    return table if rows <= count else table[torch.arange(count) * (rows - 1) // (count - 1)]


def matrix_features(value: torch.Tensor, anchors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of a tensor of two axes or more: unit vectors, in a fixed order; zero where there is nothing to see.

    Args:
        value: float64.
        anchors: of the same model as ``value``, in the order in which the other model has them.
    """
    rows = evenly(value.reshape(value.shape[0], -1))
    found = [_unit(rows @ rows.mT)]  # Its rows may have the same order in both models.
    for anchor in anchors:
        table = evenly(anchor)
        norms = table.square().sum(1, keepdim=True)
        gram, product = _unit(table @ table.mT), _unit(norms @ norms.mT)
        for axis in range(value.dim()):
            if value.shape[axis] != table.shape[1]:
                continue
            flat = value.movedim(axis, 0).reshape(table.shape[1], -1)
            for seen, common in (
                (table @ flat, gram),
                (table.square() @ flat.square(), product),
            ):
                units = seen / seen.norm(dim=0).clamp_min(1e-300)
                found.extend(_unit(one @ one.mT, common) for one in (seen, units))
    return found


def vector_features(value: torch.Tensor, held: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of a vector: itself and its sizes, in the frames ``held``; zero if all its entries are equal."""
    found: list[torch.Tensor] = []
    for carrier in held:
        found.append(_unit(carrier @ (value - value.mean())))
        found.append(_unit(carrier.square() @ value.abs()))
    constant = bool((value == value[:1]).all())
    return [torch.zeros_like(one) for one in found] if constant else found


def directions(value: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """What scales of n groups leave of a vector, [m, n]: sizes in each group. Of norm one, or zero."""
    n, m = group
    table = value.reshape(m, n).abs()
    return _unit(table / table.norm(dim=0).clamp_min(1e-300) - m**-0.5)


def _unit(seen: torch.Tensor, common: torch.Tensor | None = None) -> torch.Tensor:
    """Without what every row shares, and without the part along ``common``, a unit; of norm one or zero."""
    flat = _centred(seen).reshape(-1)
    if common is not None:
        flat = flat - common * float(flat @ common)
    norm = float(flat.norm())
    return flat / norm if norm > 1e-12 else torch.zeros_like(flat)


def _centred(seen: torch.Tensor) -> torch.Tensor:
    seen = seen - seen.mean(0, keepdim=True)
    return seen - seen.mean(1, keepdim=True) if seen.dim() > 1 else seen
