"""Sketches of invariant products, and the one vector made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from regauge.errors import Refused
from regauge.provenance.anchors import COUNT, Anchors, Streams, find_anchors, is_leg, project
from regauge.provenance.network import Block, Network
from regauge.provenance.products import Factor, Product, products

HALF = COUNT // 2
BANDS: Mapping[str, int] = {"edge": 2, "pair": 4, "other": 2}
"""Cosines over relative depth, by sort of product: 0 is the mean over all layers."""
LENGTH = sum(BANDS.values()) * HALF * HALF
NOTHING = 1e-9
"""Relative size below which a product is taken for zero: a layer that does nothing is no layer."""


@dataclass(frozen=True)
class Sketches:
    """What was seen of a model.

    Attributes:
        vector: float64 [LENGTH], of norm one.
        counts: sort of product -> how many are in the vector.
        missing: parameters that are in no product.
        singles: each product's sketch, float64 [HALF, HALF] of norm one, in order of use.
    """

    vector: np.ndarray
    counts: Mapping[str, int]
    missing: tuple[str, ...]
    singles: tuple[tuple[str, np.ndarray], ...]


def anchored(net: Network) -> tuple[dict[str, Anchors], tuple[Product, ...], tuple[Block, ...]]:
    """Anchors for as many streams as are needed, the products between them, and the blocks in none.

    Streams that meet a table of fixed axes come first, others only while a block is in no product.
    """
    streams: dict[str, Anchors] = {}
    fixed = [n for n in _in_order(net) if _meets_fixed(net, n)]
    for name in fixed:
        found = find_anchors(net, streams, name)
        if found is not None:
            streams[name] = found
    while True:
        _, missing = products(net, streams, waiting=True)
        waiting = [n for block in missing for n in block.names if n in net.streams and n not in streams]
        found = None
        for name in dict.fromkeys(waiting):
            found = find_anchors(net, streams, name)
            if found is not None:
                streams[name] = found
                break
        if found is None:
            done, missing = products(net, streams, waiting=False)
            return streams, done, missing


def sketches(net: Network, progress: Callable[[int, int], None] | None = None) -> Sketches:
    """The sketches of a network.

    Raises:
        Refused: nothing of the model can be seen apart from its gauge.
    """
    streams, done, missing = anchored(net)
    kept: dict[str, torch.Tensor] = {}
    last = {_key(factor): place for place, product in enumerate(done) for factor in product.factors}
    seen_of: list[np.ndarray | None] = []
    for place, product in enumerate(done):
        for factor in product.factors:
            if _key(factor) not in kept:
                kept[_key(factor)] = project(net, streams, factor.block, factor.gains)
        seen_of.append(_sketch(net, streams, product, [kept[_key(factor)] for factor in product.factors]))
        for key in [key for key in kept if last[key] <= place]:
            del kept[key]
        if progress is not None:
            progress(place + 1, len(done))
    singles = _of_use(net, streams, done, seen_of)
    if not singles:
        raise Refused(
            "nothing of this model can be told apart from its gauge",
            expected="a table of tokens, positions, pixels or classes that reads or writes a space",
            found=f"{len(net.blocks)} blocks, {len(net.streams)} spaces",
        )
    counts = {sort: sum(1 for s, _ in singles if s == sort) for sort in BANDS}
    names = tuple(dict.fromkeys(block.parameter for block in missing))
    return Sketches(_pooled(singles), counts, names, singles)


def _of_use(
    net: Network, streams: Streams, done: Sequence[Product], seen: Sequence[np.ndarray | None]
) -> tuple[tuple[str, np.ndarray], ...]:
    """The sketches without those of indices that lead to nothing: with values or outputs of zero, it does
    not matter what the queries and keys of the same heads are.
    """
    dead: set[str] = set()
    for product, sketch in zip(done, seen, strict=True):
        if sketch is None:
            dead.update(_inner(net, streams, product))
    return tuple(
        (product.sort, sketch)
        for product, sketch in zip(done, seen, strict=True)
        if sketch is not None and not dead.intersection(_inner(net, streams, product))
    )


def _inner(net: Network, streams: Streams, product: Product) -> list[str]:
    names = (name for factor in product.factors for name in factor.block.names)
    return [name for name in names if not is_leg(net, streams, name)]


def _in_order(net: Network) -> list[str]:
    return list(dict.fromkeys(n for block in net.blocks for n in block.names if n in net.streams))


def _meets_fixed(net: Network, name: str) -> bool:
    return any(
        name in block.names and any(n in net.fixed for n in block.names)
        and all(n in net.fixed or n == name for n in block.names)
        for block in net.blocks
    )  # fmt: skip


def _key(factor: Factor) -> str:
    return repr((factor.block.index, [(gain.index, power) for gain, power in factor.gains]))


def _sketch(
    net: Network, streams: Streams, product: Product, values: Sequence[torch.Tensor]
) -> np.ndarray | None:
    """Σ over inner factors, between the first half of the anchors and the second half."""
    letters: dict[str, int] = {}
    operands: list[object] = []
    free = iter(range(1000, 2000))
    mixer = torch.tensor([(-1.0) ** (j * (j + 1) // 2) for j in range(COUNT)], dtype=torch.float64)
    size = 1.0
    wanted = 2 if len(product.factors) == 1 else 1
    ends: list[int] = []
    for place, (factor, value) in enumerate(zip(product.factors, values, strict=True)):
        legs = [dim for dim, name in enumerate(factor.block.names) if is_leg(net, streams, name)]
        legs.sort(key=lambda dim: (factor.block.names[dim] not in streams, -factor.block.factors[dim][1]))
        keep = legs[:wanted] if place < 2 else []
        own: list[int] = []
        for dim, name in enumerate(factor.block.names):
            if dim in keep:
                own.append(next(free))
                ends.append(own[-1])
            elif dim in legs:
                own.append(next(free))
                operands += [mixer, [own[-1]]]
            else:
                own.append(letters.setdefault(name, len(letters)))
        operands += [value, own]
        size *= float(value.norm())
    seen = _einsum(operands, ends)
    while seen.dim() < 2:
        seen = torch.stack([seen] * COUNT, dim=-1) if seen.dim() else seen.expand(COUNT)
    block = seen[:HALF, HALF:]
    norm = float(block.norm())
    if norm <= NOTHING * size:
        return None
    return (block / norm).numpy()


def _einsum(operands: Sequence[object], ends: Sequence[int]) -> torch.Tensor:
    """``torch.einsum`` with its letters renumbered to the range that it takes."""
    number: dict[int, int] = {}
    out: list[object] = []
    for item in operands:
        if isinstance(item, list):
            out.append([number.setdefault(letter, len(number)) for letter in item])
        else:
            out.append(item)
    return torch.einsum(*out, [number[letter] for letter in ends])


def _pooled(singles: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    pieces: list[np.ndarray] = []
    for sort, bands in BANDS.items():
        held = [sketch.reshape(-1) for s, sketch in singles if s == sort]
        piece = np.zeros((bands, HALF * HALF))
        for place, sketch in enumerate(held):
            depth = (place + 0.5) / len(held)
            for band in range(bands):
                piece[band] += sketch * math.cos(math.pi * band * depth)
        norm = float(np.linalg.norm(piece))
        pieces.append((piece / norm if norm else piece).reshape(-1))
    whole = np.concatenate(pieces)
    return whole / np.linalg.norm(whole)
