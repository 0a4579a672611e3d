"""The normal form of a model: what its gauge lets vanish has vanished, and what nothing reads is zero.

Two encodings of one function, a LayerNorm and an RMSNorm, folded and unfolded gains, tied and untied heads,
have one normal form up to the compact part of the gauge. It is a plan: nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regauge.atlas import Action, Atlas, Kind
from regauge.blocks import view_block
from regauge.recipe import MoveSpec, Recipe

_STEPS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("fold-batchnorm", {}),
    ("collapse", {}),
    ("fold-layer-scale", {}),
    ("fold-shifts", {}),
    ("fold-scales", {}),
    ("fold-value-bias", {}),
    ("drop-key-bias", {}),
)

_STRUCTURAL = ("fold-batchnorm", "collapse")


def normal_recipe(*, structure: bool, untie: bool = True) -> Recipe:
    """The moves that bring a model to its normal form; each is left out where it does not exist.

    Args:
        structure: whether moves may replace modules, so that a LayerNorm becomes an RMSNorm.
        untie: whether tied parameters get values of their own.
    """
    steps: list[tuple[str, dict[str, str]]] = [("untie", {})] if untie else []
    kept = [step for step in _STEPS if structure or step[0] not in _STRUCTURAL]
    steps += [(name, dict(options)) for name, options in kept]
    steps += [("center", {"norm": "rms"})] if structure else []
    steps += [("center", {})]
    return Recipe(moves=tuple(MoveSpec(name=name, options=options, optional=True) for name, options in steps))


def null_actions(atlas: Atlas) -> dict[str, tuple[Action, ...]]:
    """Parameter -> actions of null directions on it."""
    found: dict[str, list[Action]] = {}
    for generator in atlas.of_kind(Kind.NULL):
        for action in generator.actions:
            found.setdefault(action.parameter, []).append(action)
    return {name: tuple(actions) for name, actions in found.items()}


def without_null(tensor: torch.Tensor, actions: Sequence[Action], shape: tuple[int, ...]) -> torch.Tensor:
    """What no reader sees is taken out: x[…, c, …] ← x − mean over c, or ← 0 where all of it is unseen.

    Args:
        tensor: float64, contiguous, perhaps cut along axes that the actions leave free; overwritten.
        actions: null directions on it.
        shape: shape of the whole parameter.
    """
    for action in actions:
        block = view_block(tensor, action, (action.acting,), shape)
        if action.exponent == 0:
            block.zero_()
        else:
            block.sub_(block.mean(dim=0, keepdim=True))
    return tensor
