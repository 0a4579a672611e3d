"""Parameters after some of their indices have gone: the reverse of :mod:`regauge.growing.fill`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch

from regauge.growing.sizes import GrownAxis, positions


def shrunk(
    old: torch.Tensor,
    axes: Sequence[GrownAxis],
    goes: Mapping[int, torch.Tensor],
    silent: Set[tuple[int, int, int]],
    scales: Mapping[tuple[int, int], float],
    chart: float,
) -> torch.Tensor:
    """y[…, g, …] = Σ_{i → g} x[…, i, …] along silent sides, x[…, first i → g, …] along the others; float64.

    Args:
        old: the value, any floating dtype.
        axes: one for each of its axes.
        goes: atom id -> int64 [old size]: the new index that each old one becomes, -1 if it goes.
        silent: (axis, offset of the leaf, atom id) along which indices that become one are added.
        scales: (axis, offset of the leaf) -> factor on all its entries.
        chart: added to the stored value before anything else, and subtracted at the end (1 for gains 1 + w).
    """
    value = old.to(torch.float64)
    merged = {atom for atom, held in goes.items() if bool((torch.bincount(held[held >= 0]) > 1).any())}
    computed = bool(scales) or any(atom in merged for _, _, atom in silent)
    if computed:
        value = value + chart
    for number, axis in enumerate(axes):
        before, after = _places(axis, goes, {(o, a) for n, o, a in silent if n == number})
        shape = [axis.size if d == number else n for d, n in enumerate(value.shape)]
        value = torch.zeros(shape, dtype=torch.float64).index_add(
            number, after, value.index_select(number, before)
        )
        for leaf in axis.leaves:
            if (number, leaf.offset) in scales:
                factor = torch.ones(axis.size, dtype=torch.float64)
                factor[positions(leaf)] = scales[number, leaf.offset]
                value = value * factor.reshape([-1 if d == number else 1 for d in range(value.dim())])
    return value - chart if computed else value


def _places(
    axis: GrownAxis, goes: Mapping[int, torch.Tensor], silent: Set[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Old positions, and the new position that each of them is added to."""
    froms: list[torch.Tensor] = []
    tos: list[torch.Tensor] = []
    for leaf in axis.leaves:
        before, after = torch.tensor([leaf.offset]), torch.tensor([leaf.grown_offset])
        for atom, n, step, _, wide in leaf.factors:
            i = j = torch.arange(n)
            if atom in goes:
                i = (goes[atom] >= 0).nonzero()[:, 0]
                if (leaf.offset, atom) not in silent:
                    i = i[firsts(goes[atom][i])]
                j = goes[atom][i]
            before = (before[:, None] + i * step).flatten()
            after = (after[:, None] + j * wide).flatten()
        froms.append(before)
        tos.append(after)
    return torch.cat(froms), torch.cat(tos)


def firsts(groups: torch.Tensor) -> torch.Tensor:
    """int64: where each value occurs first."""
    seen: dict[int, int] = {}
    for place, group in enumerate(groups.tolist()):
        seen.setdefault(group, place)
    return torch.tensor(list(seen.values()), dtype=torch.int64)
