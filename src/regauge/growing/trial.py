"""How the model of a plan can be rebuilt in other sizes, without weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from regauge.discover import Gauge
from regauge.patches import Patch, merged
from regauge.plan import Rewrite

MOST_TRIALS = 96
Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[str, ...]
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
    """

    config: Mapping[str, Any] | None
    resolved: Mapping[str, Any]
    build: Callable[[Mapping[str, Any], Sequence[Patch]], tuple[nn.Module, Buffers]]
    gauge: Callable[[Mapping[str, Any], Sequence[Patch]], Gauge]


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
    )


def choices(options: Mapping[Key, Sequence[int]]) -> Iterator[dict[Key, int]]:
    """Every choice of some of the entries, each with one of its values; few entries first."""
    for count in range(1, len(options) + 1):
        for keys in itertools.combinations(options, count):
            for values in itertools.product(*(options[key] for key in keys)):
                yield dict(zip(keys, values, strict=True))
