"""A planned rewrite: for every parameter a frozen list of pure steps. Nothing here touches a file.

A plan is made by moves, applied by :mod:`regauge.apply`, and never mutated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Step(Protocol):
    """One change of one tensor.

    Attributes:
        axes: axes along which the step is not element-by-element alike; along every *other* axis a
            tensor may be cut into blocks and the step applied to each block separately.
        arithmetic: False if the step only moves entries or flips signs, so that it is exact in any
            dtype and needs no cast; True if it must be computed in float64.
    """

    @property
    def axes(self) -> frozenset[int]: ...

    @property
    def arithmetic(self) -> bool: ...

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The changed tensor, same shape and dtype. The argument is left as it is."""
        ...


@dataclass(frozen=True, eq=False)
class Made:
    """A parameter that the source lacks, or holds in another shape.

    Attributes:
        shape: its shape.
        like: existing parameter whose dtype it takes, and beside which it is stored.
        build: from a reader of *original* values, by parameter name, to its first value in float64, before
            its own steps; None for zeros.
    """

    shape: tuple[int, ...]
    like: str
    build: Callable[[Callable[[str], torch.Tensor]], torch.Tensor] | None = None

    def value(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The first value, float64, of ``shape``."""
        if self.build is None:
            return torch.zeros(self.shape, dtype=torch.float64)
        return self.build(read).to(torch.float64)


@dataclass(frozen=True, eq=False)
class Refit:
    """A parameter in another shape, made of its own value.

    Attributes:
        shape: the new shape.
        build: from the value as the steps before leave it, float64, to the new one.
    """

    shape: tuple[int, ...]
    build: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rewrite:
    """What to do to a checkpoint.

    Attributes:
        steps: parameter name -> steps, in order. Parameters not named are copied as bytes.
        copies: new tensor name -> name of the existing parameter whose *original* value it starts
            from (untying); its own steps are listed under the new name.
        made: parameters that are computed as a whole; their own steps are listed under their names.
        drops: parameters that are no longer stored; steps they still have are not carried out.
        config: changes to the top level of ``config.json``.
        recipe: the moves that were asked for, as plain data, for the manifest.
        used: generators acted on, as plain data (id, kind, size, algebraic residuals).
        patches: modules to replace, since the source architecture cannot express the result; see
            :mod:`regauge.patches`.
    """

    steps: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: tuple[Mapping[str, Any], ...] = ()
    used: tuple[Mapping[str, Any], ...] = ()
    patches: tuple[Mapping[str, Any], ...] = ()

    def value(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The parameter as this plan leaves it, float64; ``read``: original values by parameter name."""
        made = self.made.get(name)
        value = read(self.copies.get(name, name)) if made is None else made.value(read)
        value = value.to(torch.float64)
        for step in self.steps.get(name, ()):
            value = step.apply(value)
        return value

    def made_of(self, name: str, refit: Refit) -> Made:
        """The parameter refitted after all this plan does to it: the steps, copy and making so far are
        within, so that the result is again made of original values alone."""
        made, origin = self.made.get(name), self.copies.get(name, name)

        def build(read: Callable[[str], torch.Tensor]) -> torch.Tensor:
            return refit.build(self.value(name, read))

        return Made(refit.shape, origin if made is None else made.like, build)
