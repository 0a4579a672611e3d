"""Attention, MLP and the stack of layers that decoder and ViT share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from regauge.lab.config import ModelConfig
from regauge.lab.norms import TOKENS, maker
from regauge.nn.placement import Placement, Residual, placements

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x · cos + (−x₂, x₁) · sin, x = (x₁, x₂) [..., positions, head]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Multi-head attention of x [batch, positions, width].

    Args:
        width, heads: heads divides width.
        causal: a position sees itself and those before it.
        norm: makes the norm of queries and keys of one head; None for none.
        bias: of the four projections.
    """

    def __init__(
        self, width: int, heads: int, causal: bool, norm: Callable[[], nn.Module] | None, bias: bool
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias) for _ in range(4))
        self.query_norm = None if norm is None else norm()
        self.key_norm = None if norm is None else norm()

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if cos is not None and sin is not None:
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(φ(up(x))), x [..., width]."""

    def __init__(self, width: int, expansion: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, expansion * width, bias)
        self.down = nn.Linear(expansion * width, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Layer(nn.Module):
    """Attention and MLP, each with its norms and its addition to the stream."""

    def __init__(self, config: ModelConfig, placement: Placement, causal: bool) -> None:
        super().__init__()
        norm = maker(TOKENS, config.norm, config.width, config.norm_options)
        head = config.width // config.heads
        within = (lambda: nn.RMSNorm(head, eps=1e-6)) if config.qk_norm else None
        attention = Attention(config.width, config.heads, causal, within, config.bias)
        self.attention = Residual(attention, norm, placement)
        mlp = MLP(config.width, config.expansion, config.activation, config.bias)
        self.mlp = Residual(mlp, norm, placement)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.mlp(self.attention(x, cos, sin))


class Stack(nn.Module):
    """Positions, layers, and the norms before and behind them; x [batch, positions, width].

    There is a norm behind the last layer where that layer starts with one and does not end with one, and one
    before the first layer where the placement is ``peri``.
    """

    layers: nn.ModuleList
    cos: torch.Tensor | None
    sin: torch.Tensor | None

    def _fill(self, config: ModelConfig, length: int, causal: bool) -> None:
        placed = placements(config.placement, config.depth, **config.placement_options)
        norm = maker(TOKENS, config.norm, config.width, config.norm_options)
        self.layers = nn.ModuleList(Layer(config, placement, causal) for placement in placed)
        self.first = norm() if placed[0].before and placed[0].after else nn.Identity()
        self.last = norm() if placed[-1].before else nn.Identity()
        learned = config.placed == "learned"
        self.positions = nn.Parameter(torch.zeros(length, config.width)) if learned else None
        cos = sin = None
        if config.placed == "rotary":
            head = config.width // config.heads
            rates = 10000.0 ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
            angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.cat((rates, rates))
            cos, sin = angles.cos().float(), angles.sin().float()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        if self.positions is not None:
            x = x + self.positions[:length]
        x = self.first(x)
        cos = None if self.cos is None else self.cos[:length]
        sin = None if self.sin is None else self.sin[:length]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.last(x)
