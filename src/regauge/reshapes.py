"""Which axes of a reshape's input and output hold the same positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Axes of a reshape's input and output that hold the same positions."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def align(sizes: Sequence[int], shape: Sequence[int]) -> list[Group]:
    """Smallest groups of consecutive axes with equal products; axes of size one belong to none."""
    left = [i for i, n in enumerate(sizes) if n != 1]
    right = [j for j, n in enumerate(shape) if n != 1]
    groups: list[Group] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        p, q = sizes[left[i]], shape[right[j]]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                a.append(left[i])
                p *= sizes[left[i]]
                i += 1
            else:
                b.append(right[j])
                q *= shape[right[j]]
                j += 1
        groups.append(Group(tuple(a), tuple(b)))
    return groups
