"""The loss of models on one text: the same tokens for all of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regauge.certify.run import held_bytes
from regauge.certify.sides import StoredWeights
from regauge.checkpoint import Checkpoint
from regauge.equivalence.documents import Rows, check_same_tokens, cut, draw, read_text, tokenizer_of
from regauge.equivalence.models import Measure, TextModel, open_model
from regauge.equivalence.scores import UNSCORED, check_causal, token_losses
from regauge.errors import Refused

TOKENS = 2048
LENGTH = 256
AT_ONCE = 1024
"""Tokens of one run."""

MEMORY = 1 << 30


class Scorer:
    """Scores language models on documents drawn from a text; computed in float32, weights streamed.

    Args:
        directory: of the model whose tokenizer reads the text.
        text: a UTF-8 file.
        tokens: of text, at least; documents are drawn at random until they hold as many.
        length: tokens in a row; capped by what the model admits.
        seed: of the draw.
        max_memory: bytes that the outputs of one run may take, about; default 1 GiB.

    Raises:
        BadInput: a text or tokenizer that cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        text: str | Path,
        *,
        tokens: int = TOKENS,
        length: int = LENGTH,
        seed: int = 0,
        max_memory: int | None = None,
    ) -> None:
        self._text = read_text(text)
        self.documents = cut(self._text, length)
        self.tokenizer: Any = tokenizer_of(directory)
        self.memory = max_memory or MEMORY
        self._ask = {"tokens": tokens, "seed": seed}
        self._length = length
        self._rows: Rows | None = None
        self._latest: tuple[Path, TextModel] | None = None
        self._checked: set[Path] = set()

    @property
    def tokens(self) -> int:
        """Number of tokens scored."""
        rows = self._known_rows()
        return sum(last - max(1, first) for first, last in zip(rows.first, rows.last, strict=True))

    def check_tokens(self, directory: Path) -> None:
        """Refuse a directory whose tokenizer reads the text as other tokens; one without any is taken."""
        if any(directory.glob("tokenizer*")) or any(directory.glob("vocab*")):
            check_same_tokens(self.documents, self._known_rows(), self.tokenizer, tokenizer_of(directory))

    @contextmanager
    def weights(self, directory: Path) -> Generator[StoredWeights]:
        """The weights of a directory by the names of its model."""
        with Checkpoint.open(directory) as files:
            yield self._model(directory, files).side.weights

    def loss(self, directory: Path, weights: Callable[[str], torch.Tensor] | None = None) -> float:
        """Mean cross-entropy in nats of a token; infinite if a logit is not finite.

        Args:
            directory: of the model.
            weights: in place of the stored ones, for the same graph.

        Raises:
            Refused: the model is no causal language model of this text.
        """
        with Checkpoint.open(directory) as files:
            model = self._model(directory, files)
            if weights is not None:
                side: Any = replace(model.side, weights=weights)  # pyright: ignore[reportArgumentType]
                model = replace(model, side=side)
            total, count = 0.0, 0
            for ids, targets in self._batches(model):
                losses = token_losses(model, ids, targets)
                if not bool(torch.isfinite(losses).all()):
                    return float("inf")
                if directory not in self._checked:
                    check_causal(model, ids, targets, losses)
                    self._checked.add(directory)
                total, count = total + float(losses.sum()), count + len(losses)
            return total / count

    def _known_rows(self) -> Rows:
        if self._rows is None:
            self._rows = draw(self.documents, self.tokenizer, length=self._length, **self._ask)
        return self._rows

    def _model(self, directory: Path, files: Checkpoint) -> TextModel:
        like = self._latest[1] if self._latest is not None else None
        while True:
            rows = self._known_rows()
            count = min(max(1, AT_ONCE // rows.length), len(rows.tokens))
            model = open_model(directory, files, count, rows.length, like)
            held = held_bytes(model.side.trace) // 2  # of float32
            if held > self.memory // 2 and count > 1:
                count = max(1, count * (self.memory // 2) // held)
                model = open_model(directory, files, count, rows.length, like)
            if model.shape[1] >= rows.length:
                break
            self._length, self._rows = model.shape[1], None
            self.documents = cut(self._text, self._length)
        if model.measure is not Measure.LOSS:
            raise Refused(
                f"{directory.name} has no loss per token",
                expected="logits over the tokens it reads",
                found=f"a model that gives a {model.measure}",
                way_out="merge without --text",
            )
        self._latest = (directory, model)
        return model

    def _batches(self, model: TextModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """int64 (rows, length) each: tokens, and the tokens to come after them or ``UNSCORED``."""
        count, length = model.shape
        rows = self._known_rows()
        for start in range(0, len(rows.tokens), count):
            ids = torch.zeros((count, length), dtype=torch.int64)
            targets = torch.full_like(ids, UNSCORED)
            for place, held in enumerate(rows.tokens[start : start + count]):
                ids[place, : len(held)] = torch.tensor(held)
                first, last = max(1, rows.first[start + place]), rows.last[start + place]
                targets[place, first - 1 : last - 1] = ids[place, first:last]
            yield ids, targets
