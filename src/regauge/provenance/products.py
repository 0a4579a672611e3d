"""Products of blocks that no generator changes, found by counting exponents.

Two blocks (or three) that share inner factors are multiplied, summed over these, and seen between anchors. A
product is taken only if every generator of the atlas cancels in it: maps of general kinds have to meet their
inverse, scales and signs have to add up to nothing, and permutations pass, since everything is summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from regauge.atlas import Generator, Kind
from regauge.provenance.anchors import Streams, is_leg, power_of, total
from regauge.provenance.network import DIAGONAL, LINEAR, SCALES, Block, Network


@dataclass(frozen=True)
class Factor:
    """One block in a product, with the gains that multiply it: (gain, power)."""

    block: Block
    gains: tuple[tuple[Block, int], ...] = ()


@dataclass(frozen=True)
class Product:
    """Blocks whose product, summed over inner factors and seen between anchors, is invariant.

    Attributes:
        factors: one, two or three of them, in order of use.
        sort: ``edge``: a single block without inner factors; ``pair``: two different blocks; ``other``:
            a block with itself, or three.
    """

    factors: tuple[Factor, ...]
    sort: str

    @property
    def place(self) -> int:
        return min(factor.block.index for factor in self.factors)


def products(
    net: Network, streams: Streams, *, waiting: bool
) -> tuple[tuple[Product, ...], tuple[Block, ...]]:
    """All products, in order of use, and the blocks that are in none.

    Args:
        waiting: whether a block with a stream that may still get anchors is left for later.
    """
    found: list[Product] = []
    covered: set[int] = set()
    pairs: list[tuple[Block, Block]] = []

    def take(blocks: Sequence[Block], sort: str) -> bool:
        checked = check(net, streams, blocks, waiting=waiting)
        if checked is None:
            return False
        found.append(Product(checked, sort))
        covered.update(block.index for block in blocks)
        return True

    for block in net.blocks:
        if not _inner(net, streams, block):
            take((block,), "edge")
    for first, second in _linked(net, streams):
        if take((first, second), "pair"):
            pairs.append((first, second))
    for block in net.blocks:
        if block.index in covered or not _inner(net, streams, block):
            continue
        own = set(_inner(net, streams, block))
        joined = False
        for first, second in pairs:
            if own & set(_inner(net, streams, first)) & set(_inner(net, streams, second)):
                joined = take((*sorted((first, second), key=lambda b: b.index), block), "other") or joined
        if not joined and not waiting:
            take((block, block), "other")
    found.sort(key=lambda p: (p.place, tuple(f.block.index for f in p.factors)))
    return tuple(found), tuple(block for block in net.blocks if block.index not in covered)


def _inner(net: Network, streams: Streams, block: Block) -> list[str]:
    return [name for name in block.names if not is_leg(net, streams, name)]


def _linked(net: Network, streams: Streams) -> Iterator[tuple[Block, Block]]:
    """Pairs that share an inner factor, each once."""
    holders: dict[str, list[Block]] = {}
    for block in net.blocks:
        for name in dict.fromkeys(_inner(net, streams, block)):
            holders.setdefault(name, []).append(block)
    seen = {
        (a.index, b.index): (a, b)
        for held in holders.values()
        for place, a in enumerate(held)
        for b in held[place + 1 :]
    }
    for key in sorted(seen):
        yield seen[key]


def check(
    net: Network, streams: Streams, blocks: Sequence[Block], *, waiting: bool = False
) -> tuple[Factor, ...] | None:
    """The factors of the product with the gains it needs, or None if a generator changes it."""
    factors = [Factor(block) for block in blocks]
    inner = [name for block in blocks for name in _inner(net, streams, block)]
    if waiting and any(name in net.streams and inner.count(name) == 1 for name in inner):
        return None
    for _ in range(len(net.gains) + 1):
        wrong = _changed_by(net, streams, factors)
        if wrong is None:
            return tuple(factors)
        mended = _mended(net, streams, factors, wrong)
        if mended is None:
            return None
        factors = mended
    return None


def _changed_by(net: Network, streams: Streams, factors: Sequence[Factor]) -> tuple[Generator, int] | None:
    """A generator that changes the product, and the factor at which it does (−1: between them)."""
    inner: dict[str, list[int]] = {}
    for place, factor in enumerate(factors):
        for name in factor.block.names:
            if name in streams:
                for generator in net.acting.get(name, ()):
                    if not _leg_cancels(net, streams, factor, name, net.generators[generator]):
                        return net.generators[generator], place
            elif name not in net.fixed:
                inner.setdefault(name, []).append(place)
    for name, places in inner.items():
        for identifier in net.acting.get(name, ()):
            generator = net.generators[identifier]
            powers = [_total(net, identifier, factors[place]) for place in places]
            if generator.kind in LINEAR:
                opposite = len(powers) == 2 and powers[0] == -powers[1] != 0
                orthogonal = len(powers) == 2 and generator.kind in (Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES)
                if any(powers) and not opposite and not orthogonal:
                    return generator, -1
            elif generator.kind in DIAGONAL and not _nothing(generator.kind, sum(powers, start=Fraction(0))):
                return generator, -1
    for identifier, generator in net.generators.items():
        if generator.acting != "unit" or generator.kind not in DIAGONAL:
            continue
        power = sum((_total(net, identifier, factor) for factor in factors), start=Fraction(0))
        if not generator.copies:
            if generator.kind is not Kind.SIGN:
                continue  # One scale for the whole product, which is normalised.
            power += sum(
                net.exponent(identifier, streams[name].source)
                for factor in factors
                for name in factor.block.names
                if name in streams
            )
        if not _nothing(generator.kind, power):
            return generator, -1
    return None


def _leg_cancels(net: Network, streams: Streams, factor: Factor, name: str, generator: Generator) -> bool:
    if generator.kind is Kind.SIGN:
        power = _total(net, generator.id, factor) + net.exponent(generator.id, streams[name].source)
        return _nothing(Kind.SIGN, power)
    if generator.kind in SCALES:
        source = streams[name].source
        return power_of(net, name, factor.block, source, factor.gains) is not None
    return True  # What is left are isometries, and anchors move with them.


def _nothing(kind: Kind, power: Fraction) -> bool:
    return power % 2 == 0 if kind is Kind.SIGN else power == 0


def _total(net: Network, generator: str, factor: Factor) -> Fraction:
    return total(net, generator, factor.block, factor.gains)


def _mended(
    net: Network, streams: Streams, factors: Sequence[Factor], wrong: tuple[Generator, int]
) -> list[Factor] | None:
    """With one more gain, after which this generator does no harm; None if there is none."""
    generator, place = wrong
    if generator.kind not in DIAGONAL:
        return None
    held: Mapping[int, Fraction] = net.exponents[generator.id]
    for where in range(len(factors)) if place < 0 else (place,):
        factor = factors[where]
        for gain in net.gains:
            if gain.index not in held or any(gain is other for other, _ in factor.gains):
                continue
            if not set(gain.names) <= set(factor.block.names):
                continue
            for power in (1, -1):
                tried = [*factors]
                tried[where] = Factor(factor.block, (*factor.gains, (gain, power)))
                now = _changed_by(net, streams, tried)
                if now is None or now[0].id != generator.id:
                    return tried
    return None
