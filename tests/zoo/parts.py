"""Parts that the networks of the zoo are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Any, ...]]
EPS = 1e-2
B, T, D = 3, 7, 12


class Exhibits(dict[str, Callable[[], Made]]):
    """Networks by name, in the order in which they were written down."""

    def __call__(self, make: Callable[[], Made]) -> Callable[[], Made]:
        self[make.__name__] = make
        return make


def tokens(vocabulary: int, batch: int = B, length: int = T) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(5))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


class Fn(nn.Module):
    """Named parts and a function of them: the shortest way to write a network down."""

    def __init__(self, body: Callable[..., Tensor], /, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(self, *inputs)


class Rms(nn.Module):
    """RMS norm with a gain stored as ``w + shift``."""

    def __init__(self, size: int, shift: float = 0.0) -> None:
        super().__init__()
        self.w = param(size)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return y * (self.shift + self.w) if self.shift else y * self.w


def norm(size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=EPS)


def softmax_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return scores.softmax(-1) @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _turn(x: Tensor, width: int) -> Tensor:
    """Rotary embedding of the first ``width`` channels, halves paired."""
    half = width // 2
    angle = torch.arange(x.shape[-2])[:, None] * (0.1 ** torch.arange(half))
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    y, rest = x[..., :width], x[..., width:]
    other = torch.cat([-y[..., half:], y[..., :half]], -1)
    return torch.cat([y * cos + other * sin, rest], -1)


class Look(nn.Module):
    """Attention, with everything that may differ from the plain form as an option."""

    def __init__(
        self,
        size: int = D,
        heads: int = 4,
        groups: int | None = None,
        width: int = 5,
        bias: bool = False,
        rotary: int = 0,
        spread: str = "expand",
        unit: bool = False,
        sink: bool = False,
        slopes: bool = False,
    ) -> None:
        super().__init__()
        groups = groups or heads
        self.heads, self.groups, self.rotary, self.spread = heads, groups, rotary, spread
        self.a = nn.Linear(size, heads * width, bias)
        self.b = nn.Linear(size, groups * width, bias)
        self.c = nn.Linear(size, groups * width, bias)
        self.d = nn.Linear(heads * width, size, bias)
        self.e = Rms(width) if unit else None
        self.f = Rms(width) if unit else None
        self.g = param(heads) if sink else None
        if slopes:
            self.register_buffer("h", 0.5 ** torch.arange(1, heads + 1), persistent=False)
        self.slopes = slopes

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            split_heads(self.a(x), self.heads),
            split_heads(self.b(x), self.groups),
            split_heads(self.c(x), self.groups),
        )
        if self.e is not None and self.f is not None:
            q, k = self.e(q), self.f(k)
        if self.rotary:
            q, k = _turn(q, self.rotary), _turn(k, self.rotary)
        share = self.heads // self.groups
        if share > 1 and self.spread == "expand":
            k, v = (t[:, :, None].expand(-1, -1, share, -1, -1).flatten(1, 2) for t in (k, v))
        elif share > 1:
            k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        bias: Tensor | float = 0.0
        if self.slopes:
            place = torch.arange(x.shape[1], dtype=x.dtype)
            bias = -self.h[:, None, None] * (place[:, None] - place).abs()
        if self.g is None:
            return self.d(join_heads(softmax_attend(q, k, v, bias)))
        scores = q @ k.transpose(-1, -2) + bias
        extra = self.g[:, None, None].expand(x.shape[0], -1, x.shape[1], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        return self.d(join_heads(weights @ v))


def stack(mix: nn.Module, first: nn.Module | None = None) -> Made:
    """Embedding, norm, one layer added, norm, head."""

    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        x = x + m.mix(m.q(x))
        return m.s(m.r(x))

    make = (lambda: Rms(D)) if first is None else (lambda: first)
    return Fn(body, p=nn.Embedding(23, D), q=make(), mix=mix, r=Rms(D), s=nn.Linear(D, 23, False)), (
        tokens(23),
    )
