"""Members of the zoo traced, run, and changed by moves, each of it once."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regauge.atlas import Atlas
from regauge.certify.run import run
from regauge.discover import Gauge, discover
from regauge.embedding_scale import unscaled_config
from regauge.growing.trial import Trial, trial_of
from regauge.hf import load_meta, patched_config
from regauge.moves import State
from regauge.patches import restructured
from regauge.plan import Rewrite
from regauge.planner import make_plan
from regauge.probe import random_state
from regauge.recipe import parse_recipe
from regauge.trace import Trace, trace, untie
from zoo import attention, entrywise, shapes, streams
from zoo.configs import CONFIGS
from zoo.parts import Made

HOSTILE: dict[str, Callable[[], Made]] = {
    **streams.exhibit,
    **attention.exhibit,
    **entrywise.exhibit,
    **shapes.exhibit,
}
NAMES = (*HOSTILE, *CONFIGS)


@dataclass(frozen=True)
class Specimen:
    """A traced model, what it is run on, and its atlases in every state.

    Attributes:
        name: in the zoo.
        trace: of the model as built.
        buffers: values of what is no parameter.
        inputs: example inputs by name, with values.
        gauge: atlases of the trace.
    """

    name: str
    trace: Trace
    buffers: Mapping[str, Tensor]
    inputs: Mapping[str, Any]
    gauge: Gauge


@functools.cache
def specimen(name: str) -> Specimen:
    """Trace a member of the zoo, once."""
    if name in HOSTILE:
        torch.manual_seed(0)
        module, args = HOSTILE[name]()
        traced = trace(module, args)
        buffers = dict(module.named_buffers(remove_duplicate=False))
        return Specimen(name, traced, buffers, dict(zip(traced.inputs, args, strict=True)), Gauge(traced))
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = load_meta(CONFIGS[name]())
        traced = trace(held.model, (), held.inputs)
        inputs = held.real_inputs(batch=3, length=7, seed=1)
    return Specimen(name, traced, held.buffers(), inputs, Gauge(traced))


def content(name: str) -> dict[str, Any]:
    """What ``config.json`` of a member of the zoo holds."""
    return CONFIGS[name]().to_dict()


def restructured_as(name: str, plan: Rewrite) -> tuple[nn.Module, Mapping[str, Tensor], Mapping[str, Any]]:
    """A member of the zoo with the structure of a plan: module, values of its buffers, example inputs."""
    if name in HOSTILE:
        torch.manual_seed(0)
        module, args = HOSTILE[name]()
        changed = restructured(module, plan.copies, plan.patches)
        inputs = dict(zip(specimen(name).trace.inputs, args, strict=True))
        return changed, dict(changed.named_buffers(remove_duplicate=False)), inputs
    held = {**content(name), **plan.config}
    if plan.patches:
        held |= patched_config(held, plan.patches)
    found = load_meta(held)
    return restructured(found.model, plan.copies, ()), found.buffers(), found.inputs


def rebuilt(name: str, plan: Rewrite) -> Specimen:
    """A member of the zoo with the structure of a plan, traced."""
    return _rebuilt(name, *(json.dumps(part) for part in (plan.config, plan.patches, dict(plan.copies))))


@functools.lru_cache(maxsize=64)
def _rebuilt(name: str, config: str, patches: str, copies: str) -> Specimen:
    """The structure is these three; as text, since that can be looked up."""
    held = specimen(name)
    plan = Rewrite(config=json.loads(config), patches=tuple(json.loads(patches)), copies=json.loads(copies))
    changed, buffers, inputs = restructured_as(name, plan)
    args = tuple(inputs.values()) if name in HOSTILE else ()
    traced = trace(changed, args, {} if name in HOSTILE else dict(inputs))
    inputs = dict(zip(traced.inputs, held.inputs.values(), strict=True))
    return Specimen(name, traced, buffers, inputs, Gauge(traced))


def trial(name: str, plan: Rewrite) -> Trial:
    """How a member of the zoo is rebuilt in other sizes, going on from a plan."""
    config = None if name in HOSTILE else {**content(name), **plan.config}
    return trial_of(
        plan,
        lambda so_far: restructured_as(name, so_far)[:2],
        lambda so_far: rebuilt(name, so_far).gauge,
        config,
        config,
    )


class Bench:
    """Runs a specimen in true float64, as built or with a parameter of its own for every tied name."""

    def __init__(self, held: Specimen, untied: bool = False) -> None:
        self.held = held
        self.trace = untie(held.trace) if untied else held.trace

    def run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return list(run(self.trace, state.__getitem__, self.held.buffers, self.held.inputs))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||a|| over all outputs, where a is finite; infinite where b stops being finite."""
    square = total = 0.0
    for x, y in zip(a, b, strict=True):
        finite = torch.isfinite(x)
        if not bool(torch.isfinite(y)[finite].all()):
            return math.inf
        square += float((x[finite] - y[finite]).square().sum())
        total += float(x[finite].square().sum())
    assert total > 0, "the specimen returns nothing"
    return math.sqrt(square / total)


@functools.cache
def weights(name: str) -> Mapping[str, Tensor]:
    """Random weights for a specimen: gains and biases far from one and zero."""
    return random_state(specimen(name).trace, 1)


@functools.cache
def original(name: str) -> list[Tensor]:
    """Output of the specimen as built, for :func:`weights`."""
    return Bench(specimen(name)).run(weights(name))


@dataclass(frozen=True)
class Moved:
    """What moves made of a specimen."""

    plan: Rewrite
    state: State
    weights: Mapping[str, Tensor]
    bench: Bench

    @functools.cached_property
    def output(self) -> list[Tensor]:
        return self.bench.run(self.weights)


def carry_out(start: Mapping[str, Tensor], plan: Rewrite, names: Iterable[str]) -> dict[str, Tensor]:
    """Every step of a plan on whole tensors, in float64."""
    result: dict[str, Tensor] = {}
    for name in names:
        made = plan.made.get(name)
        value = start[plan.copies.get(name, name)] if made is None else made.value(start.__getitem__)
        for step in plan.steps.get(name, ()):
            value = step.apply(value)
        result[name] = value
    return result


def move(name: str, *moves: Any, seed: int = 0, start: Mapping[str, Tensor] | None = None) -> Moved:
    """Plan moves on a specimen and carry them out. Raises ``Refused`` as the moves do."""
    held = specimen(name)
    begin = weights(name) if start is None else start
    alias = held.trace.canonical
    begin = {other: begin[known] for other, known in alias.items() if known in begin}

    def view(so_far: Rewrite) -> Callable[[str], Tensor]:
        return lambda wanted: carry_out(begin, so_far, [wanted])[wanted]

    def config(so_far: Rewrite) -> dict[str, Any]:
        return {**content(name), **so_far.config}

    plan, state, _ = make_plan(
        held.gauge,
        parse_recipe({"moves": list(moves)}),
        seed,
        view,
        retrace=lambda so_far: rebuilt(name, so_far).gauge,
        config=config if name in CONFIGS else None,
        trial=lambda so_far: trial(name, so_far),
        unscale_config=unscaled_config if name in CONFIGS else None,
    )
    if plan.patches or plan.config:
        changed = rebuilt(name, plan)
        bench = Bench(changed, state.untied)
        return Moved(plan, state, carry_out(begin, plan, bench.trace.shapes), bench)
    untied = state.untied or bool(plan.copies)
    names = alias if untied else held.trace.shapes
    return Moved(plan, state, carry_out(begin, plan, names), Bench(held, untied))


@functools.cache
def folded(name: str) -> Moved:
    """The specimen with everything untied and folded that can be: the state of ``atlas.folded``."""
    gauge = specimen(name).gauge
    moves = (["untie"] if gauge.tied else []) + (["fold-scales"] if gauge.foldable(untied=True) else [])
    return move(name, *moves) if moves else Moved(Rewrite(), State(), weights(name), Bench(specimen(name)))


@functools.cache
def atlas(name: str) -> Atlas:
    """As :func:`regauge.discover.discover`, once."""
    return discover(specimen(name).trace)
