"""The loop that trains a model of any family, and what it learns from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from pairs.families import CONTEXT, SYMBOLS, Family
from regauge.lab.glyphs import digits
from regauge.packaged.text import text

BATCH = {"digits": 64, "text": 16}
PARTS = ("a", "b", "c")
"""Data to train on: ``a``, and ``b`` and ``c``, of which no sample is in ``a``. See :func:`samples`."""


@dataclass(frozen=True)
class Samples:
    """What is learnt: images [n, 1, 8, 8] with labels [n], or a text [positions] with labels None."""

    x: torch.Tensor
    labels: torch.Tensor | None

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of some samples: rows of images, or positions at which a text is cut out."""
        if self.labels is not None:
            return self.x[index], self.labels[index]
        rows = self.x[index[:, None] + torch.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]

    def __len__(self) -> int:
        return len(self.x) - (CONTEXT + 1 if self.labels is None else 0)


@cache
def samples(task: str, part: str, held_out: bool = False) -> Samples:
    """The samples of one part.

    Digits: ``b`` has other draws and its classes in another order; ``c`` other draws with more noise. Text:
    ``a`` and ``b`` are disjoint halves of the King James Bible, ``c`` is the Python reference.

    Args:
        task: ``digits`` or ``text``.
        part: one of :data:`PARTS`.
        held_out: samples that no model is trained on.
    """
    number = PARTS.index(part)
    if task == "digits":
        noise = 0.3 if part == "c" else 0.2
        x, labels = digits(1000 if held_out else 8000, 8, noise, seed=10 + 2 * number + held_out)
        return Samples(x, (7 * labels + 3) % 10 if part == "b" else labels)
    whole = _symbols("python") if part == "c" else _symbols("kjv")
    if part != "c":
        half = len(whole) // 2
        whole = whole[number * half : (number + 1) * half]
    cut = len(whole) - 20_000
    return Samples(whole[cut:] if held_out else whole[:cut], None)


@cache
def _symbols(source: str) -> torch.Tensor:
    """A text as numbers below SYMBOLS: the characters of the Bible, and one number for every other one."""
    first = text(2_000_000, "kjv")
    known = {character: i for i, character in enumerate(sorted(set(first))[: SYMBOLS - 1])}
    whole = first if source == "kjv" else text(400_000, "python")
    return torch.tensor([known.get(character, SYMBOLS - 1) for character in whole])


def loss_of(family: Family, model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, []."""
    logits = family.logits(model, x)
    return functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@torch.no_grad()
def held_out(family: Family, model: nn.Module, part: str) -> float:
    """Loss on held-out samples in evaluation mode, in nats a symbol or an image."""
    data, mode = samples(family.task, part, True), model.training
    model.eval()
    count = 512 if family.task == "digits" else 128
    index = torch.linspace(0, len(data) - 1, count, dtype=torch.float64).long()
    losses = [loss_of(family, model, *data.batch(part)).item() for part in index.split(64)]
    model.train(mode)
    return sum(losses) / len(losses)


def train(
    family: Family,
    model: nn.Module,
    part: str,
    seed: int,
    steps: int,
    rate: float,
    decay: float,
    after: Callable[[], None] | None = None,
) -> None:
    """Train in place by AdamW, with a warm-up of a twentieth and a cosine down to a tenth of the rate.

    Args:
        family: of the model.
        part: of the data.
        seed: of the order of the samples.
        steps, rate, decay: of the optimizer; parameters of one axis do not decay.
        after: called after every step.
    """
    random = torch.Generator().manual_seed(seed)
    data, batch = samples(family.task, part), BATCH[family.task]
    held = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in held if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in held if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    model.train()
    for step in range(steps):
        done = (step - warm) / max(1, steps - warm)
        scale = (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        x, targets = data.batch(torch.randint(len(data), (batch,), generator=random))
        optimizer.zero_grad(set_to_none=True)
        loss_of(family, model, x, targets).backward()
        nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()
        if after is not None:
            after()
    model.eval()
