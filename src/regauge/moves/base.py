"""What a move is: a pure function from what is known of a model to a change of its parameters.

A move sees an atlas and, if it must, tensors by name. It never sees a model, a module or a file, and
it returns a :class:`Change` or raises :class:`~regauge.errors.Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from regauge.atlas import Atlas, Generator, Kind, Space
from regauge.discover import Gauge
from regauge.elements import Element, residual
from regauge.errors import Refused
from regauge.growing.trial import Trial
from regauge.plan import Made, Refit, Step
from regauge.steps import ActStep
from regauge.trace import Trace


class Preserves(StrEnum):
    """What a move keeps."""

    OUTPUT = "every output, exactly"
    SOFTMAX = "every output up to a constant that softmax ignores"


@dataclass(frozen=True)
class Option:
    """One option of a move.

    Attributes:
        type: ``str``, ``float`` or ``bool``; values are parsed to it.
        default: value if not given.
        help: one line.
        choices: allowed values, if limited.
    """

    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """How far the moves have come: tied parameters given copies, and gains set to one."""

    untied: bool = False
    folded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scene:
    """What a move may look at.

    Attributes:
        gauge: the atlases of the model.
        state: how far earlier moves have come.
        read: current value of a parameter by state-dict name, as the moves so far leave it.
        random: CPU generator for this move alone.
        untie_config: changes to the configuration that untie, when asked for; None for plain modules.
        trial: how the model can be rebuilt in other sizes; None where it cannot.
        unscale_config: see :func:`regauge.embedding_scale.unscaled_config`; None for plain modules.
        config: content of ``config.json`` as the moves so far leave it; None for plain modules.
        tie_config: changes to the configuration that tie, and the groups of names that are then one
            parameter, when asked for; None for plain modules.
    """

    gauge: Gauge
    state: State
    read: Callable[[str], torch.Tensor]
    random: torch.Generator
    untie_config: Callable[[], Mapping[str, Any]] | None = None
    trial: Callable[[], Trial] | None = None
    unscale_config: Callable[[], tuple[Mapping[str, Any], Mapping[str, float]]] | None = None
    config: Callable[[], Mapping[str, Any]] | None = None
    tie_config: Callable[[], tuple[Mapping[str, Any], Sequence[tuple[str, ...]]]] | None = None

    @property
    def atlas(self) -> Atlas:
        return self.gauge.atlas(untied=self.state.untied, folded=self.state.folded)

    @property
    def trace(self) -> Trace:
        """The traced model, with a parameter of its own for every role once it is untied."""
        return self.gauge.untied if self.state.untied else self.gauge.trace

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.gauge.trace.shapes[self.gauge.trace.canonical[name]])


@dataclass(frozen=True)
class Used:
    """A generator that was acted on, with the algebraic evidence for its element.

    Attributes:
        generator: its id in the atlas at that point.
        kind: its kind.
        size, count: size of the element and number of copies.
        parameters: how many parameter blocks were changed.
        membership: how far the element is from its group (0 for exact members).
        pairing: largest relative change of ⟨reader, writer⟩ over random probes.
    """

    generator: str
    kind: str
    size: int
    count: int
    parameters: int
    membership: float
    pairing: float


@dataclass(frozen=True)
class Change:
    """What a move does; see :class:`regauge.plan.Rewrite`.

    Attributes:
        state: how far the moves have come then.
        retrace: the configuration gives another graph, or other parameters, and is to be traced anew.
        refits: parameters that change their shape, after their ``steps``.
        takes: parameter -> parameter before the move whose value it takes, with all that earlier moves did
            to it; all at once, so that layers can change places. ``steps``, ``made`` come after.
    """

    steps: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)
    refits: Mapping[str, Refit] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    state: State | None = None
    used: tuple[Used, ...] = ()
    patches: tuple[Mapping[str, Any], ...] = ()
    retrace: bool = False
    takes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """A named exact transformation.

    Attributes:
        name: as written in a recipe.
        identity: the algebra in one line, axes named.
        needs: what must hold for it to apply.
        preserves: what it keeps.
        options: its options by name.
        plan: ``(scene, options) -> Change``.
    """

    name: str
    identity: str
    needs: str
    preserves: Preserves
    plan: Callable[[Scene, Mapping[str, Any]], Change]
    options: Mapping[str, Option] = field(default_factory=dict)


class Builder:
    """Collects steps, parameter by parameter, in order."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.steps: dict[str, list[Step]] = {}
        self.used: list[Used] = []

    def add(self, parameter: str, step: Step) -> None:
        self.steps.setdefault(parameter, []).append(step)

    def apply(self, generator: Generator, element: Element) -> None:
        """Apply an element to every action of a generator, each exactly once."""
        copies = tuple(name for name, _ in generator.copies)
        for action in generator.actions:
            shape = self.scene.shape(action.parameter)
            self.add(action.parameter, ActStep(action, element, copies, shape))
        self.note(generator, element)

    def note(self, generator: Generator, element: Element | None) -> None:
        self.used.append(
            Used(
                generator.id,
                str(generator.kind),
                generator.size,
                generator.count,
                len(generator.actions),
                0.0 if element is None else residual(element),
                0.0 if element is None else pairing(element),
            )
        )

    def change(self, **more: Any) -> Change:
        return Change(
            {name: tuple(steps) for name, steps in self.steps.items()}, used=tuple(self.used), **more
        )


def pairing(element: Element) -> float:
    """⟨g⁻ᵀ r, g w⟩ = ⟨r, w⟩ on random probes r, w: largest relative deviation."""
    probe = torch.Generator().manual_seed(20261121)
    shape = (element.count, element.n, 2)
    r = torch.randn(shape, generator=probe, dtype=torch.float64)
    w = torch.randn(shape, generator=probe, dtype=torch.float64)
    left, right = element.inverse_transpose(r), element.forward(w)
    found, expected = (left * right).sum(1), (r * w).sum(1)
    scale = left.norm(dim=1) * right.norm(dim=1) + r.norm(dim=1) * w.norm(dim=1)
    return float(((found - expected).abs() / scale).max())


def widest(atlas: Atlas, *, copies: bool = False) -> Space:
    """The space that most parameter axes share: the residual stream, where there is one."""
    spaces = [space for space in atlas.spaces if bool(space.copies) == copies] or list(atlas.spaces)
    return max(spaces, key=lambda space: (len(space.parameters), space.size))


def describe(space: Space) -> str:
    """A space in one line, for messages."""
    more = len(space.parameters) - 1
    return f"{space.id} of size {space.size} ({space.parameters[0][0]} and {more} more)"


def refuse_kinds(scene: Scene, kinds: Iterable[Kind], what: str) -> Refused:
    """The refusal that names what limits the widest space for the kinds asked for."""
    kinds = tuple(kinds)
    space = widest(scene.atlas)
    limit = next((limit for kind in kinds for limit in space.limits if limit.kind is kind), None)
    foldable = set(scene.gauge.foldable(untied=True)) - scene.state.folded
    way_out = None
    names = {name for name, _ in space.parameters}
    if foldable & names or (scene.gauge.tied and not scene.state.untied):
        later = scene.gauge.atlas(untied=True, folded=scene.state.folded | foldable)
        if any(set(kinds) & {g.kind} and not g.copies for g in later.generators):
            way_out = "put fold-scales before it" + (
                ", and untie before that" if scene.gauge.tied and not scene.state.untied else ""
            )
        else:
            after = widest(later)
            limit = next((x for kind in kinds for x in after.limits if x.kind is kind), limit)
    return Refused(
        f"no {what} exists here",
        space=describe(space),
        node=None if limit is None else f"{limit.node} in {limit.module or 'the model'}",
        expected=" or ".join(str(kind) for kind in kinds),
        found=f"it admits {', '.join(space.admits) or 'nothing'}" if limit is None else limit.reason,
        way_out=way_out,
    )
