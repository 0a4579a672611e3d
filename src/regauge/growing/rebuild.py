"""A model with index sets of other sizes: where entries go, how it is rebuilt, and what must be scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from regauge.discover import Gauge
from regauge.growing.correct import Growing, corrected
from regauge.growing.fit import Fit, fitted, replaced
from regauge.growing.reach import Side
from regauge.growing.same import same_but_for_sizes
from regauge.growing.sizes import GrownAxis, grown_axis
from regauge.growing.trial import Shapes, Trial
from regauge.patches import Patch
from regauge.solve.layout import Layout
from regauge.trace import Trace


@dataclass(frozen=True)
class Rebuilt:
    """What :func:`rebuilt` found.

    Attributes:
        axes: parameter -> each of its axes in the new sizes.
        shapes: parameter -> its shape then, for those whose shape or scale changes.
        charts: parameter -> what is added to its stored value before it is used.
        fit: the structure.
        factors: parts of parameters -> what they are multiplied by.
    """

    axes: Mapping[str, tuple[GrownAxis, ...]]
    shapes: Shapes
    charts: Mapping[str, float]
    fit: Fit
    factors: Mapping[Side, float]

    def scales(self, name: str) -> dict[tuple[int, int], float]:
        """(axis, offset of the leaf) -> factor, of one parameter."""
        return {(axis, offset): f for (held, axis, offset), f in self.factors.items() if held == name}


def rebuilt(
    trial: Trial, trace: Trace, layout: Layout, chosen: Sequence[Growing], lengths: Mapping[int, int]
) -> Rebuilt:
    """The model with these index sets in these sizes.

    Args:
        trial: how models are rebuilt.
        trace, layout: of the model as it is.
        chosen: index sets with their new sizes, larger or smaller.
        lengths: see :func:`regauge.growing.fit.fitted`.

    Raises:
        Refused: nothing gives these sizes, or a constant changes with them.
    """
    sizes = {item.reach.atom: item.size for item in chosen}
    axes: dict[str, tuple[GrownAxis, ...]] = {}
    for value in layout.facts.parameters.values():
        assert value.parameter is not None
        axes[value.parameter] = tuple(grown_axis(layout.structure, axis, sizes) for axis in value.axes)
    shapes = {name: tuple(axis.size for axis in held) for name, held in axes.items()}
    wanted = {
        name: shape for name, shape in shapes.items() if shape != tuple(trace.shapes[trace.canonical[name]])
    }

    def accept(gauge: Gauge, patches: Sequence[Patch]) -> bool:
        _, after = gauge.walk()
        return same_but_for_sizes(trace, gauge.trace, after, axes, trace.canonical, replaced(patches))

    fit = fitted(trial, trace, wanted, _candidates(axes), accept, lengths)
    fit, factors = corrected(trial, fit, trace, layout, chosen)
    changed = dict.fromkeys((*wanted, *(name for name, _, _ in factors)))
    charts = {name: chart for name, chart in layout.facts.parameters}
    return Rebuilt(axes, {name: shapes[name] for name in changed}, charts, fit, factors)


def _candidates(axes: Mapping[str, tuple[GrownAxis, ...]]) -> dict[int, set[int]]:
    """Old sizes -> what each may become: of index sets, of neighbouring ones together, of whole axes."""
    sizes: dict[int, set[int]] = {}
    for axis in (axis for held in axes.values() for axis in held):
        pairs = [(len(axis.old), axis.size)]
        for leaf in axis.leaves:
            counts = [(n, m) for _, n, _, m, _ in leaf.factors]
            for first in range(len(counts)):
                for last in range(first + 1, len(counts) + 1):
                    before, after = zip(*counts[first:last], strict=True)
                    pairs.append((prod(before), prod(after)))
        for before, after in pairs:
            if before != after:
                sizes.setdefault(before, set()).add(after)
    return sizes
