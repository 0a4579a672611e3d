"""Two models of different sizes: units that one has not are added to it, with weights zero.

Σ_i r[i] f(w[i] x) with further i of r[i] = 0: the same function, so that a permutation can pair them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from regauge.atlas import Action, Atlas, Factor, Generator, Kind, Part
from regauge.matching.sides import Reader, Rows, Side


def padded_alike(a: Side, b: Side, names: Mapping[str, str]) -> tuple[Side, Side]:
    """Both sides with the larger size wherever units of a whole axis differ in number.

    Args:
        a, b: the sides.
        names: parameter of a -> parameter of b.
    """
    units_a, units_b = _units(a), _units(b)
    sizes_a: dict[str, int] = {}
    sizes_b: dict[str, int] = {}
    for name, other in names.items():
        shape_a, shape_b = a.shapes[name], b.shapes[other]
        for axis, (m, n) in enumerate(zip(shape_a, shape_b, strict=False)):
            first, second = units_a.get((name, axis)), units_b.get((other, axis))
            if m != n and first is not None and second is not None:
                sizes_a[first] = max(m, n, sizes_a.get(first, 0))
                sizes_b[second] = max(m, n, sizes_b.get(second, 0))
    return _padded(a, sizes_a, units_a), _padded(b, sizes_b, units_b)


def _units(side: Side) -> dict[tuple[str, int], str]:
    """(parameter, axis) -> the factor that is all of the axis, where its indices can be permuted."""
    found: dict[tuple[str, int], str] = {}
    for generator in side.atlas.of_kind(Kind.PERMUTATION):
        for action in generator.actions:
            part = action.parts[action.axis]
            whole = len(part.factors) == 1 and part.size == side.shapes[action.parameter][action.axis]
            if whole and not generator.copies:
                found[action.parameter, action.axis] = action.acting
    return found


def _padded(side: Side, sizes: Mapping[str, int], units: Mapping[tuple[str, int], str]) -> Side:
    if not sizes:
        return side
    shapes = {
        name: tuple(sizes.get(units.get((name, axis), ""), size) for axis, size in enumerate(shape))
        for name, shape in side.shapes.items()
    }

    def values(name: str, rows: Rows = None) -> torch.Tensor:
        if shapes[name] == side.shapes[name]:
            return side.values(name, rows)
        value = side.values(name)
        out = value.new_zeros(shapes[name])
        out[tuple(slice(0, size) for size in value.shape)] = value
        return out if rows is None else out[rows[0] : rows[1]]

    return with_sizes(side, sizes, shapes, values)


def with_sizes(
    side: Side, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], values: Reader
) -> Side:
    """A side that holds other values, with factors of other sizes.

    Args:
        side: a side.
        sizes: factor of its atlas -> size.
        shapes: parameter -> shape.
        values: the values.
    """
    null = {name: tuple(_action(action, sizes) for action in actions) for name, actions in side.null.items()}
    generators = tuple(_generator(generator, sizes) for generator in side.atlas.generators)
    atlas: Atlas = replace(side.atlas, generators=generators)
    return replace(side, shapes=shapes, values=values, null=null, atlas=atlas)


def _generator(generator: Generator, sizes: Mapping[str, int]) -> Generator:
    return replace(
        generator,
        size=sizes.get(generator.acting, generator.size),
        copies=tuple((name, sizes.get(name, size)) for name, size in generator.copies),
        actions=tuple(_action(action, sizes) for action in generator.actions),
    )


def _action(action: Action, sizes: Mapping[str, int]) -> Action:
    def part(held: Part) -> Part:
        factors = tuple(Factor(f.name, sizes.get(f.name, f.size), f.stride) for f in held.factors)
        return Part(held.offset, factors)

    return replace(action, parts=tuple(map(part, action.parts)))
