"""Centring the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from regauge.atlas import Kind
from regauge.errors import Refused
from regauge.interpret import op_name
from regauge.moves.base import Builder, Change, Move, Option, Preserves, Scene, describe, widest
from regauge.moves.narrow import FORMS, plan_narrow
from regauge.moves.structure import rms_patch
from regauge.patches import Patch, owners
from regauge.steps import CenterStep
from regauge.trace import module_path


def plan_center(scene: Scene, options: Mapping[str, Any]) -> Change:
    """W[c, …] ← W[c, …] − mean_c W[c, …] for every writer of a space that only LayerNorms read.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers (arXiv 2305.14858, section 3).
    """
    builder = Builder(scene)
    covered: Counter[tuple[str, int]] = Counter()
    for generator in scene.atlas.of_kind(Kind.NULL):
        actions = [action for action in generator.actions if action.exponent == 1]
        for action in actions:
            builder.add(action.parameter, CenterStep(action, scene.shape(action.parameter)))
            covered[action.parameter, action.axis] += prod(part.size for part in action.parts)
        if actions:
            builder.note(generator, None)
    if not builder.used:
        space = widest(scene.atlas)
        raise Refused(
            "no space here is blind to the mean: centring would change the function",
            space=describe(space),
            found="its readers see the ones direction (an RMS norm does, a LayerNorm does not)",
        )
    centred = {key for key, count in covered.items() if count == prod(scene.shape(key[0]))}
    if options["norm"] in FORMS:
        return plan_narrow(scene, builder, centred, options["norm"])
    if options["norm"] == "rms":
        paths, nodes = scene.gauge.zero_mean_norms(centred, untied=scene.state.untied)
        entries: list[Patch] = [{"path": path, "module": "center-input"} for path in paths]
        _check_all(scene, nodes, options["partial"])
        return builder.change(patches=(*entries, *map(rms_patch, owners(scene.trace, nodes).values())))
    return builder.change()


def _check_all(scene: Scene, nodes: Collection[str], partial: bool) -> None:
    """Refuse if a LayerNorm would stay one, unless that is wanted, or if all of them would."""
    norms = [node for node in scene.trace.graph.nodes if op_name(node) == "aten.layer_norm"]
    stay = [node for node in norms if node.name not in nodes]
    if (partial and nodes) or (norms and not stay):
        return
    what = "no LayerNorm here" if not nodes else f"{len(stay)} of {len(norms)} LayerNorms here do not"
    verb = "can become an RMSNorm" if not nodes else "become RMSNorms"
    raise Refused(
        f"{what} {verb}: what {'it reads' if not nodes else 'they read'} does not have mean zero",
        node=None if not stay else f"{stay[0].name} in {module_path(stay[0]) or 'the model'}",
        found="something that sees the mean reads the same, as where the output of a norm is added"
        " to the stream again (post-norm)"
        if norms
        else "no operation here is a LayerNorm",
        way_out="partial=true replaces the others" if nodes else None,
    )


CENTER = Move(
    "center",
    "W[c,…] ← W[c,…] − mean_c W[c,…] for every writer of the space",
    "only LayerNorms read the space",
    Preserves.OUTPUT,
    plan_center,
    {
        "norm": Option(
            str,
            "keep",
            "rms: also replace each LayerNorm whose input is then centred by an RMSNorm; crms, chart: also"
            " store the stream with one coordinate less, by leaving out its last entry or its mean",
            ("keep", "rms", *FORMS),
        ),
        "partial": Option(bool, False, "rms: also where some LayerNorms have to stay what they are"),
    },
)
