"""A plain module with its trace: what plans for modules in memory start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regauge.discover import Gauge
from regauge.growing.trial import trial_of
from regauge.moves import State
from regauge.patches import restructured
from regauge.plan import Rewrite
from regauge.planner import make_plan
from regauge.recipe import Recipe
from regauge.trace import Trace, trace


@dataclass(frozen=True)
class ModuleModel:
    """A module on the CPU, traced on its example inputs; it is never changed.

    Attributes:
        module: the module.
        args, kwargs, outputs: as given to :func:`regauge.trace.trace`.
        gauge: its atlases.
        state: its tensors by state-dict name.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: Sequence[str] | None
    gauge: Gauge
    state: Mapping[str, torch.Tensor]

    @staticmethod
    def of(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
    ) -> ModuleModel:
        """Trace a module. Raises ``TraceError`` if it cannot be."""
        gauge = Gauge(trace(module, args, kwargs, outputs=outputs))
        state = {name: value.detach() for name, value in module.state_dict(keep_vars=True).items()}
        return ModuleModel(module, args, kwargs, outputs, gauge, state)

    def plan(self, recipe: Recipe, seed: int) -> tuple[Rewrite, State, Gauge]:
        """See :func:`regauge.planner.make_plan`."""
        return make_plan(
            self.gauge,
            recipe,
            seed,
            lambda so_far: lambda name: self.read(so_far, name),
            retrace=self._retrace,
            trial=lambda so_far: trial_of(so_far, self._built, self._retrace),
        )

    def read(self, plan: Rewrite, name: str) -> torch.Tensor:
        """A parameter as the plan leaves it: float64 if the plan changes it, else in its own dtype."""
        made = plan.made.get(name)
        value = (
            self.state[plan.copies.get(name, name)] if made is None else made.value(self.state.__getitem__)
        )
        for step in plan.steps.get(name, ()):
            value = step.apply(value.to(torch.float64))
        return value

    def rebuilt(self, plan: Rewrite) -> nn.Module:
        """A copy with the structure that the plan asks for, and the old values."""
        return restructured(self.module, plan.copies, plan.patches)

    def trace_of(self, module: nn.Module) -> Trace:
        """A changed copy, traced on the same inputs."""
        return trace(module, self.args, self.kwargs, outputs=self.outputs)

    def _retrace(self, plan: Rewrite) -> Gauge:
        return Gauge(self.trace_of(self.rebuilt(plan)))

    def _built(self, plan: Rewrite) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
        changed = self.rebuilt(plan)
        return changed, dict(changed.named_buffers())
