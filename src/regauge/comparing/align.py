"""`regauge align`: b moved into a's gauge, written as a directory of b's architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regauge.act import read_block
from regauge.atlas import Action, Generator, Kind
from regauge.blocks import view_block
from regauge.elements import Diagonal
from regauge.errors import Refused
from regauge.matching import Alignment, align_sides
from regauge.matching.kinds import completed
from regauge.matching.moved import Pair
from regauge.matching.sides import Side, open_models, sides_of
from regauge.model import CheckpointModel
from regauge.moves.fold import scales_of, spans
from regauge.plan import Rewrite, Step
from regauge.rewriting import RewriteResult, carry_out
from regauge.shift import apply_shift, source_shift
from regauge.sources import resolve
from regauge.stages import Clock, Progress, silent
from regauge.steps import ActStep, AddStep

_PASSES = 4


@dataclass(frozen=True)
class AlignResult:
    """What was written.

    Attributes:
        alignment: the element found, and what is left over.
        result: how it was written, with the certificate that the output is the same function as b.
    """

    alignment: Alignment
    result: RewriteResult


def align(
    a: str | Path,
    b: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> AlignResult:
    """Write b moved into a's gauge: the same function as b, ready to be compared, averaged or merged with a.

    Gains, shifts and whatever else the gauge leaves free get a's values. The output has b's architecture.

    Raises:
        Refused: the models do not do the same with their parameters, or differ in size.
        NotEquivalent, BadInput, CheckpointError: as :func:`regauge.rewriting.rewrite`.
    """
    tell = progress or silent
    path_a, path_b, target = resolve(a), resolve(b), Path(out)
    clock = Clock()
    tell("tracing", 0, 1)
    with open_models(path_a, path_b) as (first, second):
        clock.lap("trace")
        sides = sides_of(first, second, (path_a.name, path_b.name), structure=False)
        alignment, pair = align_sides(*sides, tell)
        clock.lap("align")
        plan = plan_of(first, second, sides, alignment, pair)
        clock.lap("plan")
        result = carry_out(
            second,
            plan,
            path_b,
            target,
            key=["align", first.files.digest()],
            dtype=dtype,
            seed=seed,
            max_memory=max_memory,
            text=text,
            tell=tell,
            clock=clock,
        )
    return AlignResult(alignment, result)


def plan_of(
    model_a: CheckpointModel,
    model_b: CheckpointModel,
    sides: tuple[Side, Side],
    alignment: Alignment,
    pair: Pair,
) -> Rewrite:
    """b's normal form, the elements found, and then what a's normal form has taken out put back."""
    a, b = sides
    other = [n for n in pair.names if a.shapes[n] != b.shapes[pair.names[n]]]
    if other or alignment.only_a or alignment.only_b:
        name = next(iter((*other, *alignment.only_a, *alignment.only_b)))
        raise Refused(
            "the models have other parameters or sizes: one cannot take the other's form",
            parameter=name,
            expected="the same architecture and sizes",
            found=str(a.shapes.get(name, b.shapes.get(name))),
            way_out="regauge compare says how they are related",
        )
    work = _Work(model_a, model_b, sides, {**pair.names, **alignment.idle})
    for generator, element in pair.history:
        work.act(work.renamed(generator), completed(element))
    work.gains()
    for _ in range(_PASSES):
        if not work.shifts():
            break
    work.unseen()
    recipe = (*b.plan.recipe, {"move": "align"})
    return replace(b.plan, steps=work.steps, recipe=recipe)


class _Work:
    """Steps on b's parameters, one list for each."""

    def __init__(
        self,
        model_a: CheckpointModel,
        model_b: CheckpointModel,
        sides: tuple[Side, Side],
        names: Mapping[str, str],
    ) -> None:
        self.model_b, self.names = model_b, names
        self.a, self.b = sides
        self.theirs = {other: name for name, other in names.items()}
        self.steps: dict[str, tuple[Step, ...]] = dict(self.b.plan.steps)
        # What a holds before its normal form, under b's names.
        self._target: Callable[[str], torch.Tensor] = model_a.view(Rewrite(copies=self.a.plan.copies)).read

    def renamed(self, generator: Generator) -> Generator:
        actions = (replace(act, parameter=self.names[act.parameter]) for act in generator.actions)
        return replace(generator, actions=tuple(actions))

    def add(self, name: str, step: Step) -> None:
        self.steps[name] = (*self.steps.get(name, ()), step)

    def act(self, generator: Generator, element: object) -> None:
        copies = tuple(name for name, _ in generator.copies)
        for action in generator.actions:
            shape = self.b.shapes[action.parameter]
            self.add(action.parameter, ActStep(action, element, copies, shape))  # type: ignore[arg-type]

    def now(self, name: str) -> torch.Tensor:
        """b's parameter as the steps so far leave it."""
        plan = replace(self.b.plan, steps=self.steps)
        return self.model_b.view(plan).read(name).to(torch.float64)

    def wanted(self, name: str) -> torch.Tensor:
        """a's counterpart of b's parameter, as a holds it."""
        return self._target(self.theirs[name]).to(torch.float64)

    def gains(self) -> None:
        """g ← a's g, readers W[o, c] ← W[o, c] / g[c]; entries where a's gain is zero stay one."""
        atlas = self.b.gauge.atlas(untied=self.b.state.untied, folded=frozenset())
        for gain in sorted(self.b.state.folded):
            if gain not in self.theirs:
                continue
            for generator in scales_of(atlas, gain):
                copies = tuple(name for name, _ in generator.copies)
                own = next(x for x in generator.actions if x.parameter == gain and spans(x, generator))
                value = read_block(self.wanted(gain), own, copies).squeeze(-1)
                value = torch.where(value == 0, torch.ones_like(value), value)
                power = value if own.exponent > 0 else 1 / value
                kind = Kind.POSITIVE if bool((power > 0).all()) else Kind.SCALE
                self.act(generator, Diagonal(power, kind))

    def shifts(self) -> bool:
        """Every shift that the gauge can move gets a's value; whether any had to."""
        atlas = self.b.gauge.atlas(untied=self.b.state.untied, folded=frozenset())
        moved = False
        for generator in atlas.of_kind(Kind.TRANSLATION):
            source = generator.actions[0].parameter
            if any(action.parameter not in self.theirs for action in generator.actions):
                continue
            t = source_shift(self.now(source), generator) - source_shift(self.wanted(source), generator)
            if float(t.abs().max()) <= 1e-14 * (1 + float(self.wanted(source).abs().max())):
                continue
            moved = True
            for name, delta in apply_shift(self.now, generator, t).items():
                self.add(name, AddStep(delta))
        return moved

    def unseen(self) -> None:
        """What no reader sees gets a's value."""
        atlas = self.b.gauge.atlas(untied=self.b.state.untied, folded=frozenset())
        for generator in atlas.of_kind(Kind.NULL):
            for action in generator.actions:
                if action.parameter in self.theirs:
                    self.add(action.parameter, AddStep(self._unseen_part(action)))

    def _unseen_part(self, action: Action) -> torch.Tensor:
        delta = (self.wanted(action.parameter) - self.now(action.parameter)).contiguous()
        out = torch.zeros_like(delta)
        shape = tuple(delta.shape)
        source, target = (view_block(x, action, (action.acting,), shape) for x in (delta, out))
        target.copy_(source.mean(0, keepdim=True).expand_as(source) if action.exponent else source)
        return out
