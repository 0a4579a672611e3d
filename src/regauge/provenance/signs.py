"""Fixed random signs: entry (i, j) depends on i and j alone, on every machine and in every version."""

from __future__ import annotations

import numpy as np
import torch

_ADD = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def signs(rows: int, columns: int, start: int = 0) -> torch.Tensor:
    """±1 in float64 [rows, columns], columns at most 64: bits of SplitMix64 (Steele, Lea, Flood 2014) of
    the row's number, counted from ``start``. More rows leave the earlier ones as they are.
    """
    with np.errstate(over="ignore"):
        x = (np.arange(start, start + rows, dtype=np.uint64) + np.uint64(1)) * _ADD
        for shift, factor in zip((30, 27), _MIX, strict=True):
            x = (x ^ (x >> np.uint64(shift))) * factor
        x ^= x >> np.uint64(31)
    bits = (x[:, None] >> np.arange(columns, dtype=np.uint64)[None, :]) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)
