"""Which changes of its input a layer does not see, or passes on: found by trying, in float64.

A layer is probed with gains of one and shifts of zero, since those can be moved into the next map, and
without its eps, which breaks every scale invariance a little. Where features change places, so do those of
the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import nn

from regauge.nn.entry import Entry, Law

TOLERANCE = 1e-10
"""Relative; violations on the probes used are above 1e-3."""
SIZE = 12
"""Features of a probe: divides into groups, heads and regions of all layers."""

Act = Callable[[torch.Tensor, torch.Generator], Callable[[torch.Tensor], torch.Tensor]]


class Effect(StrEnum):
    """What a change of the input does to the output."""

    NONE = "same"
    ALONG = "along"
    OTHER = ""


@dataclass(frozen=True)
class Symmetry:
    """A group of changes of x, features on the last axis.

    Attributes:
        name: as in the table.
        text: the change in one line.
        act: ``(x, generator) -> `` one element of the group, as a function of tensors shaped like x.
        carried: the element acts on the parameters and statistics too, on every axis of features.
    """

    name: str
    text: str
    act: Act
    carried: bool = False


def _shift(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    t = torch.randn((*x.shape[:-1], 1), generator=random, dtype=x.dtype)
    return lambda y: y + t


def _scale(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    s = torch.exp(0.5 * torch.randn((*x.shape[:-1], 1), generator=random, dtype=x.dtype))
    return lambda y: y * s


def _channel_shift(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    t = torch.randn(x.shape[-1], generator=random, dtype=x.dtype)
    return lambda y: y + t


def _channel_scale(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    s = torch.exp(0.5 * torch.randn(x.shape[-1], generator=random, dtype=x.dtype))
    return lambda y: y * s


def _signs(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    signs = torch.ones(x.shape[-1], dtype=x.dtype)
    signs[torch.randperm(x.shape[-1], generator=random)[: x.shape[-1] // 2]] = -1.0
    return lambda y: y * signs


def _permute(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    order = torch.randperm(x.shape[-1], generator=random)
    return lambda y: y[..., order]


def _turn(y: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return y @ q.T


def _rotation(x: torch.Tensor, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    q = torch.linalg.qr(torch.randn((x.shape[-1],) * 2, generator=random, dtype=x.dtype))[0]
    return partial(_turn, q=q)


def _rotation_of_differences(
    x: torch.Tensor, random: torch.Generator
) -> Callable[[torch.Tensor], torch.Tensor]:
    n = x.shape[-1]
    ones = torch.ones((n, 1), dtype=x.dtype)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(n, dtype=x.dtype)[:, 1:]], 1))[0]
    small = torch.linalg.qr(torch.randn((n - 1, n - 1), generator=random, dtype=x.dtype))[0]
    q = basis @ torch.block_diag(torch.ones((1, 1), dtype=x.dtype), small) @ basis.T
    return partial(_turn, q=q)


SYMMETRIES: tuple[Symmetry, ...] = (
    Symmetry("shift", "x[t, c] → x[t, c] + a[t]", _shift),
    Symmetry("scale", "x[t, c] → s[t] · x[t, c], s > 0", _scale),
    Symmetry("channel shift", "x[t, c] → x[t, c] + a[c]", _channel_shift),
    Symmetry("channel scale", "x[t, c] → s[c] · x[t, c], s > 0", _channel_scale),
    Symmetry("signs", "x[t, c] → ±[c] · x[t, c]", _signs),
    Symmetry("permutation", "x[t, c] → x[t, π(c)]", _permute, carried=True),
    Symmetry("rotation", "x[t] → Q x[t]", _rotation),
    Symmetry("rotation of differences", "x[t] → Q x[t], Q 1 = 1", _rotation_of_differences),
)


def effects(entry: Entry, *, training: bool = False, seed: int = 0) -> Mapping[str, Effect]:
    """Name of each symmetry -> what it does to the output of this layer."""
    return {s.name: effect(entry, s, training=training, seed=seed) for s in SYMMETRIES}


def effect(entry: Entry, symmetry: Symmetry, *, training: bool = False, seed: int = 0) -> Effect:
    """What one symmetry does to the output, on two random elements."""
    found: set[Effect] = set()
    for draw in range(2):
        random = torch.Generator().manual_seed(1000 * seed + draw)
        layer = without_eps(entry.bare(SIZE, random)).train(training)
        x = probe(entry, random)
        act = symmetry.act(x, random)
        y = run(entry, layer, x)
        moved = run(entry, _carried(layer, act) if symmetry.carried else layer, act(x))
        if same(moved, y):
            found.add(Effect.NONE)
        elif same(moved, act(y)):
            found.add(Effect.ALONG)
        else:
            found.add(Effect.OTHER)
    return found.pop() if len(found) == 1 else Effect.OTHER


def _carried(layer: nn.Module, act: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy whose tensors are moved along every axis as long as there are features."""
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            for axis in range(tensor.dim()):
                if tensor.shape[axis] == SIZE:
                    tensor.copy_(act(tensor.movedim(axis, -1)).movedim(-1, axis))
    return moved


def law_error(entry: Entry, law: Law, *, training: bool = False, seed: int = 0) -> float:
    """How far a gauge that moves parameters is from changing the output as it says, relative."""
    random = torch.Generator().manual_seed(seed)
    layer = without_eps(entry.make(SIZE, random)).train(training)
    x = inward(entry, probe(entry, random))
    moved, moved_x, change = law.act(layer, x, random)
    return distance(output(moved, moved_x), change(output(layer, x)))


def probe(entry: Entry, random: torch.Generator) -> torch.Tensor:
    """A random input, features on the last axis, with means and scales of each feature of its own."""
    shape = (3, 5, SIZE) if entry.kind == "tokens" else (3, 4, 5, SIZE)
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    x = x * torch.exp(0.3 * torch.randn(SIZE, generator=random, dtype=torch.float64))
    return x + 0.5 * torch.randn(SIZE, generator=random, dtype=torch.float64)


def run(entry: Entry, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a layer, features on the last axis of input and output."""
    y = output(layer, inward(entry, x))
    return y if entry.kind == "tokens" else y.movedim(1, -1)


def inward(entry: Entry, x: torch.Tensor) -> torch.Tensor:
    """From features on the last axis to where the layer has them."""
    return x if entry.kind == "tokens" else x.movedim(-1, 1)


def output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output, or the first of several, of a copy: statistics and counters stay as they are."""
    with torch.no_grad():
        y = copy.deepcopy(layer)(x)
    return y[0] if isinstance(y, tuple) else y


def without_eps(layer: nn.Module) -> nn.Module:
    """With every eps next to nothing, in place."""
    for module in layer.modules():
        if isinstance(vars(module).get("eps"), float):
            module.eps = 1e-300  # type: ignore[assignment]
    return layer


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and distance(first, second) < TOLERANCE


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """‖first − second‖ / ‖second‖; infinite where one is not finite."""
    value = float((first - second).norm() / second.norm().clamp_min(1e-300))
    return value if value == value else float("inf")
