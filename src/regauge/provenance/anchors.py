"""Anchors: vectors of a stream that move with its gauge and with nothing else.

A block of a table whose other axes nothing moves (token × stream) gives such vectors: fixed combinations of
its rows. They are made independent of one another and of what all rows have in common, so that what is
seen between them differs from model to model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from regauge.provenance.network import SCALES, Block, Network
from regauge.provenance.signs import signs

COUNT = 16
"""Anchors of a stream: the first half is used on one side of a map, the second half on the other."""
FLOOR = 1e-3
"""Added to the spectrum, relative to its mean, before it is inverted: rounding is not blown up."""
SMALLER = 2048
"""Rows used at most where the stream is wide: the smaller side of a table is decomposed."""


@dataclass(frozen=True)
class Anchors:
    """Anchors of one stream.

    Attributes:
        vectors: float64 [COUNT, n], the same under any scale of the stream's entries.
        scale: float64 [n], how the table they came from is scaled; ones where no scale acts.
        source: the block they came from; it has the exponents of ``scale`` and of the signs of ``vectors``.
    """

    vectors: torch.Tensor
    scale: torch.Tensor
    source: Block


Streams = Mapping[str, Anchors]


Gains = Sequence[tuple[Block, int]]


def project(net: Network, streams: Streams, block: Block, gains: Gains = ()) -> torch.Tensor:
    """The block, multiplied by gains, with fixed axes and streams seen through signs and anchors.

    Every stream with anchors must have a power, see :func:`power_of`.

    Returns:
        float64, one dimension for each factor of the block; COUNT in place of n for fixed axes and streams.
    """
    value = net.values(block)
    for gain, power in gains:
        held = net.values(gain)
        order = sorted(range(held.dim()), key=lambda dim: block.names.index(gain.names[dim]))
        shape = [net.sizes[name] if name in gain.names else 1 for name in block.names]
        value = value * held.permute(order).reshape(shape) ** power
    for dim, name in enumerate(block.names):
        if name in net.fixed:
            matrix = signs(value.shape[dim], COUNT).T / value.shape[dim] ** 0.5
        elif name in streams:
            power = power_of(net, name, block, streams[name].source, gains)
            assert power is not None
            matrix = streams[name].vectors * streams[name].scale ** float(power)
        else:
            continue
        value = (value.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
    return value


def is_leg(net: Network, streams: Streams, name: str) -> bool:
    """Whether a factor is seen through anchors or signs; others are summed over."""
    return name in net.fixed or name in streams


def power_of(net: Network, name: str, block: Block, source: Block, gains: Gains = ()) -> Fraction | None:
    """p with which anchors · scale^p cancel the block's scales along a stream; None if no p does."""
    power: Fraction | None = None
    for generator in net.acting.get(name, ()):
        if net.generators[generator].kind not in SCALES:
            continue
        mine, its = total(net, generator, block, gains), net.exponent(generator, source)
        if mine != 0 and block.names.count(name) > 1:
            return None
        if its == 0:
            if mine != 0:
                return None
            continue
        wanted = -mine / its
        if power is not None and wanted != power:
            return None
        power = wanted
    return power or Fraction(0)


def total(net: Network, generator: str, block: Block, gains: Gains) -> Fraction:
    """The exponent of a block multiplied by gains."""
    return net.exponent(generator, block) + sum(
        (power * net.exponent(generator, gain) for gain, power in gains), start=Fraction(0)
    )


def find_anchors(net: Network, streams: Streams, name: str) -> Anchors | None:
    """Anchors of one stream from the table with most rows of fixed axes and streams done before.

    Returns:
        None if no block has the stream and, besides, nothing but fixed axes and streams with anchors.
    """
    best: tuple[int, Block] | None = None
    for block in net.blocks:
        others = [other for other in block.names if other != name]
        if block.names.count(name) != 1 or not all(
            other in net.fixed or other in streams for other in others
        ):
            continue
        rows = 1
        for other in others:
            rows *= net.sizes[other] if other in net.fixed else COUNT
        if best is None or rows > best[0]:
            best = rows, block
    if best is None:
        return None
    block = best[1]
    table = _table(net, block, streams, name)
    if table is None or not bool(table.any()):
        return None
    scaled = any(
        net.generators[g].kind in SCALES and net.exponent(g, block) != 0 for g in net.acting.get(name, ())
    )
    scale = table.norm(dim=0) if scaled else torch.ones(table.shape[1], dtype=torch.float64)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if name in net.centred:
        table = table - table.mean(1, keepdim=True)
    return Anchors(_independent(table / scale), scale, block)


def _table(net: Network, block: Block, streams: Streams, name: str) -> torch.Tensor | None:
    """Rows [rows, n]: fixed axes as they are, streams with anchors projected."""
    value = net.values(block)
    for dim, other in enumerate(block.names):
        if other == name or other in net.fixed:
            continue
        held = streams[other]
        power = power_of(net, other, block, held.source)
        if power is None:
            return None
        matrix = held.vectors * held.scale ** float(power)
        value = (value.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
    place = block.names.index(name)
    value = value.movedim(place, -1).reshape(-1, value.shape[place])
    return value[:SMALLER] if value.shape[1] > SMALLER else value


def _independent(table: torch.Tensor) -> torch.Tensor:
    """R (X − mean) C^(−1/2), then (A Aᵀ)^(−1/2) A, for rows X, their covariance C and fixed signs R."""
    table = table - table.mean(0, keepdim=True)
    mixing = signs(table.shape[0], COUNT).T
    if table.shape[0] >= table.shape[1]:
        mixed = (mixing @ table) @ _inverse_root(table.T @ table)
    else:
        mixed = mixing @ (_inverse_root(table @ table.T) @ table)
    return _inverse_root(mixed @ mixed.T) @ mixed


def _inverse_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    floor = FLOOR * values.mean()
    root = torch.where(values + floor > 0, (values + floor).clamp_min(1e-300).rsqrt(), 0.0)
    return (vectors * root) @ vectors.T
