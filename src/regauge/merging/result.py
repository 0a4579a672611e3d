"""What a merge did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regauge.certify import Certificate
from regauge.merging.barrier import Barrier

MERGE_VERSION = 1


@dataclass(frozen=True)
class Source:
    """One of the models that went in.

    Attributes:
        name: last part of its path.
        digest: of its contents.
        weight: its weight.
        similarity: mean cosine of its matrices with those of the model it was aligned to; None: as it is.
        related: whether that counts as derived by the calibration; None: not known.
        moved: whether it was moved; False where it is closer to the first as it is; None: not asked for.
        loss: on the text, in nats a token; None without a text.
    """

    name: str
    digest: str
    weight: float | None
    similarity: float | None = None
    related: bool | None = None
    moved: bool | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge did. It makes another function, and says how far from the first model it is.

    Attributes:
        out: where the result is.
        method: name of it.
        scale, density: see :class:`regauge.merging.methods.Settings`; None where the method has none.
        seed: of what is drawn.
        sources: the models, in order.
        base: the base model, if there is one.
        aligned: whether the others were moved into the gauge of the first (of the base) before.
        certificate: the first model (the base) and the result, run on the same inputs: measured, never called
            equivalent.
        loss: of the result on the text.
        barrier: the loss along the line, if asked for.
        warnings: what to be careful about.
        seconds: time by stage.
    """

    out: str
    method: str
    scale: float | None
    density: float | None
    seed: int
    sources: tuple[Source, ...]
    base: Source | None
    aligned: bool
    certificate: Certificate
    loss: float | None
    barrier: Barrier | None
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    version: int = MERGE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain: dict[str, Any] = asdict(self)
        plain["certificate"] = json.loads(self.certificate.to_json())
        return plain

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)
