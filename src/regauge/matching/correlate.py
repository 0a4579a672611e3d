"""Inner products of corresponding blocks, summed over everything that corresponds already."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regauge.atlas import Action, Generator
from regauge.blocks import view_block
from regauge.matching.moved import Pair
from regauge.matching.order import View, sizes_of

LARGEST = 1 << 27
"""Entries of a table of inner products; what would need more is not looked at."""


@dataclass(frozen=True)
class Products:
    """Inner products of one action.

    Attributes:
        view: the action and what is loose.
        cross: ⟨a, b⟩, [K, P, U, n, U, n]: copies, factors kept apart, mixed factors, acting index.
        own_a, own_b: ⟨a, a⟩ and ⟨b, b⟩ for equal acting index, [K, P, n, U, U].
        features: how many products each sum has.
    """

    view: View
    cross: torch.Tensor
    own_a: torch.Tensor
    own_b: torch.Tensor
    features: int


def products(pair: Pair, generator: Generator, view: View) -> Products | None:
    """The inner products of one action, or None if there would be too many."""
    action = view.action
    sizes = sizes_of(action)
    copies = tuple(name for name, _ in generator.copies)
    k = math.prod(sizes[name] for name in copies)
    p = math.prod(sizes[name] for name in view.apart)
    u = math.prod(sizes[name] for name in view.mixed)
    n = generator.size
    if k * p * (u * n) ** 2 > LARGEST:
        return None
    held = (*copies, *view.apart, *view.mixed, action.acting)
    shape = pair.a.shapes[action.parameter]
    cross = torch.zeros(k, p, u * n, u * n, dtype=torch.float64)
    own_a = torch.zeros(k, p, n, u, u, dtype=torch.float64)
    own_b = own_a.clone()
    features = 0
    rows = pair.sample(action, held)
    for whole_a, whole_b in (
        pair.chunks(action.parameter) if rows is None else pair.ranges(action.parameter, rows)
    ):
        x, y = (
            view_block(whole, action, held, shape).reshape(k, p, u * n, -1) + action.chart
            for whole in (whole_a, whole_b)
        )
        cross += x @ y.mT
        for own, z in ((own_a, x), (own_b, y)):
            units = z.view(k, p, u, n, -1).transpose(2, 3)
            own += units @ units.mT if u > 1 else units.square().sum(-1, keepdim=True)
        features += x.shape[-1]
    return Products(view, cross.view(k, p, u, n, u, n), own_a, own_b, features * u * p)


def crossed(pair: Pair, generator: Generator, view: View) -> torch.Tensor:
    """For a view of level 0: ⟨a, b⟩ between all acting indices, [K, n, n]."""
    total = torch.zeros(generator.count, generator.size, generator.size, dtype=torch.float64)
    for x, y in _blocks(pair, generator, view.action):
        total += x @ y.mT
    return total


def grams(pair: Pair, generator: Generator, view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a view of level 0: ⟨a, b⟩, ⟨a, a⟩, ⟨b, b⟩ between all acting indices, [K, n, n] each."""
    k, n = generator.count, generator.size
    found = [torch.zeros(k, n, n, dtype=torch.float64) for _ in range(3)]
    for x, y in _blocks(pair, generator, view.action):
        for total, (left, right) in zip(found, ((x, y), (x, x), (y, y)), strict=True):
            total += left @ right.mT
    return found[0], found[1], found[2]


def _blocks(pair: Pair, generator: Generator, action: Action) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The block of a and that of b in pieces, [K, n, features] each."""
    held = (*(name for name, _ in generator.copies), action.acting)
    shape = pair.a.shapes[action.parameter]
    for wholes in pair.chunks(action.parameter):
        x, y = (
            view_block(whole, action, held, shape).reshape(generator.count, generator.size, -1) + action.chart
            for whole in wholes
        )
        yield x, y


def diagonals(
    pair: Pair, action: Action, held: tuple[str, ...], *, sampled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """⟨a, b⟩, ⟨a, a⟩, ⟨b, b⟩ over all but some factors and the acting one, [*sizes of held, n] each.

    With ``sampled`` a long table is looked at in part, which is enough for signs.
    """
    sizes = sizes_of(action)
    kept = tuple(sizes[name] for name in (*held, action.acting))
    shape = pair.a.shapes[action.parameter]
    found = [torch.zeros(kept, dtype=torch.float64) for _ in range(3)]
    rows = pair.sample(action, (*held, action.acting)) if sampled else None
    chunks = pair.chunks(action.parameter) if rows is None else pair.ranges(action.parameter, rows)
    for whole_a, whole_b in chunks:
        x, y = (
            view_block(whole, action, (*held, action.acting), shape).reshape(*kept, -1) + action.chart
            for whole in (whole_a, whole_b)
        )
        for total, (left, right) in zip(found, ((x, y), (x, x), (y, y)), strict=True):
            total += (left * right).sum(-1)
    return found[0], found[1], found[2]
