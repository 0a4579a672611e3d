"""A deeper model that starts from several copies of the layers of another, one on top of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regauge.cuts.base import Cut
from regauge.depth import resized
from regauge.errors import BadInput
from regauge.interpret import interpret
from regauge.layers import choose_stack
from regauge.moves.base import Change, Option, Scene
from regauge.moves.depth import configuration, depth_change, wanted


def plan_stack(scene: Scene, options: Mapping[str, Any]) -> Change:
    """Layer s of the result is layer s mod L, s = 0 … g·L − 1; what is around the layers stays.

    Source: Du et al., Stacking Your Transformers (arXiv 2405.15319, G_stack).
    """
    content, times = configuration(scene), wanted(options["times"], 1)
    if times < 2:
        raise BadInput(
            "a stack is repeated twice or more", expected="times=2 or more", found=options["times"]
        )
    walk = interpret(scene.trace)
    stack = choose_stack(walk, options["stack"] or None)
    grown = resized(content, walk, stack, list(range(len(stack.layers))) * times)
    return depth_change(scene, grown, {})


STACK = Cut(
    "stack",
    "layers 0 … L−1 → 0 … L−1, 0 … L−1, …: the whole stack g times",
    "the function: every layer but those of the first copy reads what it never learned to read",
    plan_stack,
    {
        "times": Option(str, "2", "how many copies there shall be"),
        "stack": Option(str, "", "path of the list of layers, where there are several"),
    },
)
