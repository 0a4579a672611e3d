"""A constant on what an embedding gives goes into the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.errors import Refused
from regauge.moves.base import Change, Move, Preserves, Scene, State
from regauge.steps import AffineStep


def plan_fold_embedding_scale(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[…, c] = s · E[token, c] for a constant s:  E[v, c] ← s · E[v, c], and the configuration leaves out s.

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762, section 3.4), for the constant.
    """
    if scene.unscale_config is None:
        raise Refused(
            "the constant is written in the code of a plain module",
            expected="a model of transformers, whose configuration can leave it out",
            found="no configuration",
        )
    config, scales = scene.unscale_config()
    steps = {
        name: (AffineStep(1, torch.full((scene.shape(name)[1],), scale, dtype=torch.float64)),)
        for name, scale in scales.items()
    }
    return Change(steps, config=config, state=State(scene.state.untied, scene.state.folded), retrace=True)


FOLD_EMBEDDING_SCALE = Move(
    "fold-embedding-scale",
    "s·E[token] → E ← s·E, and the configuration leaves out s",
    "an embedding read in no other role, and one key of the configuration that removes the constant",
    Preserves.OUTPUT,
    plan_fold_embedding_scale,
    {},
)
