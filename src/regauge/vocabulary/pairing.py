"""The ids that two tokenizers give to the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from regauge.trace import Trace
from regauge.vocabulary.axes import Axes, vocabulary_axes
from regauge.vocabulary.tokenizer import read_tokens


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that two models have in common.

    Attributes:
        ids_a: their ids in a, int64 [N], increasing.
        ids_b: their ids in b, int64 [N].
        only_a, only_b: number of tokens that only one of the two has.
    """

    ids_a: torch.Tensor = field(repr=False)
    ids_b: torch.Tensor = field(repr=False)
    only_a: int = 0
    only_b: int = 0

    @property
    def shared(self) -> int:
        return len(self.ids_a)

    @property
    def renumbered(self) -> int:
        """How many of the common tokens have another id."""
        return int((self.ids_a != self.ids_b).sum())

    @property
    def alike(self) -> bool:
        """At least half of the tokens of the smaller one are common to both."""
        return self.shared * 2 >= self.shared + min(self.only_a, self.only_b) and self.shared > 0


def shared_vocabulary(a: Path, b: Path) -> Vocabulary | None:
    """The tokens of both directories' tokenizers, paired by what they are; None where one has no tokenizer.

    Tokens of the same id, of which only one can be paired, are paired in the order of the file.
    """
    tokens_a, tokens_b = read_tokens(a), read_tokens(b)
    if tokens_a is None or tokens_b is None:
        return None
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    common = 0
    for token, place in tokens_a.items():
        other = tokens_b.get(token)
        if other is None:
            continue
        common += 1
        if place not in pairs and other not in taken:
            pairs[place] = other
            taken.add(other)
    ordered = sorted(pairs.items())
    ids = torch.tensor(ordered, dtype=torch.int64).reshape(-1, 2)
    return Vocabulary(
        ids[:, 0].contiguous(), ids[:, 1].contiguous(), len(tokens_a) - common, len(tokens_b) - common
    )


def token_axes(a: Trace, b: Trace, vocabulary: Vocabulary | None) -> tuple[Axes, Axes] | None:
    """Where both models count tokens; None where there is nothing to do.

    That is: no tokenizers, hardly a common token, no table of tokens; or the same ids and tables of the same
    length.
    """
    if vocabulary is None or not vocabulary.alike:
        return None
    first = vocabulary_axes(a, int(vocabulary.ids_a.max()) + 1)
    second = vocabulary_axes(b, int(vocabulary.ids_b.max()) + 1)
    if not first.tables or not second.tables:
        return None
    return (first, second) if vocabulary.renumbered or first.sizes != second.sizes else None
