"""Two models that number the same tokens differently: each runs on its own ids, and the logits of the same
token are compared. Tokens that only one of them has are neither given nor compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from regauge.certify.certificate import Tokens
from regauge.certify.figures import Held, Output
from regauge.certify.measure import Function
from regauge.certify.parts import Product
from regauge.vocabulary import Axes, Vocabulary

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Numbering:
    """How both are run.

    Attributes:
        vocabulary: the common tokens.
        a, b: where the two count tokens.
    """

    vocabulary: Vocabulary
    a: Axes
    b: Axes
    _other: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.vocabulary.ids_a
        other = torch.full((int(ids.max()) + 1,), -1, dtype=torch.int64)
        other[ids] = self.vocabulary.ids_b
        object.__setattr__(self, "_other", other)

    def common(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Batches of a in which every token that b lacks is replaced by one that both have."""
        ids = self.vocabulary.ids_a

        def known(value: torch.Tensor) -> torch.Tensor:
            shared = (value < len(self._other)) & (self._other[value.clamp(max=len(self._other) - 1)] >= 0)
            return torch.where(shared, value, ids[value % len(ids)])

        return [_replaced(batch, self.a.inputs, known) for batch in batches]

    def first(self, function: Function) -> Function:
        """a, with the logits of common tokens only."""
        return replace(function, pick=self._pick(self.a, self.vocabulary.ids_a))

    def second(self, function: Function) -> Function:
        """b, on the inputs of a, with the logits of common tokens in the order of a."""

        def given(batch: Batch) -> Batch:
            return _replaced(batch, self.b.inputs, lambda ids: self._other[ids])

        return replace(function, given=given, pick=self._pick(self.b, self.vocabulary.ids_b))

    def tokens(self) -> Tokens:
        found = self.vocabulary
        return Tokens(found.shared, found.renumbered, found.only_a, found.only_b)

    @property
    def by_token(self) -> bool:
        """Whether the outputs have an entry for each token."""
        return self.a.logits is not None and self.b.logits is not None

    def _pick(self, axes: Axes, index: torch.Tensor) -> Callable[[Output], Output] | None:
        every = axes.logits == len(index) and torch.equal(index, torch.arange(len(index)))
        if every or not self.by_token:
            return None
        return lambda output: Columns(output, index)


@dataclass(frozen=True)
class Columns:
    """Some entries of the last axis of an output, in an order of their own."""

    whole: Output
    index: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole.shape[:-1], len(self.index))

    @property
    def step(self) -> int:
        return self.whole.step

    def columns(self, start: int, stop: int) -> torch.Tensor:
        index = self.index[start:stop]
        if isinstance(self.whole, (Held, Product)):
            return self.whole.at(index)
        return self.whole.columns(0, self.whole.shape[-1])[:, index]


def _replaced(
    batch: Batch, names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    return {name: change(value) if name in names else value for name, value in batch.items()}
