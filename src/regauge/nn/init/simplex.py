"""Fixed classifiers whose rows are as far apart as possible."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from regauge.errors import BadInput, Refused
from regauge.nn.init.weights import fill, normal, orthonormal


def simplex(classes: int) -> torch.Tensor:
    """Rows v_1 … v_K [K, K−1] in float64 of a regular simplex: |v| = 1, Σ v = 0, v_i · v_j = −1/(K−1).

    e_1 … e_{K−1} and (1 − √K)/(K−1) · 1, less their centroid, divided by their norms.

    Source: Pernici et al., Regular Polytope Networks (arXiv 2103.15632, section 3).

    Raises:
        BadInput: K < 2.
    """
    if classes < 2:
        raise BadInput("a simplex needs two classes", found=str(classes))
    rows = torch.eye(classes, classes - 1, dtype=torch.float64)
    rows[-1] = (1 - math.sqrt(classes)) / (classes - 1)
    rows = rows - rows.mean(0)
    return rows / rows.norm(dim=1, keepdim=True)


def simplex_(
    tensor: torch.Tensor, *, rotated: bool = False, generator: torch.Generator | None = None
) -> torch.Tensor:
    """W = [simplex, 0] · Qᵀ, the weight [K, d] of a classifier, d ≥ K−1; Q = I, or orthogonal and random.

    Args:
        tensor: filled in place. It is meant to stay as it is: set requires_grad to False.
        rotated: with a random Q, so that all d features are used.
        generator: of Q.

    Raises:
        Refused: no matrix, or fewer than K − 1 columns.
    """
    if tensor.dim() != 2 or tensor.shape[1] < tensor.shape[0] - 1:
        raise Refused(
            "a regular simplex does not fit",
            expected="[K, d] with d ≥ K − 1",
            found=str(tuple(tensor.shape)),
            way_out="equiangular_ for more classes than features",
        )
    classes, d = tensor.shape
    rows = simplex(classes)
    if not rotated:
        return fill(tensor, functional.pad(rows, (0, d - classes + 1)))
    q = orthonormal(d, classes - 1, generator)
    return fill(tensor, rows.to(q.device) @ q.T)


def welch_bound(count: int, size: int) -> float:
    """√((N − d) / (d (N − 1))), below which max |cos| of N > d vectors in d dimensions cannot be; else 0."""
    return math.sqrt((count - size) / (size * (count - 1))) if count > size else 0.0


def equiangular_(
    tensor: torch.Tensor,
    threshold: float = 0.0,
    *,
    steps: int = 10_000,
    rate: float = 0.1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Unit rows of W [N, d] with |W_i · W_j| ≤ t + 1e-4 for i ≠ j.

    N ≤ d: orthonormal rows, for any t. Otherwise descent on Σ_{i≠j} relu(|W_i · W_j| − t)²/2 with rows put
    back to norm 1 after every step (the authors use the first power, one slice of rows at a time).

    Source: Shen, Sun, Wei, Equiangular Basis Vectors (arXiv 2303.11637, section 3.2).

    Args:
        tensor: filled in place.
        threshold: t, at least the Welch bound √((N − d)/(d (N − 1))).
        steps: at most.
        rate: of the descent.
        generator: of the start.

    Raises:
        Refused: t is below the bound, or was not reached; nothing is changed then.
    """
    if tensor.dim() != 2:
        raise Refused("these are no rows", expected="[N, d]", found=str(tuple(tensor.shape)))
    count, d = tensor.shape
    if count <= d:
        return fill(tensor, orthonormal(count, d, generator))
    if threshold < welch_bound(count, d):
        raise Refused(
            "no such vectors exist",
            expected=f"a threshold of at least {welch_bound(count, d):.4f}",
            found=str(threshold),
        )
    rows = normal((count, d), generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    worst = 1.0
    for _ in range(steps):
        cosines = rows @ rows.T
        cosines.fill_diagonal_(0)
        worst = float(cosines.abs().max())
        if worst <= threshold + 1e-4:
            return fill(tensor, rows)
        excess = cosines.sign() * functional.relu(cosines.abs() - threshold)
        rows = rows - rate * 2 * excess @ rows
        rows = rows / rows.norm(dim=1, keepdim=True)
    raise Refused(
        "the vectors were not found",
        expected=f"|cos| ≤ {threshold}",
        found=f"{worst:.4f} after {steps} steps",
        way_out="a larger threshold, or more steps",
    )
