"""How every entry of a tensor scales when units of one parameter are multiplied by positive numbers.

A parameter is cut into units along one of its axes, and unit u is multiplied by s_u > 0. A tag says of a
value v(s) that v(s)[j] = s_{u(j)} ** degree · v(1)[j]. Where an operation needs two units to have the same
scale they are joined, so what is left in the end is the finest cut along that axis that holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

Key = tuple[str, int]
"""A parameter, and the axis along which its units lie."""

UNSCALED = -1
"""In place of a unit: the entry does not change."""


class Mixed(Exception):
    """The entries of a result are not powers of one scale each; the text says why."""


@dataclass(frozen=True)
class Tag:
    """v[j] is multiplied by s_{units[j]} ** degree.

    Attributes:
        units: integers of the rank of the value, with size one along axes on which they do not depend.
        degree: never zero; what does not scale has no tag.
        offset: None, or the axes along which a summand that does not scale is constant: v = scaled + c.
    """

    units: torch.Tensor
    degree: Fraction = Fraction(1)
    offset: frozenset[int] | None = None


@dataclass(frozen=True)
class Arg:
    """A tensor argument of an operation, seen by one key; no tag if it does not scale."""

    node: fx.Node
    shape: tuple[int, ...]
    tag: Tag | None

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class Degrees:
    """State of one walk.

    Attributes:
        roots: key -> for every unit the least unit it is joined with.
        dead: key -> why it is not invariant.
        gone: key -> operations whose result no longer scales.
        squares: operations whose values are never negative, because they are made of squares or lengths.
        guards: operations that add a small number to one of these.
        batch_training: batch norms use the statistics of the batch.
    """

    roots: dict[Key, torch.Tensor] = field(default_factory=dict)
    dead: dict[Key, str] = field(default_factory=dict)
    gone: dict[Key, list[fx.Node]] = field(default_factory=dict)
    squares: set[fx.Node] = field(default_factory=set)
    guards: set[fx.Node] = field(default_factory=set)
    batch_training: bool = True

    def start(self, key: Key, shape: tuple[int, ...]) -> Tag:
        """The parameter itself: every index of the axis is a unit."""
        axis = key[1]
        count = shape[axis] if shape else 1
        self.roots[key] = torch.arange(count)
        return Tag(self.roots[key].clone().reshape([count if i == axis else 1 for i in range(len(shape))]))

    def root(self, key: Key, units: torch.Tensor) -> torch.Tensor:
        return torch.where(units < 0, units, self.roots[key][units.clamp_min(0)])

    def join(self, key: Key, a: torch.Tensor, b: torch.Tensor) -> None:
        """Units at the same place become one. Raises ``Mixed`` where only one of them scales."""
        a, b = torch.broadcast_tensors(self.root(key, a), self.root(key, b))
        if bool(((a < 0) != (b < 0)).any()):
            raise Mixed("entries that scale are joined with entries that do not")
        apart = a != b
        if not bool(apart.any()):
            return
        roots = self.roots[key].numpy()
        count = len(roots)
        left = np.concatenate([np.arange(count), a[apart].numpy()])
        right = np.concatenate([roots, b[apart].numpy()])
        graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
        _, label = connected_components(graph, directed=False)
        least = np.full(label.max() + 1, count)
        np.minimum.at(least, label, np.arange(count))
        self.roots[key] = torch.from_numpy(least[label])

    def merge(self, key: Key, tag: Tag, axes: Iterable[int]) -> Tag:
        """The same tag with one unit along these axes, for operations that mix them."""
        units = tag.units
        for axis in axes:
            if units.shape[axis] > 1:
                first = units.narrow(axis, 0, 1)
                self.join(key, units, first.expand_as(units))
                units = first
        return replace(tag, units=units)

    def plain(self, arg: Arg) -> Tag:
        """The tag of an argument that scales, without an offset."""
        if arg.tag is None or arg.tag.offset is not None:
            raise Mixed("a sum of what scales and what does not")
        return arg.tag

    def product(self, key: Key, a: Tag | None, b: Tag | None) -> Tag | None:
        """The tag of a product, both of the same rank; None if it does not scale."""
        if a is None or b is None:
            return a if b is None else b
        x, y = torch.broadcast_tensors(a.units, b.units)
        both = (x >= 0) & (y >= 0)
        if bool(both.all()):
            self.join(key, x, y)
            degree = a.degree + b.degree
            return Tag(compact(x), degree) if degree else None
        if bool(both.any()) or a.degree != b.degree:
            raise Mixed("a product of entries that scale differently")
        return Tag(compact(torch.where(x >= 0, x, y)), a.degree)

    def same(self, key: Key, tags: Sequence[Tag]) -> Tag:
        """The tag of a sum, of tags of the same rank."""
        first, *rest = tags
        units = first.units
        offsets = [tag.offset for tag in tags if tag.offset is not None]
        for tag in rest:
            if tag.degree != first.degree:
                raise Mixed("a sum of summands that scale differently")
            self.join(key, units, tag.units)
            units = torch.broadcast_tensors(units, tag.units)[0]
        return Tag(compact(units), first.degree, frozenset.intersection(*offsets) if offsets else None)


def padded(tag: Tag, rank: int) -> Tag:
    """The tag of a tensor that is broadcast to a higher rank."""
    more = rank - tag.units.dim()
    units = tag.units.reshape((1,) * more + tuple(tag.units.shape))
    offset = None if tag.offset is None else frozenset({*range(more), *(i + more for i in tag.offset)})
    return Tag(units, tag.degree, offset)


def compact(units: torch.Tensor) -> torch.Tensor:
    """Size one along every axis on which the units do not depend."""
    for axis in range(units.dim()):
        first = units.narrow(axis, 0, 1)
        if units.shape[axis] > 1 and bool((units == first).all()):
            units = first
    return units.contiguous()


def placed(units: torch.Tensor, letters: Sequence[str], out: Sequence[str]) -> torch.Tensor:
    """Axes named by letters in the order of the output; size one where it has a letter of its own."""
    kept = [i for i, letter in enumerate(letters) if letter in out]
    units = units.permute([*kept, *[i for i in range(len(letters)) if i not in kept]])
    units = units.reshape(units.shape[: len(kept)])
    names = [letters[i] for i in kept]
    order = [names.index(letter) for letter in out if letter in names]
    units = units.permute(order)
    present = iter(units.shape)
    return units.reshape([next(present) if letter in names else 1 for letter in out])
