"""Which tensor is which parameter: the assignment of equal shapes whose contents are most alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch

from regauge.matching.assignment import assigned
from regauge.renaming.anchors import (
    LARGEST,
    anchors_of,
    carriers,
    crossing,
    directions,
    matrix_features,
    vector_features,
)

Read = Callable[[str], torch.Tensor]
Shape = tuple[int, ...]
_Sides = tuple[list[torch.Tensor], list[torch.Tensor]]

_SURE = 0.05
"""Least lead of the best over the second."""
_PLACE = 1e-2
"""What equal places in the two orders are worth: they decide where contents do not."""
_NEIGHBOURS = 3.0
"""What it is worth that the tensors beside it, by name, are those of the parameters beside it."""
_SIZES = 0.2
"""What equal root mean squares, and equal means, are worth."""
_FEW = 2
"""Tensors of one shape up to which each becomes an anchor."""
_WORK = 1e11
"""Multiplications above which no anchor is made through a matrix."""


@dataclass(frozen=True)
class Assigned:
    """Tensors by parameter.

    Attributes:
        names: parameter -> tensor.
        unsure: parameters that another tensor would fit as well.
    """

    names: Mapping[str, str]
    unsure: tuple[str, ...]


class Known(Protocol):
    """The model whose names are known, under the names of the parameters that are looked for."""

    def forms(self, name: str) -> Sequence[torch.Tensor]:
        """The values, float64, in each form they may be stored in, folded or not; none if it has none."""
        ...

    def scaled(self, name: str) -> tuple[int, int] | None:
        """(n, m) if a scale that nobody knows acts on each of n groups of m entries: a vector is [m, n]."""
        ...

    def chart(self, name: str) -> float:
        """What is added to the stored numbers before they act: 1 for gains stored as g − 1."""
        ...


class Assignment:
    """One search. The values of one shape are read together.

    Args:
        shapes: parameter -> shape, in the order of use.
        stored: tensor -> shape, in the order of their names, numbers as numbers.
        known: the other model.
        read: a stored tensor, float64.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], stored: Mapping[str, Shape], known: Known, read: Read
    ) -> None:
        self._known, self._read = known, read
        self._shapes = shapes
        self._wanted, self._there = _by_shape(shapes), _by_shape(stored)
        self._names: dict[str, str] = {}
        self._tables: list[_Table] = []
        self._anchors: _Sides = ([], [])

    def fits(self) -> bool:
        """Whether there is a tensor of the right shape for every parameter."""
        return all(self._choices(shape) >= len(names) for shape, names in self._wanted.items())

    def run(self) -> Assigned:
        order = sorted(self._wanted, key=lambda shape: (len(shape) < 2, self._choices(shape), shape))
        for shape in order:
            found = self._class(shape)
            self._names.update(found)
            if len(shape) > 1 and self._choices(shape) <= _FEW:
                for name, tensor in found.items():
                    self._anchor(name, tensor)
        return self._settled()

    def _anchor(self, name: str, tensor: str) -> None:
        values = self._known.forms(name)
        if values:
            self._anchors[0].extend(anchors_of(values[0]))
            self._anchors[1].extend(anchors_of(self._read(tensor)))

    def _choices(self, shape: Shape) -> int:
        return len(self._there.get(shape, ()))

    def _class(self, shape: Shape) -> dict[str, str]:
        """Every parameter of one shape with its tensor."""
        wanted, there = self._wanted[shape], self._there[shape]
        if len(there) == 1:
            return {wanted[0]: there[0]}
        if len(shape) == 1:
            ours, theirs = self._carriers(shape[0])
        else:
            ours, theirs = ([a for a in held if a.shape[1] in shape] for held in self._anchors)
        kinds = [(self._known.scaled(name), self._known.chart(name)) for name in wanted]
        groups = list(dict.fromkeys(kinds))
        seen = {
            (group, chart): [seen_of(self._read(name) + chart, theirs, group) for name in there]
            for group, chart in groups
        }
        forms = [
            [seen_of(value + chart, ours, group) for value in self._known.forms(name)]
            for name, (group, chart) in zip(wanted, kinds, strict=True)
        ]
        tables: list[_Table] = []
        for form in range(max(1, *map(len, forms))):
            score = torch.zeros(len(wanted), len(there), dtype=torch.float64)
            for key in groups:
                rows = [i for i, kind in enumerate(kinds) if kind == key and forms[i]]
                if rows:
                    score[rows] = alike([forms[i][min(form, len(forms[i]) - 1)] for i in rows], seen[key])
            place = torch.arange(len(there)) / len(there)
            score -= _PLACE * (place[None, :] - torch.arange(len(wanted))[:, None] / len(wanted)).abs()
            tables.append(_Table(wanted, there, score, [one.digest for one in seen[groups[0]]]))
        best = max(tables, key=_Table.total)
        self._tables.append(best)
        return best.solved()

    def _settled(self) -> Assigned:
        """What contents leave open goes to the neighbours, by name, of what they decide."""
        unsure = [table.unsure(self._names) for table in self._tables]
        open_ = {name for names in unsure for name in names}
        sure = {name: tensor for name, tensor in self._names.items() if name not in open_}
        left: list[str] = []
        for table, names in zip(self._tables, unsure, strict=True):
            if not names:
                continue
            others = {name: tensor for name, tensor in sure.items() if name not in table.wanted}
            beside_a = [nearest(name, others) for name in table.wanted]
            beside_b = [nearest(tensor, others.values()) for tensor in table.there]
            for i, ours in enumerate(beside_a):
                tensors = {sure[name] for name in ours}
                for j, theirs in enumerate(beside_b):
                    if tensors and theirs:
                        table.score[i, j] += _NEIGHBOURS * len(tensors & theirs) / len(tensors | theirs)
            self._names.update(table.solved())
            left.extend(table.unsure(self._names))
        return Assigned(self._names, tuple(left))

    def _carriers(self, size: int) -> _Sides:
        """For vectors of a size, by anchors, and by anchors through named matrices with an axis of it."""
        found: _Sides = ([], [])

        def add(a: torch.Tensor, b: torch.Tensor) -> None:
            for side, carrier in zip(found, carriers(a, b), strict=True):
                side.append(carrier)

        if size > LARGEST:
            return found
        for a, b in zip(*self._anchors, strict=True):
            if a.shape[1] == size:
                add(a, b)
        usable = [
            n for n in self._names if len(held := self._shapes[n]) == 2 and size in held and min(held) > 1
        ]
        if sum(8 * math.prod(self._shapes[n]) * min(self._shapes[n]) for n in usable) > _WORK:
            return found
        for name in usable:
            (other,) = set(self._shapes[name]) - {size} or {size}
            anchors = [(a, b) for a, b in zip(*self._anchors, strict=True) if a.shape[1] == other]
            values = self._known.forms(name) if anchors else []
            if values:
                back_a = crossing(values[-1], other)
                back_b = crossing(self._read(self._names[name]), other)
                for a, b in anchors:
                    add(a @ back_a, b @ back_b)
        return found


@dataclass(frozen=True)
class _Table:
    """Scores of one class of equal shapes, [wanted, there]."""

    wanted: Sequence[str]
    there: Sequence[str]
    score: torch.Tensor
    digests: Sequence[tuple[float, ...]]

    def solved(self) -> dict[str, str]:
        return {self.wanted[i]: self.there[j] for i, j in enumerate(self._columns)}

    def total(self) -> float:
        return float(self.score[range(len(self.wanted)), self._columns].sum())

    @property
    def _columns(self) -> list[int]:
        return assigned(self.score[None])[0].tolist()

    def unsure(self, names: Mapping[str, str]) -> list[str]:
        """Parameters that another tensor would fit as well, or whose tensor would fit another as well."""
        columns = [self.there.index(names[name]) for name in self.wanted]
        found: list[str] = []
        for i, j in enumerate(columns):
            others = [k for k, digest in enumerate(self.digests) if digest != self.digests[j]]
            rows = [k for k, c in enumerate(columns) if self.digests[c] != self.digests[j]]
            rivals = torch.cat([self.score[i, others], self.score[rows, j]])
            if len(rivals) and float(rivals.max()) > float(self.score[i, j]) - _SURE:
                found.append(self.wanted[i])
        return found


def nearest(name: str, others: Iterable[str]) -> set[str]:
    """Those of ``others`` that share the longest path with ``name``; none if no part of a path is shared."""
    path = name.split(".")
    best, found = 0, set[str]()
    for other in others:
        pairs = zip(path, other.split("."), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if shared > best:
            best, found = shared, set[str]()
        if shared == best and best:
            found.add(other)
    return found


@dataclass(frozen=True)
class _Seen:
    units: tuple[torch.Tensor, ...]
    mean: float
    size: float
    digest: tuple[float, ...]


def alike(ours: Sequence[_Seen], theirs: Sequence[_Seen]) -> torch.Tensor:
    """Σ cos³ over the features, and a little for equal sizes and means, [ours, theirs]."""
    total = torch.zeros(len(ours), len(theirs), dtype=torch.float64)
    units = (zip(*(one.units for one in side), strict=True) for side in (ours, theirs))
    for x, y in zip(*units, strict=True):
        total += (torch.stack(x) @ torch.stack(y).mT) ** 3
    size_a, mean_a = (_column(ours, what) for what in ("size", "mean"))
    size_b, mean_b = (_column(theirs, what).mT for what in ("size", "mean"))
    scale = torch.maximum(size_a, size_b).clamp_min(1e-12)
    near = torch.where(scale > 1e-12, torch.minimum(size_a, size_b) / scale, 1.0)
    return total + _SIZES * (near + 1 - ((mean_a - mean_b).abs() / scale).clamp_max(1.0))


def _column(seen: Sequence[_Seen], what: str) -> torch.Tensor:
    return torch.tensor([[getattr(one, what)] for one in seen], dtype=torch.float64)


def seen_of(value: torch.Tensor, held: Sequence[torch.Tensor], group: tuple[int, int] | None) -> _Seen:
    """What of a tensor stays. ``held`` are anchors for matrices, carriers for vectors."""
    flat = value.reshape(-1)
    if value.dim() > 1:
        units = matrix_features(value, held)
    else:
        units = vector_features(flat, held)
        units += [] if group is None else [directions(flat, group)]
    digest = (float(flat.sum()), float(flat.square().sum()), float(flat[:1].sum()))
    size = float(flat.square().mean().sqrt()) if len(flat) else 0.0
    return _Seen(tuple(units), float(flat.mean()) if len(flat) else 0.0, size, digest)


def _by_shape(shapes: Mapping[str, Shape]) -> dict[Shape, list[str]]:
    found: dict[Shape, list[str]] = {}
    for name, shape in shapes.items():
        found.setdefault(tuple(shape), []).append(name)
    return found
