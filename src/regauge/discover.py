"""From a trace to an atlas: walk, solve each family of groups, keep the maximal generators."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from functools import cached_property, partial

from regauge.atlas import Atlas, Space
from regauge.interpret import Walk, interpret
from regauge.solve.centring import entrances
from regauge.solve.folding import foldable, multipliers
from regauge.solve.layout import Layout
from regauge.solve.narrow import Stream, streams
from regauge.solve.solver import Solver
from regauge.trace import Trace, untie


def discover(trace: Trace) -> Atlas:
    """The atlas of a traced model, with its form after folding (and untying) as ``atlas.folded``."""
    gauge = Gauge(trace)
    tied = gauge.tied
    atlas = gauge.atlas(untied=False, folded=frozenset())
    folds = gauge.foldable(untied=bool(tied))
    folded = replace(gauge.atlas(untied=bool(tied), folded=frozenset(folds)), folds=folds)
    if not folds and not tied:
        return atlas
    merged = _with_folded(atlas, folded, trace)
    return replace(atlas, spaces=merged, folded=folded, folds=folds)


def _with_folded(atlas: Atlas, folded: Atlas, trace: Trace) -> tuple[Space, ...]:
    """Each space with what it admits after folding: as the folded space that shares most of its axes."""
    canonical = trace.canonical
    holders: dict[tuple[str, int, int], list[int]] = {}
    for number, space in enumerate(folded.spaces):
        for name, axis in space.parameters:
            holders.setdefault((canonical.get(name, name), axis, space.size), []).append(number)
    gains = set(folded.folds)
    out: list[Space] = []
    for space in atlas.spaces:
        shared: dict[int, int] = {}
        for name, axis in dict.fromkeys((canonical.get(n, n), a) for n, a in space.parameters):
            for number in dict.fromkeys(holders.get((name, axis, space.size), ())):
                shared[number] = shared.get(number, 0) + 1
        if not shared:
            out.append(space)
            continue
        best = max((folded.spaces[n] for n in sorted(shared)), key=partial(_likeness, space, shared))
        out.append(
            replace(
                space,
                admits_folded=best.admits,
                limits_folded=best.limits,
                folds=tuple(name for name, _ in space.parameters if name in gains),
                unties=tuple(dict.fromkeys(n for n, _ in best.parameters if canonical.get(n, n) != n)),
            )
        )
    return tuple(out)


def _likeness(space: Space, shared: Mapping[int, int], other: Space) -> tuple[int, bool, bool]:
    """Parameter axes in common, then the same copies, then the same number of axes."""
    number = int(other.id.removeprefix("s"))
    sizes = [size for _, size in space.copies] == [size for _, size in other.copies]
    return shared[number], sizes, len(space.parameters) == len(other.parameters)


def traced_only(gauge: Gauge) -> Gauge:
    """The gauge of the traced function alone: what other code may do with parameters that no operation reads
    limits a rewrite, but not whether two functions are the same."""
    trace = gauge.trace
    read = {node.name for node in trace.graph.nodes if node.users or node in trace.outputs}
    parameters = {node: name for node, name in trace.parameters.items() if node in read}
    return Gauge(replace(trace, parameters=parameters)) if len(parameters) < len(trace.parameters) else gauge


class Gauge:
    """Atlases of one traced model in every state that moves can bring it to, solved once each.

    A state is: whether tied parameters have been given their own copies, and which gains are one.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._walks: dict[bool, tuple[Walk, Layout]] = {}
        self._solvers: dict[tuple[bool, frozenset[str]], Solver] = {}
        self._atlases: dict[tuple[bool, frozenset[str]], Atlas] = {}
        self._foldable: dict[bool, tuple[str, ...]] = {}

    @cached_property
    def untied(self) -> Trace:
        """The traced model with a parameter of its own for every role."""
        return untie(self.trace)

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of state-dict names that are one parameter."""
        return tuple(names for names in self.trace.aliases.values() if len(names) > 1)

    def atlas(self, *, untied: bool = False, folded: frozenset[str] = frozenset()) -> Atlas:
        """The generators available when the gains ``folded`` are one."""
        key = (untied, folded)
        if key not in self._atlases:
            self._atlases[key] = self._solver(*key).atlas(self.trace, ())
        return self._atlases[key]

    def foldable(self, *, untied: bool = False) -> tuple[str, ...]:
        """Every gain that can be set to one, including those that others free when they fold."""
        if untied not in self._foldable:
            done: frozenset[str] = frozenset()
            while more := foldable(self._solver(untied, done)) - done:
                done |= more
            walk, _ = self._walk(untied)
            names = dict.fromkeys(name for name, _ in walk.result.parameters)
            self._foldable[untied] = tuple(name for name in names if name in done)
        return self._foldable[untied]

    def multipliers(self, *, untied: bool = False) -> tuple[str, ...]:
        """Parameters that multiply, entry by entry, something that is no parameter."""
        walk, _ = self._walk(untied)
        found = multipliers(walk.result.facts).values()
        return tuple(dict.fromkeys(str(value.parameter) for value in found))

    def zero_mean_norms(
        self, centred: Set[tuple[str, int]], *, untied: bool = False
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Where to centre in the forward pass, and which LayerNorms then have an input of mean zero.

        Args:
            centred: (parameter, axis) whose mean along the axis is zero.
            untied: as above.

        Returns:
            see :func:`regauge.solve.centring.entrances`.
        """
        walk, layout = self._walk(untied)
        paths, norms = entrances(walk, layout, frozenset(), centred, self.trace.graph)
        return tuple(paths), norms

    def streams(
        self, norms: Mapping[str, str], centred: Set[tuple[str, int]], *, untied: bool = False
    ) -> tuple[tuple[Stream, ...], Mapping[int, str]]:
        """The streams that LayerNorms of mean zero read, and modules at whose entrance one begins.

        Args:
            norms: operation -> path of the module that is a LayerNorm and nothing else.
            centred, untied: as above.

        Returns:
            see :func:`regauge.solve.narrow.streams`; and id of a value -> the module it enters.
        """
        walk, layout = self._walk(untied)
        paths, found = entrances(walk, layout, frozenset(), centred, self.trace.graph)
        elsewhere = {norms[name] for name in norms if name not in found}
        used = {name: norms[name] for name in found if name in norms and norms[name] not in elsewhere}
        taken = dict(paths.values())
        return streams(walk, used, centred, taken), {value: path for path, (value, _) in paths.items()}

    def walk(self, *, untied: bool = False) -> tuple[Walk, Layout]:
        """The walk over the graph, and the blocks of its values."""
        return self._walk(untied)

    def _walk(self, untied: bool) -> tuple[Walk, Layout]:
        if untied not in self._walks:
            walk = interpret(self.trace, untied)
            self._walks[untied] = walk, Layout(walk.structure, walk.result)
        return self._walks[untied]

    def _solver(self, untied: bool, folded: frozenset[str]) -> Solver:
        key = (untied, folded)
        if key not in self._solvers:
            walk, layout = self._walk(untied)
            ids = {value.id for value in walk.result.parameters.values() if value.parameter in folded}
            self._solvers = {key: Solver(walk, layout, ids)}
        return self._solvers[key]
