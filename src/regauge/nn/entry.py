"""What the table of norms needs to know of a layer, beside its code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

Moved = tuple[nn.Module, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Law:
    """A change of the input together with the parameters that changes the output in a known way: a gauge.

    Attributes:
        text: in one line, such as ``x → s·x, β → β / s``.
        act: ``(layer, x, generator) -> `` a changed deep copy of the layer, the changed x, and what the
            output for x becomes; ``new_layer(new_x) == change(layer(x))`` is the law.
        training: whether it holds in training mode too; checked in evaluation mode otherwise.
    """

    text: str
    act: Callable[[nn.Module, torch.Tensor, torch.Generator], Moved]
    training: bool = False


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: as given to ``regauge upgrade --norm``, lower case.
        title: as written in the literature.
        source: paper and section.
        make: ``(size, generator) -> `` an instance in float64 and evaluation mode, with generic parameters
            and statistics (none zero, none one).
        bare: the same with gains of one and shifts of zero, all else generic; what is probed for symmetries.
        kind: ``tokens`` for x [batch, positions, size], ``images`` for x [batch, size, height, width].
        laws: further gauges, that move parameters.
    """

    name: str
    title: str
    source: str
    make: Callable[[int, torch.Generator], nn.Module]
    bare: Callable[[int, torch.Generator], nn.Module]
    kind: Literal["tokens", "images"] = "tokens"
    laws: tuple[Law, ...] = field(default=())


def generic(module: nn.Module, random: torch.Generator, spread: float = 0.3) -> nn.Module:
    """In float64 and evaluation mode, every parameter p ← p + spread · N(0, 1); returns the module."""
    module.to(torch.float64).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
    return module
