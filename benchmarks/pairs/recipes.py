"""What a model is made of: where it starts, and what is done to it.

A name is ``FAMILY/SEED-PART`` for a model trained from scratch, ``-wide`` or ``-other`` added for one with
more neurons or another activation, ``FAMILY/SEED-new`` for one that was never trained.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from pairs.families import FAMILIES

Step = tuple[str, Any]


@dataclass(frozen=True)
class Source:
    """A model from scratch.

    Attributes:
        family: name of it.
        seed: of the first weights and of the order of the samples.
        part: of the data; ``new`` for none.
        variant: empty, ``wide`` or ``other``.
    """

    family: str
    seed: int
    part: str = "a"
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join((f"{self.family}/{self.seed}", self.part, *filter(None, (self.variant,))))

    def build(self) -> nn.Module:
        """With its first weights."""
        model = FAMILIES[self.family].build(self.seed, self.variant == "wide", self.variant == "other")
        return model.eval()


@dataclass(frozen=True)
class Made:
    """A model: where it starts, and what is done to it in order.

    Attributes:
        source: the model it starts from.
        steps: (change, argument). Arguments: a seed for ``tuned``, ``adapted`` and ``disguised``; the other
            model for ``averaged``; None for ``rounded``, ``half``, ``silenced``, ``removed`` and ``first``.
    """

    source: Source
    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> Made:
        return Made(self.source, self.steps + steps)

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        held = [[name, value.plain() if isinstance(value, Made) else value] for name, value in self.steps]
        return {"source": self.source.name, "steps": held}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.plain()).encode()).hexdigest()[:16]
