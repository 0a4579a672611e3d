"""A vision transformer."""

from __future__ import annotations

import torch
from torch import nn

from regauge.lab.blocks import Stack
from regauge.lab.config import ModelConfig


class ViT(Stack):
    """Logits [batch, classes] of images [batch, 1, image, image]: the mean over the patches is classified.

    Args:
        config: with ``kind: vit``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Conv2d(1, config.width, config.patch, stride=config.patch)
        self._fill(config, (config.image // config.patch) ** 2, causal=False)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.embedding(images).flatten(2).transpose(1, 2)
        return self.head(self._run(patches).mean(1))
