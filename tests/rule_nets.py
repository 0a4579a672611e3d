"""Nets of a few operations between parameters, and the kinds of groups expected of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regauge.atlas import Atlas, Kind

N = 6
Body = Callable[[Any, torch.Tensor], Any]
GROUPS = {Kind.PERMUTATION, Kind.COMPLEX, Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR}
DIAGONAL = {Kind.SIGN, Kind.POSITIVE, Kind.SCALE}

PERM = frozenset({Kind.PERMUTATION})
POSITIVE = frozenset({Kind.PERMUTATION, Kind.POSITIVE})
SIGN = frozenset({Kind.PERMUTATION, Kind.SIGN})
SCALE = frozenset({Kind.PERMUTATION, Kind.SCALE})
ONES = frozenset({Kind.ORTHOGONAL_ONES})
ORTHOGONAL = frozenset({Kind.ORTHOGONAL})
LINEAR = frozenset({Kind.GENERAL_LINEAR})
COMPLEX = frozenset({Kind.COMPLEX})
NOTHING: frozenset[Kind] = frozenset()


class Net(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], body: Body) -> None:
        super().__init__()
        self.p = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self.p, x)


class Case:
    """A module, an input, and the kinds expected for each (parameter, axis)."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        body: Body,
        expected: dict[tuple[str, int], frozenset[Kind]],
        x: tuple[int, ...] | torch.Tensor = (3, 5),
    ) -> None:
        self.shapes, self.body, self.expected = shapes, body, expected
        draw = torch.Generator().manual_seed(0)
        self.x = x if isinstance(x, torch.Tensor) else torch.randn(x, generator=draw)


def between(op: Callable[[torch.Tensor], torch.Tensor], kinds: frozenset[Kind]) -> Case:
    """b · op(a · x): what the space between a and b admits."""
    return Case(
        {"a": (N, 5), "b": (4, N)}, lambda p, x: F.linear(op(F.linear(x, p["a"])), p["b"]), {("a", 0): kinds}
    )


def gained(op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], kinds: frozenset[Kind]) -> Case:
    """b · op(a · x, g) with a vector of parameters g."""
    return Case(
        {"a": (N, 5), "b": (4, N), "g": (N,)},
        lambda p, x: F.linear(op(F.linear(x, p["a"]), p["g"]), p["b"]),
        {("a", 0): kinds},
    )


def images(op: Callable[[torch.Tensor], torch.Tensor], kinds: frozenset[Kind]) -> Case:
    """A convolution, the operation, another convolution."""
    return Case(
        {"a": (N, 2, 3, 3), "b": (3, N, 1, 1)},
        lambda p, x: F.conv2d(op(F.conv2d(x, p["a"])), p["b"]),
        {("a", 0): kinds},
        (3, 2, 11, 7),
    )


def found(atlas: Atlas, parameter: str, axis: int) -> frozenset[Kind]:
    """Kinds of groups and diagonals, of more than one entry, that act along an axis of a parameter."""
    return frozenset(
        g.kind
        for g in atlas.generators
        if g.size > 1 and g.kind in GROUPS | DIAGONAL
        for action in g.actions
        if action.parameter == f"p.{parameter}" and action.axis == axis
    )
