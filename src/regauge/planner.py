"""From a recipe to a plan: run the moves in order, each on the model as the earlier ones leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from regauge.cuts import CUTS
from regauge.discover import Gauge
from regauge.errors import Refused, TraceError
from regauge.growing.trial import Trial
from regauge.moves import MOVES, Change, Scene, State
from regauge.patches import Replaceable, merged, replaceable
from regauge.plan import Made, Rewrite
from regauge.recipe import Recipe, check_move
from regauge.trace import Trace

Reader = Callable[[str], torch.Tensor]
Unscaled = tuple[Mapping[str, Any], Mapping[str, float]]
Tied = tuple[Mapping[str, Any], Sequence[tuple[str, ...]]]


def make_plan(
    gauge: Gauge,
    recipe: Recipe,
    seed: int,
    view: Callable[[Rewrite], Reader],
    untie_config: Callable[[Mapping[str, Any], Trace], Mapping[str, Any]] | None = None,
    progress: Callable[[str], None] | None = None,
    retrace: Callable[[Rewrite], Gauge] | None = None,
    config: Callable[[Rewrite], Mapping[str, Any]] | None = None,
    trial: Callable[[Rewrite], Trial] | None = None,
    unscale_config: Callable[[Mapping[str, Any]], Unscaled] | None = None,
    tie_config: Callable[[Mapping[str, Any]], Tied] | None = None,
) -> tuple[Rewrite, State, Gauge]:
    """Plan every move of a recipe. Nothing is written.

    Args:
        gauge: atlases of the traced model.
        recipe: moves with checked options.
        seed: each move draws from a generator of its own, seeded by this and its place.
        view: plan so far -> reader of current values by state-dict name.
        untie_config: content of ``config.json``, and the model of it traced -> changes to it that untie.
        progress: called with the name of each move as it starts.
        retrace: the gauge of the model with the structure of the plan so far; asked for after a move that
            changes the structure.
        config: plan so far -> content of ``config.json`` then; None for plain modules.
        trial: how the model of the plan so far can be rebuilt in other sizes.
        unscale_config, tie_config: content of ``config.json`` -> see :class:`regauge.moves.Scene`.

    Returns:
        the plan, the state the model is in after it, and its gauge: another one than ``gauge`` if the
        structure changed.

    Raises:
        Refused: a move does not exist for this model and is not optional, or none of them does.
    """
    rewrite, state, first = Rewrite(), State(), gauge
    refused: Refused | None = None
    for place, spec in enumerate(recipe.moves):
        if progress is not None:
            progress(spec.name)
        spec = check_move(spec)
        move = MOVES.get(spec.name) or CUTS[spec.name]
        options = {name: option.default for name, option in move.options.items()} | dict(spec.options)
        random = torch.Generator().manual_seed(_mix(seed, place))
        now = None if config is None else partial(config, rewrite)
        scene = Scene(
            gauge,
            state,
            view(rewrite),
            random,
            untie_config=_called(untie_config, now, gauge.trace),
            config=now,
            trial=None if trial is None else partial(trial, rewrite),
            unscale_config=_called(unscale_config, now),
            tie_config=_called(tie_config, now),
        )
        try:
            change = _composed(rewrite, move.plan(scene, options))
        except Refused as error:
            if not spec.optional:
                raise
            refused = error
            continue
        before, rewrite = rewrite, _taken(rewrite, change.takes)
        used = [asdict(item) | {"move": spec.name, "place": place} for item in change.used]
        rewrite = Rewrite(
            steps=_merged({n: s for n, s in rewrite.steps.items() if n not in change.made}, change.steps),
            copies=_copied(rewrite, change),
            made={
                n: m for n, m in {**rewrite.made, **_beside(change, before)}.items() if n not in change.drops
            },
            drops=(rewrite.drops | change.drops) - change.made.keys(),
            config={**rewrite.config, **change.config},
            recipe=(*rewrite.recipe, {"move": spec.name, **dict(spec.options)}),
            used=(*rewrite.used, *used),
            patches=merged(rewrite.patches, change.patches),
        )
        # A copy made by untying starts from the original tensor, so it takes over its steps so far.
        inherited = {new: rewrite.steps[old] for new, old in change.copies.items() if old in rewrite.steps}
        if inherited:
            rewrite = replace(rewrite, steps={**rewrite.steps, **inherited})
        state = change.state or state
        if (change.patches or change.made or change.retrace) and retrace is not None:
            try:
                gauge = retrace(rewrite)
            except TraceError as error:
                raise Refused(
                    f"{spec.name} replaces modules, and the model does not run with them replaced",
                    found=error.found or error.message,
                ) from error
            state = State(False, frozenset(state.folded & gauge.trace.shapes.keys()))
    if refused is not None and not rewrite.recipe:
        raise refused
    if rewrite.patches:
        known = {path: dict(m.patch) for path, m in replaceable(first.trace).items() if _as_patched(m)}
        patches = tuple(patch for patch in rewrite.patches if known.get(patch["path"]) != patch)
        rewrite = replace(rewrite, patches=patches)
    return rewrite, state, gauge


def plan_or_nothing(
    plan: Callable[[], tuple[Rewrite, State, Gauge]], gauge: Gauge
) -> tuple[Rewrite, State, Gauge]:
    """What ``plan`` returns, or the plan that does nothing where no move exists for a model of this gauge."""
    try:
        return plan()
    except Refused:
        return Rewrite(), State(), gauge


def _as_patched(module: Replaceable) -> bool:
    """Whether the module as it is reads its parameters as its replacement would."""
    named = module.weight in (None, f"{module.path}.weight") and module.bias in (None, f"{module.path}.bias")
    return named and module.chart == 0


def _composed(rewrite: Rewrite, change: Change) -> Change:
    """The change with everything it makes given in terms of original values and of their names."""
    steps = {name: (*rewrite.steps.get(name, ()), *change.steps.get(name, ())) for name in change.refits}
    before = replace(rewrite, steps=steps)
    made = {n: replace(m, like=rewrite.copies.get(m.like, m.like)) for n, m in change.made.items()}
    made |= {name: before.made_of(name, refit) for name, refit in change.refits.items()}
    kept = {name: held for name, held in change.steps.items() if name not in change.refits}
    return replace(change, steps=kept, made=made, refits={})


def _merged(
    old: Mapping[str, tuple[Any, ...]], new: Mapping[str, tuple[Any, ...]]
) -> dict[str, tuple[Any, ...]]:
    return {name: (*old.get(name, ()), *new.get(name, ())) for name in _ordered((*old, *new))}


def _taken(rewrite: Rewrite, takes: Mapping[str, str]) -> Rewrite:
    """Every parameter of ``takes`` becomes what the other one was: tensor and steps, or how it is made."""
    steps, copies, made = (
        {name: held for name, held in kind.items() if name not in takes}
        for kind in (rewrite.steps, rewrite.copies, rewrite.made)
    )
    for new, old in takes.items():
        if old in rewrite.steps:
            steps[new] = rewrite.steps[old]
        if old in rewrite.made:
            made[new] = rewrite.made[old]
        elif rewrite.copies.get(old, old) != new:
            copies[new] = rewrite.copies.get(old, old)
    return replace(rewrite, steps=steps, copies=copies, made=made) if takes else rewrite


def _beside(change: Change, before: Rewrite) -> dict[str, Made]:
    """What a move makes, beside a parameter that the source has."""
    return {
        name: replace(made, like=before.made[made.like].like) if made.like in before.made else made
        for name, made in change.made.items()
    }


def _called(
    function: Callable[..., Any] | None, now: Callable[[], Mapping[str, Any]] | None, *more: Trace
) -> Callable[[], Any] | None:
    """The function of the configuration as it is when it is asked for, and of what else it needs."""
    if function is None or now is None:
        return None
    return lambda: function(now(), *more)


def _ordered(names: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(names)


def _copied(rewrite: Rewrite, change: Change) -> dict[str, str]:
    """A copy that is dropped, or made anew, is a copy no longer."""
    copies = {**rewrite.copies, **change.copies}
    return {n: o for n, o in copies.items() if n not in change.drops and n not in change.made}


def _mix(seed: int, place: int) -> int:
    return (seed * 1_000_003 + place * 7_919 + 17) % (1 << 63)
