"""b moved into a's gauge: which generators agree, which elements were found, and what is left over."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from regauge.atlas import Action, Generator
from regauge.elements import Element
from regauge.matching.correspondence import Correspondence, correspond
from regauge.matching.history import shortened
from regauge.matching.moved import Pair
from regauge.matching.order import LINEAR
from regauge.matching.padding import padded_alike
from regauge.matching.sides import Side, side_of_module
from regauge.matching.solver import SWEEPS, refine, run
from regauge.module_model import ModuleModel
from regauge.stages import Progress, silent

CLOSE = 1e-2
"""Relative residual below which one pass is enough: every unit has found its counterpart."""


@dataclass(frozen=True)
class Leftover:
    """What alignment leaves of one parameter.

    Attributes:
        parameter, other: its name in a and in b.
        shape: its shape in the normal form.
        relative: ‖a − b‖ / ‖a‖.
        cosine: ⟨a, b⟩ / (‖a‖ ‖b‖).
        slope: ⟨a, b⟩ / ⟨a, a⟩.
        norm: ‖a‖.
        difference: ‖a − b‖.
    """

    parameter: str
    other: str
    shape: tuple[int, ...]
    relative: float
    cosine: float
    slope: float
    norm: float
    difference: float


@dataclass(frozen=True)
class Alignment:
    """The element of the gauge that brings b to a.

    Attributes:
        names: parameter of a -> parameter of b, in their normal forms.
        only_a, only_b: parameters that only one of them has.
        tensors: what is left over, parameter by parameter.
        elements: generator and element, in the order they act.
        unsolved: generators that nothing determines.
        different: generators that only one of the models has.
        sweeps: how often all generators were solved.
        idle: parameter of a -> parameter of b, for vectors of which one does nothing.
    """

    names: Mapping[str, str]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    tensors: tuple[Leftover, ...]
    elements: tuple[tuple[Generator, Element], ...] = field(repr=False)
    unsolved: tuple[Generator, ...] = ()
    different: int = 0
    sweeps: int = 1
    idle: Mapping[str, str] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """√(Σ ‖a − b‖² / Σ ‖a‖²) with every matrix scaled to norm one."""
        return _relative(self.tensors)

    @property
    def similarity(self) -> float:
        """Mean cosine of the matrices, each weighed by its number of entries to the power ½."""
        kept = _matrices(self.tensors)
        weights = [math.sqrt(math.prod(t.shape)) for t in kept]
        return sum(w * t.cosine for w, t in zip(weights, kept, strict=True)) / max(sum(weights), 1e-300)


def align_sides(a: Side, b: Side, tell: Progress | None = None) -> tuple[Alignment, Pair]:
    """Solve for the element of the gauge that brings b to a.

    Raises:
        Refused: the models do not do the same with their parameters.
    """
    found = correspond(a, b)
    a, b = padded_alike(a, b, found.names)
    generators, different = common(a, b, found)
    same = {name: other for name, other in found.names.items() if a.shapes[name] == b.shapes[other]}
    back = {other: name for name, other in same.items()}
    first = a.with_null(
        {back[n]: [replace(x, parameter=back[n]) for x in b.null[n]] for n in b.null if n in back}
    )
    second = b.with_null(
        {same[n]: [replace(x, parameter=same[n]) for x in a.null[n]] for n in a.null if n in same}
    )
    pair = Pair(first, second, same)
    say = tell or silent
    solved = run(pair, generators, lambda done, total: say("aligning", done, total))
    left = leftovers(pair)
    best = _objective(pair, left)
    sweeps = 1
    if _relative(left) > CLOSE:  # Models of one gauge may need no element, and show too little to find that.
        history = list(pair.history)
        pair.replace([])
        plain = leftovers(pair)
        now = _objective(pair, plain)
        if now < best:
            left, best = plain, now
        else:
            pair.replace(history)
    while sweeps < SWEEPS and _relative(left) > CLOSE:
        say("improving", sweeps, SWEEPS)
        history = list(pair.history)
        changed = refine(pair, solved)
        pair.replace(shortened(pair.history))
        sweeps += 1
        again = leftovers(pair)
        now = _objective(pair, again)
        if now >= best:
            pair.replace(history)
            break
        stop = not changed and now > 0.99 * best
        left, best = again, now
        if stop:
            break
    elements = tuple(pair.history)
    return Alignment(
        same, found.only_a, found.only_b, left, elements, solved.unsolved, different, sweeps, found.idle
    ), pair


def align_modules(
    a: nn.Module,
    b: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    inputs_b: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Alignment:
    """Align two modules in memory; see :func:`align_sides`."""
    from regauge.api import given_inputs

    sides = [
        side_of_module(ModuleModel.of(module, *given_inputs(given)), name=name)
        for module, given, name in ((a, inputs, "a"), (b, inputs if inputs_b is None else inputs_b, "b"))
    ]
    return align_sides(sides[0], sides[1])[0]


def common(a: Side, b: Side, found: Correspondence) -> tuple[list[Generator], int]:
    """Generators of a that b has too, acting on the corresponding blocks; and how many have no partner.

    Only parameters that correspond are looked at: what is left out on both sides is zero or one.
    """
    ours = _restricted(a.atlas.generators, found.names)
    theirs = {
        _signature(g, lambda name: name) for g in _restricted(b.atlas.generators, set(found.names.values()))
    }
    matched = [g for g in ours if _signature(g, found.names.__getitem__) in theirs]
    return matched, len(ours) + len(theirs) - 2 * len(matched)


def _restricted(generators: Sequence[Generator], names: Container[str]) -> list[Generator]:
    kept = (replace(g, actions=tuple(act for act in g.actions if act.parameter in names)) for g in generators)
    return [g for g in kept if g.actions and g.kind in LINEAR]


def _signature(generator: Generator, name: Callable[[str], str]) -> frozenset[Any]:
    copies = tuple(size for _, size in generator.copies)

    def action(act: Action) -> Any:
        parts = tuple((p.offset, tuple((f.size, f.stride) for f in p.factors)) for p in act.parts)
        return name(act.parameter), parts, act.axis, act.exponent, act.chart

    return frozenset({(generator.kind, generator.size, copies), *map(action, generator.actions)})


def leftovers(pair: Pair) -> tuple[Leftover, ...]:
    """‖a − b‖ and ⟨a, b⟩ of every pair of parameters."""
    found: list[Leftover] = []
    for name, other in pair.names.items():
        aa = bb = ab = dd = 0.0
        for x, y in pair.chunks(name):
            u, v = x.reshape(-1), y.reshape(-1)
            aa, bb, ab = aa + float(u @ u), bb + float(v @ v), ab + float(u @ v)
            dd += float((u - v).square().sum())
        small = max(aa, bb) == 0.0
        found.append(
            Leftover(
                name,
                other,
                pair.a.shapes[name],
                0.0 if small else math.sqrt(dd / aa) if aa else math.inf,
                1.0 if small else ab / math.sqrt(aa * bb) if aa and bb else 0.0,
                ab / aa if aa else 0.0,
                math.sqrt(aa),
                math.sqrt(dd),
            )
        )
    return tuple(found)


def _matrices(left: Sequence[Leftover]) -> list[Leftover]:
    return [t for t in left if len(t.shape) > 1 and t.norm > 0] or [t for t in left if t.norm > 0]


def _relative(left: Sequence[Leftover]) -> float:
    found = [t.relative**2 for t in _matrices(left)]
    return math.sqrt(sum(found) / len(found)) if found else 0.0


def _objective(pair: Pair, left: Sequence[Leftover]) -> float:
    """Σ w ‖a − b‖² over all parameters, which no step of :func:`refine` makes larger."""
    return sum(pair.weight(t.parameter) * t.difference**2 for t in left)
