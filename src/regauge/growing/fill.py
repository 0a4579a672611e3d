"""What new entries hold: nothing that anybody sees, and yet something that training can take hold of.

========  ====================================  =========================================
new       on the silent side                    on the other side
========  ====================================  =========================================
zero      0                                     drawn, as wide as the tensor's entries
pairs     v and −v, v drawn                     the same for both of a pair, drawn
split     copies of an old index, times shares  copies of the same old index
          that add up to one
========  ====================================  =========================================

With ``zero`` the silent side has a gradient at once and the other side after one step. With ``pairs`` and
``split`` both have one at once, and the two of a pair, or copies with unequal shares, part in training.
Sources: Gesmundo and Maile, Composable Function-preserving Expansions (arXiv 2308.06103); Chen et al.,
Net2Net (arXiv 1511.05641, section 2), whose shares are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from regauge.growing.sizes import GrownAxis, positions


class New(StrEnum):
    ZERO = "zero"
    PAIRS = "pairs"
    SPLIT = "split"


@dataclass(frozen=True, eq=False)
class Fill:
    """How the indices of a grown set are filled.

    Attributes:
        source: int64 [m]: index whose entries each index shares; itself for old ones and for drawn ones.
        weight: float64 [m]: factor on the silent side.
    """

    source: torch.Tensor
    weight: torch.Tensor


def fill(new: New, n: int, m: int, noise: float, random: torch.Generator) -> Fill:
    """From n to m indices. ``noise``: how unequal the shares of ``split`` are, 0 (equal) to below 1."""
    source = torch.arange(m)
    weight = torch.ones(m, dtype=torch.float64)
    if new is New.SPLIT:
        source[n:] = torch.randint(n, (m - n,), generator=random)
        raw = 1 + noise * (2 * torch.rand(m, generator=random, dtype=torch.float64) - 1)
        total = torch.zeros(n, dtype=torch.float64).index_add_(0, source, raw)
        weight = raw / total[source]
    elif new is New.PAIRS:
        step = torch.arange(m - n)
        source[n:] = n + step - step % 2
        weight[n:] = 1.0 - 2.0 * (step % 2)
        if (m - n) % 2:
            weight[m - 1] = 0.0
    else:
        weight[n:] = 0.0
    return Fill(source, weight)


def grown(
    old: torch.Tensor,
    axes: Sequence[GrownAxis],
    fills: Mapping[int, Fill],
    silent: Sequence[tuple[int, int, int]],
    scales: Mapping[tuple[int, int], float],
    chart: float,
    seed: int,
) -> torch.Tensor:
    """A parameter after growth, float64.

    Args:
        old: its value, any floating dtype.
        axes: one for each of its axes.
        fills: atom id -> how its indices are filled.
        silent: (axis, offset of the leaf, atom id) along which it is a silent side.
        scales: (axis, offset of the leaf) -> factor on all its entries.
        chart: added to the stored value before anything else, and subtracted at the end (1 for gains 1 + w).
        seed: of what is drawn: normal with the standard deviation of ``old``, or for vectors their mean.
    """
    old = old.to(torch.float64) + chart
    factors = [_factor(number, axis, fills, silent, scales) for number, axis in enumerate(axes)]
    value = torch.zeros([axis.size for axis in axes], dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    level, spread = (old.mean(), 0.0) if old.dim() < 2 else (0.0, float(old.std()))
    for number, axis in enumerate(axes):
        fresh = torch.ones(axis.size, dtype=torch.bool)
        fresh[axis.old] = False
        places = fresh.nonzero().flatten()
        if not len(places) or not bool(factors[number][places].any()):
            continue
        shape = [len(places) if d == number else n for d, n in enumerate(value.shape)]
        drawn = torch.randn(shape, generator=random, dtype=torch.float64) * spread + level
        value.index_copy_(number, places, drawn)
    value[torch.meshgrid(*[axis.old for axis in axes], indexing="ij")] = old
    for number, axis in enumerate(axes):
        origin = torch.arange(axis.size)
        for (atom, offset), index in axis.index.items():
            inside = index >= 0
            source = fills[atom].source[index[inside]]
            origin[inside] += (source - index[inside]) * axis.stride[atom, offset]
        if bool((origin != torch.arange(axis.size)).any()):
            value = value.index_select(number, origin)
        if bool((factors[number] != 1).any()):
            value *= factors[number].reshape([-1 if d == number else 1 for d in range(value.dim())])
    return value - chart if chart else value


def _factor(
    number: int,
    axis: GrownAxis,
    fills: Mapping[int, Fill],
    silent: Sequence[tuple[int, int, int]],
    scales: Mapping[tuple[int, int], float],
) -> torch.Tensor:
    """What multiplies the entries at each position of an axis."""
    factor = torch.ones(axis.size, dtype=torch.float64)
    for (atom, offset), index in axis.index.items():
        if (number, offset, atom) in silent:
            inside = index >= 0
            factor[inside] *= fills[atom].weight[index[inside]]
    for leaf in axis.leaves:
        if (number, leaf.offset) in scales:
            factor[positions(leaf)] *= scales[number, leaf.offset]
    return factor
