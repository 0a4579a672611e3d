"""A model moved by random elements of every generator it has."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regauge
from pairs.families import Family
from pairs.training import samples

MOVES: tuple[dict[str, Any], ...] = (
    *(
        {"name": name, "optional": True}
        for name in (
            "untie",
            "fold-layer-scale",
            "fold-shifts",
            "fold-scales",
            "fold-value-bias",
            "drop-key-bias",
        )
    ),
    {"name": "rotate", "space": "all", "optional": True},
    {"name": "rescale", "mode": "random", "optional": True},
    {"name": "permute", "signs": True, "optional": True},
)
"""What a disguise is made of; a move that a model does not have is left out."""


def example(family: Family) -> torch.Tensor:
    """Inputs to trace a model with: 8 images, or 8 rows of a text."""
    return samples(family.task, "a", True).batch(torch.arange(8) * 100)[0]


def disguised(family: Family, model: nn.Module, seed: int, directory: Path | None = None) -> nn.Module:
    """The same function in a random gauge.

    Args:
        family: of the model.
        model: left as it is.
        seed: of the elements.
        directory: of a stored family: where the result is written as well.
    """
    recipe = {"moves": list(MOVES)}
    if not family.stored:
        return regauge.rewrite_module(model, family.inputs(example(family)), recipe, seed=seed)[0].eval()
    with tempfile.TemporaryDirectory() as folder:
        plain, out = Path(folder) / "plain", directory or Path(folder) / "out"
        model.save_pretrained(plain)
        regauge.rewrite(plain, out, recipe, seed=seed)
        return regauge.load(out).eval()
