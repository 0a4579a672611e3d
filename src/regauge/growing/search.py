"""Which indices of a model are dead or double, one index set after the other until nothing changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from regauge.errors import Refused
from regauge.growing.alike import is_dead, is_double
from regauge.growing.passing import Relation
from regauge.growing.reach import Follower, Reach, Side
from regauge.growing.roles import Role, role_of, silent_sides
from regauge.growing.shrink import shrunk
from regauge.growing.sizes import grown_axis
from regauge.solve.layout import Layout


@dataclass
class Candidate:
    """An index set that may lose indices.

    Attributes:
        reach: where it goes.
        role: what it is for.
        silent: parameters that are added up when indices become one; none if they may not.
        into: for each index the one that it becomes: itself, a lower one, or -1 when it goes.
        least: it may not become smaller.
    """

    reach: Reach
    role: Role
    silent: tuple[Side, ...]
    into: list[int] = field(default_factory=list)
    least: int = 1

    @property
    def kept(self) -> list[int]:
        return [i for i, other in enumerate(self.into) if i == other]

    @property
    def goes(self) -> torch.Tensor:
        """int64 [old size]: new index of each old one, or -1."""
        place = {i: number for number, i in enumerate(self.kept)} | {-1: -1}
        return torch.tensor([place[i] for i in self.into])


def candidates(
    layout: Layout, relations: Sequence[Relation], matches: Callable[[Reach], bool]
) -> list[Candidate]:
    """Every index set that operations treat index by index; none that rotary embedding turns, since its
    indices have frequencies of their own."""
    follower = Follower(layout)
    found: list[Candidate] = []
    atoms = (
        o[1] for v in layout.facts.parameters.values() for block in layout.blocks(v) for o in block.order
    )
    for atom in dict.fromkeys(atoms):
        try:
            reach = follower.reach(atom)
        except Refused:
            continue
        if reach.turned or not reach.sums or reach.size < 2 or not matches(reach):
            continue
        role = role_of(reach)
        try:
            silent = silent_sides(follower, reach)
        except Refused:
            silent = ()
        if not silent or not is_double(relations, reach, role, silent):
            silent = ()
        found.append(Candidate(reach, role, silent))
    return found


class Search:
    """Looks for indices to remove, in the model as it is without those found so far.

    Args:
        layout: of the model.
        relations: how its facts pass indices on.
        read: current value of a parameter by name.
        chosen: the index sets to look at.
    """

    def __init__(
        self,
        layout: Layout,
        relations: Sequence[Relation],
        read: Callable[[str], torch.Tensor],
        chosen: Iterable[Candidate],
    ) -> None:
        self.layout, self.relations, self.read = layout, relations, read
        self.values = {name: value for (name, _), value in layout.facts.parameters.items()}
        self.charts: dict[str, set[float]] = {}
        for name, chart in layout.facts.parameters:
            self.charts.setdefault(name, set()).add(chart)
        self.chosen = list(chosen)

    def run(self) -> list[Candidate]:
        """The candidates of which some indices go."""
        for item in self.chosen:
            item.into = list(range(item.reach.size))
        waiting = list(self.chosen)
        while waiting:
            item = waiting.pop(0)
            names = {name for name, _, _ in item.reach.sides}
            if self._remove(item):
                for other in self.chosen:
                    if other not in waiting and names & {name for name, _, _ in other.reach.sides}:
                        waiting.append(other)
        return [item for item in self.chosen if len(item.kept) < item.reach.size]

    def _remove(self, item: Candidate) -> bool:
        """Remove what is dead, and make one of what is double. Whether anything changed."""
        before = list(item.into)
        kept = item.kept
        slices = {side: self._slices(item, side) for side in item.reach.sides}
        zeros = {side: self._zeros(side[0], held) for side, held in slices.items()}
        known: dict[frozenset[Side], bool] = {}
        for place, i in enumerate(kept):
            zero = frozenset(side for side, held in zeros.items() if held[place])
            if zero not in known:
                known[zero] = bool(zero) and is_dead(self.relations, item.reach, item.role, zero)
            if known[zero] and len(item.kept) > item.least:
                item.into = [-1 if other == i else other for other in item.into]
        first: dict[bytes, int] = {}
        for place, i in enumerate(kept if item.silent else ()):
            if item.into[i] != i or len(item.kept) <= item.least:
                continue
            digest = hashlib.blake2b()
            for side, held in slices.items():
                if side not in item.silent:
                    digest.update((held[place] + 0.0).numpy().tobytes())
            other = first.setdefault(digest.digest(), i)
            item.into = [other if held == i else held for held in item.into]
        return item.into != before

    def _slices(self, item: Candidate, side: Side) -> torch.Tensor:
        """float64 [indices kept so far, all else]: a part of a parameter, index by index."""
        name, number, offset = side
        sizes = {other.reach.atom: len(other.kept) for other in self.chosen}
        axes = [grown_axis(self.layout.structure, axis, sizes) for axis in self.values[name].axes]
        goes = {other.reach.atom: other.goes for other in self.chosen}
        value = shrunk(self.read(name), axes, goes, silent_of(name, self.chosen), {}, min(self.charts[name]))
        index = axes[number].index[item.reach.atom, offset]
        order = torch.argsort(torch.where(index < 0, len(item.kept), index), stable=True)
        value = value.index_select(number, order[: int((index >= 0).sum())]).movedim(number, 0)
        return value.reshape(len(item.kept), -1).contiguous()

    def _zeros(self, name: str, held: torch.Tensor) -> list[bool]:
        """Which indices are zero, with what is added to the stored value."""
        charts = self.charts[name]
        return [len(charts) == 1 and bool((row == -min(charts)).all()) for row in held]


def silent_of(name: str, chosen: Iterable[Candidate]) -> set[tuple[int, int, int]]:
    """(axis, offset of the leaf, atom id) along which a parameter is added up."""
    return {
        (axis, offset, item.reach.atom)
        for item in chosen
        for held, axis, offset in item.silent
        if held == name
    }


def level(chosen: Iterable[Candidate]) -> Mapping[tuple[Role, int], int]:
    """(role, old size) -> the largest new size of an index set of that role and size."""
    largest: dict[tuple[Role, int], int] = {}
    for item in chosen:
        key = item.role, item.reach.size
        largest[key] = max(largest.get(key, 1), len(item.kept))
    return largest
