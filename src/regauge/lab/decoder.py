"""A decoder-only transformer."""

from __future__ import annotations

import torch
from torch import nn

from regauge.lab.blocks import Stack
from regauge.lab.config import ModelConfig


class Decoder(Stack):
    """Logits [batch, positions, vocabulary] of the next token, for tokens [batch, positions].

    Args:
        config: with ``kind: decoder``. At most ``context`` positions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self._fill(config, config.context, causal=True)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self._run(self.embedding(tokens)))
