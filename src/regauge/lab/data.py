"""What is learnt, in batches: the same for the same configuration and generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional

from regauge.errors import BadInput
from regauge.lab.config import RunConfig
from regauge.lab.glyphs import digits

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """Samples to learn from and samples held out.

    Attributes:
        train: a text as bytes [positions], or images [samples, 1, height, width].
        held_out: likewise, of other positions or other draws.
        labels, held_out_labels: of images [samples]; None for a text.
        length: of a sample of a text.
        batch: samples of a batch.
        batches: of held-out samples.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    labels: torch.Tensor | None
    held_out_labels: torch.Tensor | None
    length: int
    batch: int
    batches: int

    def draw(self, random: torch.Generator) -> Batch:
        """One batch: inputs and targets, drawn with replacement. The generator is all there is of a
        position."""
        if self.labels is None:
            starts = torch.randint(len(self.train) - self.length, (self.batch,), generator=random)
            return self._texts(self.train, starts)
        index = torch.randint(len(self.train), (self.batch,), generator=random)
        return self.train[index], self.labels[index]

    def held(self) -> Iterator[Batch]:
        """The held-out batches, always the same, evenly spread."""
        count = self.batch * self.batches
        if self.held_out_labels is None:
            last = len(self.held_out) - self.length - 1
            starts = torch.linspace(0, last, count, dtype=torch.float64).long()
            for part in starts.split(self.batch):
                yield self._texts(self.held_out, part)
        else:
            index = torch.arange(count) % len(self.held_out)
            for part in index.split(self.batch):
                yield self.held_out[part], self.held_out_labels[part]

    def _texts(self, text: torch.Tensor, starts: torch.Tensor) -> Batch:
        places = starts[:, None] + torch.arange(self.length + 1)
        found = text[places]
        return found[:, :-1], found[:, 1:]


def prepare(config: RunConfig) -> Data:
    """The data of a run; they do not depend on its seed.

    Raises:
        BadInput: the text is too short; CheckpointError: the text asked for is not installed.
    """
    data, model = config.data, config.model
    if model.kind == "decoder":
        whole = _bytes(data.characters, data.text)
        cut = len(whole) * 9 // 10
        if len(whole) - cut < model.context + 2:
            raise BadInput("the text is too short for its context", found=f"{len(whole)} bytes")
        if int(whole.max()) >= model.vocabulary:
            raise BadInput("a byte is no token", expected="vocabulary: 256", found=str(model.vocabulary))
        return Data(whole[:cut], whole[cut:], None, None, model.context, data.batch, data.held_out)
    if model.classes < 10:
        raise BadInput("there are ten digits", expected="classes from 10", found=str(model.classes))
    train, labels = digits(data.digits, model.image, data.noise, seed=0)
    held, held_labels = digits(max(data.digits // 4, data.batch), model.image, data.noise, seed=1)
    return Data(train, held, labels, held_labels, 0, data.batch, data.held_out)


@cache
def _bytes(characters: int, source: str | None) -> torch.Tensor:
    """A text as bytes, [positions]."""
    from regauge.packaged import text

    return torch.frombuffer(bytearray(text(characters, source).encode()), dtype=torch.uint8).long()


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, [], of logits [..., classes] in float32."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
