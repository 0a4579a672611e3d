"""Gains on what a linear map writes: LayerScale, and the scalars of ReZero and SkipInit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regauge.atlas import Generator, Kind
from regauge.errors import Refused
from regauge.moves.base import Builder, Change, Move, Preserves, Scene, State
from regauge.moves.fold import fold_gain, spans


def plan_fold_layer_scale(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[…, o] = g[o] (W x + b)[…, o]:  W[o, …] ← g[o] W[o, …],  b[o] ← g[o] b[o],  g ← 1; g may be a scalar.

    A gain is taken if scales of all its entries that only multiply parameters elsewhere bring it to one,
    and of positive entries alone where only positive scales exist (a ReLU lies between).

    Source: Touvron et al., CaiT (arXiv 2103.17239, section 2.1) for the gain; Bachlechner et al., ReZero
    (arXiv 2003.04887, section 3) for the scalar.
    """
    untied = scene.state.untied
    known = {*scene.gauge.foldable(untied=untied), *scene.state.folded}
    gains = [name for name in scene.gauge.multipliers(untied=untied) if name not in known]
    builder = Builder(scene)
    folded: set[str] = set()
    reasons: dict[str, str] = {}
    for gain in gains:
        generators = [g for g in scene.atlas.generators if _folds(g, gain, set(gains) - {gain})]
        reason = _reason(scene, gain, generators)
        if reason:
            reasons[gain] = reason
            continue
        for generator in generators:
            fold_gain(builder, generator, gain)
        folded.add(gain)
    if not folded:
        gain = next(iter(reasons), None)
        raise Refused(
            "no gain here multiplies what a linear map alone writes",
            parameter=gain,
            expected="a gain whose other factor is written by a linear map that nothing else reads",
            found="nothing multiplies entries by a parameter" if gain is None else reasons[gain],
            way_out="fold-scales takes the gains that linear maps read" if known else None,
        )
    return builder.change(state=State(untied, scene.state.folded | folded))


def _folds(generator: Generator, gain: str, others: set[str]) -> bool:
    """Bringing the gain to one multiplies every other block once by what the gain was."""
    if generator.kind not in (Kind.SCALE, Kind.POSITIVE):
        return False
    own = [action for action in generator.actions if action.parameter == gain]
    rest = [action for action in generator.actions if action.parameter != gain]
    if len(own) != 1 or not rest or any(action.parameter in others for action in rest):
        return False
    exponent = own[0].exponent
    return abs(exponent) == 1 and spans(own[0], generator) and all(a.exponent == -exponent for a in rest)


def _reason(scene: Scene, gain: str, generators: list[Generator]) -> str | None:
    """Why a gain cannot be folded; None if it can."""
    covered = sum(generator.size * generator.count for generator in generators)
    if covered != math.prod(scene.shape(gain)):
        return "something else than a linear map writes its other factor, or reads it too"
    own = [a for generator in generators for a in generator.actions if a.parameter == gain]
    value = scene.read(gain) + own[0].chart
    if any(generator.kind is Kind.POSITIVE for generator in generators) and bool((value <= 0).any()):
        return "a function that only lets positive scales pass lies between, and the gain has other entries"
    return None


FOLD_LAYER_SCALE = Move(
    "fold-layer-scale",
    "g·(W x + b) → W[o,…] ← g[o] W[o,…], b ← g·b, g ← 1; g a vector or a scalar",
    "a gain whose other factor is written by a linear map that nothing else reads",
    Preserves.OUTPUT,
    plan_fold_layer_scale,
    {},
)
