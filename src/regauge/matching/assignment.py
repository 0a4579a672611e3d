"""Linear assignment: what goes with what, so that the sum of the scores is largest."""

from __future__ import annotations

import torch


def assigned(scores: torch.Tensor) -> torch.Tensor:
    """index[k, i] = j: the j that goes with i in table k.

    Args:
        scores: float64 [K, n, m] with n ≤ m.

    Returns:
        int64 [K, n]; no j occurs twice in a row.
    """
    from scipy.optimize import linear_sum_assignment

    found = [linear_sum_assignment(table.numpy(), maximize=True)[1] for table in scores]
    return torch.stack([torch.from_numpy(index).to(torch.int64) for index in found])
