"""The moments of Adam, and the direction they give."""

# PyTorch documents its functions on lists of tensors under names that begin with an underscore.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from regauge.optim.base import Group

States = MutableMapping[Tensor, dict[str, Any]]


def _started(states: States, param: Tensor) -> dict[str, Any]:
    state = states[param]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["step"] += 1
    return state


def _corrections(group: Group, state: dict[str, Any]) -> tuple[float, float]:
    """sqrt(1 − β₂ᵗ), and lr / (1 − β₁ᵗ)."""
    first, second = group["betas"]
    count = state["step"].item()
    return math.sqrt(1 - second**count), float(group["lr"]) / (1 - first**count)


def adam_direction(group: Group, states: States, param: Tensor, grad: Tensor) -> tuple[Tensor, float]:
    """u = m / (sqrt(v / (1 − β₂ᵗ)) + eps) in a new tensor, and lr / (1 − β₁ᵗ); with ``nesterov`` the
    numerator is β₁ m + (1 − β₁) g."""
    first, second = group["betas"]
    state = _started(states, param)
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(first).add_(grad, alpha=1 - first)
    square.mul_(second).addcmul_(grad, grad, value=1 - second)
    root, step = _corrections(group, state)
    size = square.sqrt().div_(root).add_(group["eps"])
    top = mean.mul(first).add_(grad, alpha=1 - first) if group["nesterov"] else mean
    return top / size, step


def adam_directions(
    group: Group, states: States, params: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """The same for several parameters together."""
    first, second = group["betas"]
    held = [_started(states, param) for param in params]
    means, squares = [state["exp_avg"] for state in held], [state["exp_avg_sq"] for state in held]
    torch._foreach_mul_(means, first)
    torch._foreach_add_(means, grads, alpha=1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, grads, grads, 1 - second)
    corrections = [_corrections(group, state) for state in held]
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, [root for root, _ in corrections])
    torch._foreach_add_(sizes, group["eps"])
    if group["nesterov"]:
        tops = torch._foreach_mul(means, first)
        torch._foreach_add_(tops, grads, alpha=1 - first)
        torch._foreach_div_(tops, sizes)
    else:
        tops = torch._foreach_div(means, sizes)
    return list(tops), [step for _, step in corrections]


def moved(
    params: list[Tensor], directions: list[Tensor], steps: list[float], kept: list[float] | None
) -> None:
    """p ← kept · p − step · u, several together; ``directions`` are used up."""
    if kept is not None:
        torch._foreach_mul_(params, kept)
    torch._foreach_mul_(directions, [-step for step in steps])
    torch._foreach_add_(params, directions)
