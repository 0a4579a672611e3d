"""Moving a norm's scale and shift, and biases that only pass through, into the next linear maps."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from regauge.act import read_block
from regauge.atlas import Action, Atlas, Generator, Kind
from regauge.elements import Diagonal
from regauge.errors import Refused
from regauge.moves.base import Builder, Change, Move, Option, Preserves, Scene, State
from regauge.plan import Step
from regauge.shift import apply_shift, source_shift
from regauge.steps import ActStep, AddStep, FillStep


def plan_fold_scales(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[…, c] = g[c] x[…, c], then W[o, c]:  g ← 1,  W[o, c] ← W[o, c] g[c], for every reader of y.

    Source: SliceGPT (arXiv 2401.15024, section 3.1), QuaRot (arXiv 2404.00456, section 3).
    """
    gains = scene.gauge.foldable(untied=scene.state.untied)
    gains = tuple(name for name in gains if name not in scene.state.folded)
    if not gains:
        space = max(scene.atlas.spaces, key=lambda s: len(s.parameters))
        raise Refused(
            "no gain can be folded: each also feeds something that is not a linear map, or none is left",
            space=f"{space.id} of size {space.size}",
            found=next((limit.reason for limit in space.limits), "nothing multiplies entries by a parameter"),
        )
    builder = Builder(scene)
    for gain in gains:
        for generator in scales_of(scene.atlas, gain):
            fold_gain(builder, generator, gain)
    state = State(scene.state.untied, scene.state.folded | set(gains))
    return builder.change(state=state)


def scales_of(atlas: Atlas, gain: str) -> list[Generator]:
    """Generators that scale every entry of a gain by a number of its own.

    Raises:
        Refused: there is none.
    """
    found = [
        g
        for g in atlas.generators
        if g.kind in (Kind.SCALE, Kind.POSITIVE)
        and any(a.parameter == gain and abs(a.exponent) == 1 and spans(a, g) for a in g.actions)
    ]
    if not found:
        raise Refused("the gain has no scale of its own", parameter=gain)
    return found


def spans(action: Action, generator: Generator) -> bool:
    """The element has one entry for every entry of the gain's block."""
    if not action.parts:  # A scalar.
        return generator.size == 1 and not generator.copies
    names = {factor.name for part in action.parts for factor in part.factors}
    return names == {generator.acting, *(name for name, _ in generator.copies)}


def fold_gain(builder: Builder, generator: Generator, gain: str) -> None:
    scene = builder.scene
    copies = tuple(name for name, _ in generator.copies)
    own = next(a for a in generator.actions if a.parameter == gain and spans(a, generator))
    value = read_block(scene.read(gain), own, copies).squeeze(-1)
    sign = Fraction(1) if own.exponent > 0 else Fraction(-1)
    zero = value == 0
    for action in generator.actions:
        if action is own:
            builder.add(gain, FillStep(own, 1.0, scene.shape(gain)))
            continue
        power = -sign * action.exponent
        vector = value
        if power < 0 and bool(zero.any()):
            held = read_block(scene.read(action.parameter), action, copies)
            if bool((held[zero] != 0).any()):
                raise Refused(
                    "a gain of zero cannot be divided out of its shift",
                    parameter=action.parameter,
                    found=f"{int(zero.sum())} zeros in {gain}",
                    way_out="put fold-shifts before fold-scales",
                )
            vector = torch.where(zero, torch.ones_like(value), value)
        step = ActStep(
            _with_exponent(action, power), Diagonal(vector, Kind.SCALE), copies, scene.shape(action.parameter)
        )
        builder.add(action.parameter, step)
    builder.note(generator, None)


def _with_exponent(action: Action, exponent: Fraction) -> Action:
    return Action(
        action.parameter, action.parts, action.axis, action.acting, exponent, action.chart, action.through
    )


def _is_value_bias(scene: Scene, generator: Generator) -> bool:
    """The bias of a value space: a general linear group acts on it (softmax only averages it)."""
    source = generator.actions[0]
    return any(
        other.kind is Kind.GENERAL_LINEAR
        and any(a.parameter == source.parameter and a.parts == source.parts for a in other.actions)
        for other in scene.atlas.generators
    )


def _fold_translations(scene: Scene, value_bias: bool, what: str) -> Change:
    """Every bias is pushed on until none is left that can be: what one adds to another goes on with it."""
    builder = Builder(scene)
    read = _Overlay(scene)
    generators = [g for g in scene.atlas.of_kind(Kind.TRANSLATION) if _is_value_bias(scene, g) is value_bias]
    if not generators:
        raise _no_shift(scene, value_bias, what)
    for _ in generators:
        moved = [_fold_one(builder, read, generator) for generator in generators]
        if not any(moved):
            break
    return builder.change()


def _fold_one(builder: Builder, read: _Overlay, generator: Generator) -> bool:
    """Move the source of a translation on to its other actions, if it is not zero."""
    source = generator.actions[0]
    shift = source_shift(read(source.parameter), generator)
    if not bool((shift != 0).any()):
        return False
    for parameter, delta in apply_shift(read, generator, shift).items():
        read.change(builder, parameter, AddStep(delta))
    read.change(builder, source.parameter, FillStep(source, 0.0, builder.scene.shape(source.parameter)))
    builder.note(generator, None)
    return True


def _no_shift(scene: Scene, value_bias: bool, what: str) -> Refused:
    values = {g.space for g in scene.atlas.of_kind(Kind.GENERAL_LINEAR)}
    limit = next(
        (
            limit
            for space in scene.atlas.spaces
            for limit in space.limits
            if limit.kind is Kind.TRANSLATION and (space.id in values) is value_bias
        ),
        None,
    )
    note = next((note for note in scene.atlas.notes if "slot" in note), None)
    found = note or (f"there is none, or it has nowhere to go: {limit.reason}" if limit else "there is none")
    node = f"{limit.node} in {limit.module or 'the model'}" if limit and not note else None
    return Refused(f"no {what} can be folded here", node=node, found=found)


class _Overlay:
    """Current values of what the steps planned so far have changed."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.values: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        return self.values[name] if name in self.values else self.scene.read(name)

    def change(self, builder: Builder, name: str, step: Step) -> None:
        builder.add(name, step)
        self.values[name] = step.apply(self(name).to(torch.float64))


def plan_fold_shifts(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[…, c] = z[…, c] + b[c], then W[o, c]:  b ← 0,  bias[o] ← bias[o] + Σ_c W[o, c] b[c].

    Source: the affine part of a LayerNorm; SliceGPT (arXiv 2401.15024, section 3.1).
    """
    return _fold_translations(scene, False, "shift")


def plan_fold_value_bias(scene: Scene, options: Mapping[str, Any]) -> Change:
    """softmax weights sum to one:  b_v ← 0,  b_o[o] ← b_o[o] + Σ_{h,d} W_o[o, h d] b_v[kv(h) d].

    Source: TransformerLens, "fold_value_biases"; exact iff nothing is added to the weights' sum.
    """
    return _fold_translations(scene, True, "value bias")


def plan_drop_key_bias(scene: Scene, options: Mapping[str, Any]) -> Change:
    """q · (k + b) = q · k + q · b, the same for every key, which softmax ignores:  b_k ← 0."""
    builder = Builder(scene)
    for generator in scene.atlas.of_kind(Kind.NULL):
        for action in generator.actions:
            if action.exponent == 0:
                builder.add(action.parameter, FillStep(action, 0.0, scene.shape(action.parameter)))
        if any(action.exponent == 0 for action in generator.actions):
            builder.note(generator, None)
    if not builder.used:
        raise Refused(
            "every key bias matters here, or there is none",
            found="keys are turned by rotary position embedding, normalised, or have no bias",
        )
    return builder.change()


_NONE: Mapping[str, Option] = {}

FOLD_SCALES = Move(
    "fold-scales",
    "g[c] ← 1, W[o,c] ← W[o,c] g[c] for every linear reader W of the norm",
    "every use of the norm's output is a linear map; a tied head must be untied first",
    Preserves.OUTPUT,
    plan_fold_scales,
    _NONE,
)
FOLD_SHIFTS = Move(
    "fold-shifts",
    "b[c] ← 0, bias[o] ← bias[o] + Σ_c W[o,c] b[c]",
    "every reader has a bias, or does not see constants",
    Preserves.OUTPUT,
    plan_fold_shifts,
    _NONE,
)
FOLD_VALUE_BIAS = Move(
    "fold-value-bias",
    "b_v ← 0, b_o[o] ← b_o[o] + Σ W_o[o,h·d] b_v[kv(h)·d]",
    "attention weights sum to one; the output projection has a bias",
    Preserves.OUTPUT,
    plan_fold_value_bias,
    _NONE,
)
DROP_KEY_BIAS = Move(
    "drop-key-bias",
    "b_k ← 0, since softmax_s(q·k_s + q·b_k) = softmax_s(q·k_s)",
    "no rotary embedding and no normalisation between the key bias and the scores",
    Preserves.OUTPUT,
    plan_drop_key_bias,
    _NONE,
)
