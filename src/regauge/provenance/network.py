"""The atlas read as a tensor network: blocks of parameters whose axes are named factors, and for every
factor the groups that act on it, with the exponent that each block has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from regauge.atlas import Action, Generator, Kind, Part
from regauge.provenance.normal_form import NormalForm

LINEAR = (Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES, Kind.GENERAL_LINEAR, Kind.COMPLEX)
SCALES = (Kind.POSITIVE, Kind.SCALE)
DIAGONAL = (Kind.SIGN, *SCALES)
STREAM = (
    Kind.PERMUTATION, Kind.SIGN, *SCALES, Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES, Kind.TRANSLATION, Kind.NULL,
)  # fmt: skip
ROWS = 8192
"""Entries of a fixed axis (tokens, positions) that are read; of a longer one the first."""


@dataclass(frozen=True)
class Block:
    """One block of one parameter: the product of a part for each axis.

    Attributes:
        index: its place in order of use.
        parameter: name; ``parts``: one for each axis.
        factors: names and sizes, axis by axis.
        chart: the constant added to what is stored.
    """

    index: int
    parameter: str
    parts: tuple[Part, ...]
    factors: tuple[tuple[str, int], ...]
    chart: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.factors)

    @property
    def rank(self) -> int:
        """Axes that are more than a single entry."""
        return sum(1 for part in self.parts if part.size > 1)


@dataclass(frozen=True)
class Network:
    """Blocks, and what acts on them.

    Attributes:
        form: the model.
        blocks: matrices (two axes or more) in order of use.
        gains: vectors that multiply an activation.
        sizes: factor -> size.
        generators: groups that are not translations or null directions.
        exponents: generator id -> block index -> exponent.
        acting: factor -> ids of the generators that act on it.
        streams: factors on which every element is one for the whole model: candidates for anchors.
        centred: factors along which the ones vector is a null direction of what is written.
        fixed: factors on which nothing acts.
    """

    form: NormalForm
    blocks: tuple[Block, ...]
    gains: tuple[Block, ...]
    sizes: Mapping[str, int]
    generators: Mapping[str, Generator]
    exponents: Mapping[str, Mapping[int, Fraction]]
    acting: Mapping[str, tuple[str, ...]]
    streams: frozenset[str]
    centred: frozenset[str]
    fixed: frozenset[str]

    def values(self, block: Block) -> torch.Tensor:
        """The block in float64, one dimension for each of its factors; long fixed axes are cut to ROWS."""
        axis, stop = 0, None
        for place, part in enumerate(block.parts):
            alone = len(part.factors) == 1 and part.offset == 0
            if alone and part.factors[0].name in self.fixed and part.size > ROWS:
                axis, stop = place, ROWS
        whole = self.form.read(block.parameter, axis, stop).contiguous()
        sizes: list[int] = []
        strides: list[int] = []
        offset = 0
        for place, part in enumerate(block.parts):
            step = whole.stride(place)
            offset += part.offset * step
            for factor in part.factors:
                sizes.append(min(factor.size, ROWS) if stop and place == axis else factor.size)
                strides.append(factor.stride * step)
        return torch.as_strided(whole, sizes, strides, offset) + block.chart

    def exponent(self, generator: str, block: Block) -> Fraction:
        return self.exponents[generator].get(block.index, Fraction(0))


def network(form: NormalForm) -> Network:
    """The tensor network of a model in normal form."""
    atlas = form.atlas
    found: dict[tuple[str, tuple[tuple[int, int], ...]], Block] = {}
    exponents: dict[str, dict[int, Fraction]] = {}
    acting: dict[str, list[str]] = {}
    generators: dict[str, Generator] = {}
    kinds: dict[str, set[Kind]] = {}
    shared: set[str] = set()
    centred: set[str] = set()
    rank = {name: place for place, name in enumerate(form.order)}
    numbered = sorted(
        ((g, a) for g in atlas.generators for a in g.actions),
        key=lambda pair: (rank[pair[1].parameter], tuple(part.offset for part in pair[1].parts)),
    )
    for _, action in numbered:
        key = _key(action)
        if key not in found:
            found[key] = _block(len(found), action)
    for generator in atlas.generators:
        kinds.setdefault(generator.acting, set()).add(generator.kind)
        if generator.kind is Kind.NULL:
            if any(_block_of(found, a).rank > 1 and a.acting == generator.acting for a in generator.actions):
                centred.add(generator.acting)
            continue
        if generator.kind is Kind.TRANSLATION:
            continue
        generators[generator.id] = generator
        names = [generator.acting] if generator.acting != "unit" else []
        for name in names:
            acting.setdefault(name, []).append(generator.id)
        if generator.copies:
            shared.update((generator.acting, *(name for name, _ in generator.copies)))
        held = exponents.setdefault(generator.id, {})
        for action in generator.actions:
            index = _block_of(found, action).index
            held[index] = held.get(index, Fraction(0)) + action.exponent
    blocks = tuple(found.values())
    sizes = {name: size for block in blocks for name, size in block.factors}
    everywhere = [name for block in blocks if block.rank > 1 for name in dict.fromkeys(block.names)]
    streams = {
        name
        for name, held in kinds.items()
        if name in sizes and held <= set(STREAM) and name not in shared and acting.get(name)
    }
    return Network(
        form,
        tuple(block for block in blocks if block.rank > 1),
        tuple(block for block in blocks if block.rank == 1 and block.parameter in form.multipliers),
        sizes,
        generators,
        exponents,
        {name: tuple(ids) for name, ids in acting.items()},
        frozenset(streams),
        frozenset(centred),
        frozenset(
            name for name in sizes if name not in acting and name not in shared and _alone(name, everywhere)
        ),
    )


def _alone(name: str, everywhere: Sequence[str]) -> bool:
    """Nothing but its own block, or so many that it is a stream that nothing moves."""
    return everywhere.count(name) != 2


def _key(action: Action) -> tuple[str, tuple[tuple[int, int], ...]]:
    return action.parameter, tuple((part.offset, part.size) for part in action.parts)


def _block_of(found: Mapping[tuple[str, tuple[tuple[int, int], ...]], Block], action: Action) -> Block:
    return found[_key(action)]


def _block(index: int, action: Action) -> Block:
    parts = tuple(
        Part(part.offset, tuple(f for f in part.factors if f.name != "unit")) for part in action.parts
    )
    factors = tuple((f.name, f.size) for part in parts for f in part.factors)
    return Block(index, action.parameter, parts, factors, action.chart)
