"""A residual convolutional network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from regauge.lab.blocks import ACTIVATIONS
from regauge.lab.config import ModelConfig
from regauge.lab.norms import IMAGES, maker
from regauge.nn.placement import Residual, placements


class Branch(nn.Module):
    """second(φ(N(first(φ(x))))), x [batch, width, height, width of the image].

    φ is left out behind a norm that has a nonlinearity of its own: the second one, and with ``bare`` the
    first.
    """

    def __init__(self, width: int, norm: nn.Module, activation: str, own: bool, bare: bool) -> None:
        super().__init__()
        self.activation, self.own, self.bare = activation, own, bare
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = norm
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        act = ACTIVATIONS[self.activation]
        x = self.norm(self.first(x if self.bare else act(x)))
        return self.second(x if self.own else act(x))


class CNN(nn.Module):
    """Logits [batch, classes] of images [batch, 1, image, image].

    A 3×3 convolution, ``depth`` residual branches of two 3×3 convolutions, the mean over all places. Half way
    the image is halved. Behind the last branch stands a norm where the branches start with one.

    Args:
        config: with ``kind: cnn``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        norm = maker(IMAGES, config.norm, config.width, config.norm_options)
        own = bool(getattr(norm(), "nonlinearity", False))
        placed = placements(config.placement, config.depth, sublayers=1, **config.placement_options)
        self.embedding = nn.Conv2d(1, config.width, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(
            Residual(Branch(config.width, norm(), config.activation, own, own and p.before), norm, p)
            for p in placed
        )
        self.halved_at = config.depth // 2
        self.pool = nn.AvgPool2d(2)
        self.last = norm() if placed[-1].before else nn.Identity()
        self.own = own and placed[-1].before
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embedding(images)
        for index, layer in enumerate(self.layers):
            x = layer(self.pool(x) if index == self.halved_at else x)
        x = self.last(x)
        act: Callable[[torch.Tensor], torch.Tensor] = ACTIVATIONS[self.config.activation]
        return self.head((x if self.own else act(x)).mean((2, 3)))
