"""The loss along the straight line between two models."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from pairs.families import Family
from pairs.training import held_out

POINTS = 11


@torch.no_grad()
def line(family: Family, a: nn.Module, b: nn.Module, part: str = "a", points: int = POINTS) -> list[float]:
    """Held-out losses at a + t (b − a), t evenly from 0 to 1. Both have the same tensors.

    Source: Linear mode connectivity (arXiv 1912.05671, section 3).
    """
    model = copy.deepcopy(a).eval()
    ours, theirs = a.state_dict(), b.state_dict()
    losses = []
    for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        mixed = {
            name: torch.lerp(value, theirs[name].to(value.dtype), t) if value.is_floating_point() else value
            for name, value in ours.items()
        }
        model.load_state_dict(mixed)
        losses.append(held_out(family, model, part))
    return losses


def barrier(losses: Sequence[float]) -> float:
    """The most by which the loss is above the straight line between its ends."""
    n = len(losses) - 1
    return max(loss - ((n - i) * losses[0] + i * losses[-1]) / n for i, loss in enumerate(losses))
