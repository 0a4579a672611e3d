"""One shift on its way: the forms it takes, the slots that took it back, and where it was stopped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

from regauge.facts import Contract, Fact
from regauge.solve.flow import Reading
from regauge.solve.layout import Block, Occurrence, OccurrenceMap

Images = tuple[tuple[Occurrence, Occurrence], ...]
Taken = tuple[Block, Images, Fraction, "Block | None"]
"""A slot, how its factors follow the shift's, the scale, and the linear map gone through."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The block of a parameter that a shift went through, contracted along one of its axes."""

    block: Block
    axis: int
    result: int
    fact: Contract


@dataclass(frozen=True)
class Form:
    """How a block changes: by ``scale`` times the shift (or its image), constant along all else.

    ``images``: occurrence in the shift's block (or in that of the linear map) -> occurrence here.
    """

    images: Images
    scale: Fraction
    map: LinearMap | None = None

    def moved(self, mapping: OccurrenceMap, factor: Fraction = Fraction(1)) -> Form | None:
        """The same change seen through a map of occurrences; None if one of its factors is lost."""
        if any(here not in mapping or mapping[here][1] != here[1] for _, here in self.images):
            return None
        images = tuple((source, mapping[here]) for source, here in self.images)
        return replace(self, images=images, scale=self.scale * factor)


@dataclass(frozen=True)
class Failure:
    """Where a shift was stopped; ``slot`` if a bias there would have taken it back."""

    fact: Fact
    reason: str
    slot: bool = False


@dataclass
class Path:
    """State of following one shift."""

    source: Block
    forms: dict[Block, Form] = field(default_factory=dict)
    queue: list[int] = field(default_factory=list)
    absorbed: dict[Taken, list[Reading]] = field(default_factory=dict)
    maps: dict[Taken, LinearMap | None] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
