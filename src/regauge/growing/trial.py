"""How a model can be rebuilt in other sizes, to see what it then is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from regauge.discover import Gauge
from regauge.errors import RegaugeError
from regauge.modeling_regauge import KEY
from regauge.patches import Patch, merged
from regauge.plan import Rewrite
from regauge.trace import Trace

Shapes = Mapping[str, tuple[int, ...]]
Buffers = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """How the model of a plan can be rebuilt; nothing is kept.

    Attributes:
        config: content of ``config.json`` so far; None for a plain module.
        resolved: the same with every default filled in.
        build: (changes to the top level of the config, patches) -> the model without weights, and the
            values of its buffers.
        gauge: the same -> its gauge.
        patches: what replaces modules so far.
    """

    config: Mapping[str, Any] | None
    resolved: Mapping[str, Any]
    build: Callable[[Mapping[str, Any], Sequence[Patch]], tuple[nn.Module, Buffers]]
    gauge: Callable[[Mapping[str, Any], Sequence[Patch]], Gauge]
    patches: Sequence[Patch] = ()


def trial_of(
    plan: Rewrite,
    build: Callable[[Rewrite], tuple[nn.Module, Buffers]],
    gauge: Callable[[Rewrite], Gauge],
    config: Mapping[str, Any] | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> Trial:
    """A trial that goes on from a plan; ``build`` and ``gauge`` take plans."""

    def further(changes: Mapping[str, Any], patches: Sequence[Patch]) -> Rewrite:
        return replace(plan, config={**plan.config, **changes}, patches=merged(plan.patches, patches))

    return Trial(
        config,
        resolved or {},
        lambda changes, patches: build(further(changes, patches)),
        lambda changes, patches: gauge(further(changes, patches)),
        merged((config or {}).get(KEY, {}).get("patches", ()), plan.patches),
    )


def with_patches(trial: Trial, patches: Sequence[Patch]) -> Trial:
    """A trial with these patches in place."""

    def build(config: Mapping[str, Any], more: Sequence[Patch]) -> tuple[nn.Module, Buffers]:
        return trial.build(config, (*patches, *more))

    def gauge(config: Mapping[str, Any], more: Sequence[Patch]) -> Gauge:
        return trial.gauge(config, (*patches, *more))

    return replace(trial, build=build, gauge=gauge)


def built(trial: Trial, config: Mapping[str, Any], patches: Sequence[Patch], trace: Trace) -> Shapes | None:
    """Shapes of the parameters of a rebuilt model; None if it cannot be built."""
    try:
        model, _ = trial.build(config, patches)
    except (RegaugeError, ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError):
        return None
    found = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return found | {name: tuple(b.shape) for name, b in model.named_buffers() if name in trace.canonical}


def expected(trace: Trace, wanted: Shapes) -> tuple[Shapes, Shapes]:
    """Shapes of every parameter as it is, and as it is to be."""
    before = {alias: tuple(shape) for name, shape in trace.shapes.items() for alias in trace.aliases[name]}
    after = dict(before)
    for name, shape in wanted.items():
        after |= dict.fromkeys(trace.aliases.get(name, (name,)), shape)
    return before, after
