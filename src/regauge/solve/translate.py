"""Translations: a shift of one bias that other biases take back.

Meaning of the generators, kind ``translation``: the shift ``t`` is indexed by the acting factor and the
copies. The first action is the source: ``t`` is added to its block. Every other one takes the shift back
where it arrives: ``exponent · t``, repeated along factors that ``t`` lacks, or ``exponent · Σ W t``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from regauge.atlas import Action, Generator, Kind, Limit, Space, Through
from regauge.facts import Law, Pointwise, Value
from regauge.solve.blind import Blind
from regauge.solve.family import ALL
from regauge.solve.flow import Flow
from regauge.solve.follow import SLOT, Follower
from regauge.solve.layout import Block
from regauge.solve.null import parameters, stand_ins
from regauge.solve.path import Failure, Path


def translations(solver: Any, spaces: Any, blind: Blind) -> tuple[list[Generator], dict[str, list[Limit]]]:
    """All translations, and for each space why shifts of it are stopped."""
    usable = _usable(solver)
    flow = Flow(solver.walk, solver.layout)
    follower = Follower(flow, blind, usable)
    out: list[Generator] = []
    stopped: dict[str, list[Failure]] = {}
    pairs: set[frozenset[tuple[str, tuple[int, ...]]]] = set()
    for value in usable:
        for block in solver.layout.blocks(value):
            if not _added(flow, block) or blind.of(block) == ALL:
                continue
            path = follower.follow(block)
            space = spaces.of(solver.groups.permutations.keys[(block, block.order[-1])])
            if path.failures:
                stopped.setdefault(space, []).extend(path.failures)
                continue
            if not path.absorbed:
                continue
            targets = [block, *(slot for slot, *_ in path.absorbed)]
            key = frozenset((str(b.value.parameter), b.offsets) for b in targets)
            if all(found is None for found in path.maps.values()):
                if key in pairs:
                    continue
                pairs.add(key)
            out.append(_generator(solver, path, space))
    return out, {space: _limits(failures) for space, failures in stopped.items()}


def _usable(solver: Any) -> list[Value]:
    """Parameters that one value stands for, not folded away."""
    values = stand_ins(solver)
    return [value for value in parameters(solver) if len(values[str(value.parameter)]) == 1]


def _added(flow: Flow, block: Block) -> bool:
    """Is this block of a parameter only ever added, with every one of its axes a factor?"""
    factors = sum(len(piece.factors) for piece in block.pieces)
    if not block.order or block.repeated or factors != len(block.order):
        return False
    if len({atom for _, atom in block.order}) != len(block.order):
        return False
    facts = [flow.facts[number] for number, _ in flow.leaves(block)]
    return bool(facts) and all(isinstance(f, Pointwise) and f.law in (Law.SUM, Law.SHIFT) for f in facts)


def _generator(solver: Any, path: Path, space: str) -> Generator:
    source = path.source
    acting = source.order[-1]
    actions: list[Action] = [replace(solver.action(source, acting, Fraction(1)), chart=0.0)]
    for key in path.absorbed:
        slot, images, scale, _ = key
        map_ = path.maps[key]
        targets = [here for there, here in images if map_ is not None or there == acting]
        action = solver.action(slot, targets[-1] if targets else None, -scale)
        through = None
        if map_ is not None:
            name = map_.block.value.parameter
            through = Through(str(name), solver.parts(map_.block), map_.axis, map_.result)
        actions.append(replace(action, chart=0.0, through=through))
    size = {atom: found.size for (_, atom), found in source.occurrences.items()}
    name, copies = solver.name(acting[1]), [(solver.name(atom), size[atom]) for _, atom in source.order[:-1]]
    return Generator("", Kind.TRANSLATION, name, size[acting[1]], tuple(copies), tuple(actions), space)


def _limits(failures: Sequence[Failure]) -> list[Limit]:
    """One limit naming every missing bias slot, and one for the first other reason."""
    out: list[Limit] = []
    slots = list(dict.fromkeys(f.fact.module for f in failures if f.slot))
    if slots:
        first = next(f.fact for f in failures if f.slot)
        more = f" and {len(slots) - 3} more" if len(slots) > 3 else ""
        reason = f"{SLOT} in " + ", ".join(slots[:3]) + more
        out.append(Limit(Kind.TRANSLATION, first.node, first.module, reason))
    other = next((f for f in failures if not f.slot), None)
    if other is not None:
        out.append(Limit(Kind.TRANSLATION, other.fact.node, other.fact.module, other.reason))
    return out


def with_limits(spaces: Sequence[Space], stopped: Mapping[str, Sequence[Limit]]) -> tuple[Space, ...]:
    """Spaces with what stopped their translations; if one is admitted, only the missing bias slots."""
    out: list[Space] = []
    for space in spaces:
        limits = [
            limit
            for limit in stopped.get(space.id, ())
            if Kind.TRANSLATION not in space.admits or limit.reason.startswith(SLOT)
        ]
        out.append(replace(space, limits=(*space.limits, *limits)))
    return tuple(out)
