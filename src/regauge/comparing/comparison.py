"""What a comparison found: the verdict, the transformation, and what is left over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from regauge.certify import Certificate
from regauge.matching import Leftover

COMPARISON_VERSION = 1


class Relation(StrEnum):
    EQUIVALENT = "equivalent"
    WITHIN_ROUNDING = "equivalent within rounding"
    DERIVED = "derived"
    UNRELATED = "unrelated"


@dataclass(frozen=True)
class Moved:
    """Generators of one kind, and how far their elements are from doing nothing.

    Attributes:
        kind: of group.
        generators: how many.
        copies: independent elements in all.
        moved: how many of them are not the identity (to 1e-6).
        size: largest size.
    """

    kind: str
    generators: int
    copies: int
    moved: int
    size: int


@dataclass(frozen=True)
class Change:
    """A kind of change, with what shows it."""

    kind: str
    evidence: str


@dataclass(frozen=True)
class Renumbering:
    """The tokens of two tokenizers that do not number them alike.

    Attributes:
        tokens: how many both have.
        renumbered: how many of these have another id.
        only_a, only_b: tokens that only one of the two has.
        common: whether the models were compared on the common tokens, in the order of a. They are not where
            fewer than half of the tokens are common, or where no table has a row for each of them.
    """

    tokens: int
    renumbered: int
    only_a: int
    only_b: int
    common: bool


@dataclass(frozen=True)
class Comparison:
    """The relation of b to a.

    Attributes:
        relation: the verdict.
        reason: the figure that decided, in one sentence.
        a, b: names of the two.
        similarity: mean cosine of the matrices after alignment; None if the models could not be aligned.
        threshold: similarity from which models count as derived.
        false_positive: probability that an unrelated pair reaches it, by the calibration.
        relative: root mean square of ‖a − b‖ / ‖a‖ over the matrices.
        gauge: the element found, kind by kind.
        changes: what the leftover looks like, where the two are not equivalent.
        tensors: what is left over, parameter by parameter.
        only_a, only_b: parameters without a counterpart.
        not_aligned: why there is no alignment.
        certificate: both run on the same inputs; None where their inputs or outputs differ.
        seconds: time by stage.
        vocabulary: where tokens are numbered differently; None where they are not, or are not known.
        renamed: tensors of b with names that its architecture does not have, named by their contents.
    """

    relation: Relation
    reason: str
    a: str
    b: str
    similarity: float | None
    threshold: float
    false_positive: float
    relative: float | None
    gauge: tuple[Moved, ...]
    changes: tuple[Change, ...]
    tensors: tuple[Leftover, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    not_aligned: str | None
    certificate: Certificate | None
    seconds: Mapping[str, float]
    vocabulary: Renumbering | None = None
    renamed: int = 0
    version: int = COMPARISON_VERSION

    @property
    def equivalent(self) -> bool:
        return self.relation in (Relation.EQUIVALENT, Relation.WITHIN_ROUNDING)

    def to_json(self, indent: int | None = 2) -> str:
        plain: dict[str, Any] = asdict(self)
        plain["relation"] = str(self.relation)
        plain["certificate"] = None if self.certificate is None else json.loads(self.certificate.to_json())
        return json.dumps(plain, indent=indent, default=str)
