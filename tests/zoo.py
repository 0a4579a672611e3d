"""The zoo: small networks, chosen to be hard to understand, and small ones of real architectures.

``HOSTILE`` holds hand-written modules with example inputs. None is named like a real architecture, and
many have sizes that agree by accident. ``CONFIGS`` holds configurations of transformers with trained-looking
irregularities (large eps, so that a scale in front of a norm is seen). ``specimen(name)`` traces one once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regauge.atlas import Atlas
from regauge.certify.run import run
from regauge.discover import Gauge, discover
from regauge.moves import State
from regauge.plan import Rewrite
from regauge.planner import make_plan
from regauge.probe import random_state
from regauge.recipe import parse_recipe
from regauge.trace import Trace, trace, untie

Made = tuple[nn.Module, tuple[Any, ...]]
HOSTILE: dict[str, Callable[[], Made]] = {}
EPS = 1e-2
B, T, D = 3, 7, 12


def exhibit(make: Callable[[], Made]) -> Callable[[], Made]:
    HOSTILE[make.__name__] = make
    return make


def _ids(vocabulary: int, batch: int = B, length: int = T) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(5))


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def _p(*shape: int) -> nn.Parameter:
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
        self.w = _p(size)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return y * (self.shift + self.w) if self.shift else y * self.w


def norm(size: int) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=EPS)


def _softmax_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return scores.softmax(-1) @ v


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
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
        self.g = _p(heads) if sink else None
        if slopes:
            self.register_buffer("h", 0.5 ** torch.arange(1, heads + 1), persistent=False)
        self.slopes = slopes

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            _split(self.a(x), self.heads),
            _split(self.b(x), self.groups),
            _split(self.c(x), self.groups),
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
            return self.d(_join(_softmax_attend(q, k, v, bias)))
        scores = q @ k.transpose(-1, -2) + bias
        extra = self.g[:, None, None].expand(x.shape[0], -1, x.shape[1], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        return self.d(_join(weights @ v))


def _stack(mix: nn.Module, first: nn.Module | None = None) -> Made:
    """Embedding, norm, one layer added, norm, head."""

    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        x = x + m.mix(m.q(x))
        return m.s(m.r(x))

    make = (lambda: Rms(D)) if first is None else (lambda: first)
    return Fn(body, p=nn.Embedding(23, D), q=make(), mix=mix, r=Rms(D), s=nn.Linear(D, 23, False)), (
        _ids(23),
    )


# --- tied and square -----------------------------------------------------------------------------------


def _tie(body: Any, gain: nn.Module) -> Made:
    table = nn.Embedding(19, D)
    head = nn.Linear(D, 19, False)
    head.weight = table.weight
    return Fn(body, p=table, u=nn.Linear(D, 9), v=nn.Linear(9, D), r=gain, s=head), (_ids(19),)


@exhibit
def tied_head() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        return m.s(m.r(x + m.v(F.silu(m.u(x)))))

    return _tie(body, Rms(D))


@exhibit
def tied_head_with_mean() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        return m.s(m.r(x + m.v(F.gelu(m.u(m.r(x))))))

    return _tie(body, norm(D))


@exhibit
def everything_eight() -> Made:
    """heads × width = hidden = inner = vocabulary = batch = length = 8 … and so on."""

    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        q, k, v = (t(x).view(8, 8, 2, 4).transpose(1, 2) for t in (m.a, m.b, m.c))
        x = x + m.d(_softmax_attend(q, k, v).transpose(1, 2).reshape(8, 8, 8))
        return m.s(x + m.v(F.relu(m.u(x))))

    parts = {name: nn.Linear(8, 8) for name in "abcduvs"}
    return Fn(body, p=nn.Embedding(8, 8), **parts), (_ids(8, 8, 8),)


@exhibit
def everything_four() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t(x).view(4, 4, 4, 1).transpose(1, 2) for t in (m.a, m.b, m.c))
        x = x + m.d(_softmax_attend(q, k, v).transpose(1, 2).reshape(4, 4, 4))
        return m.s(x @ m.w.mT + x)

    return Fn(body, **{name: nn.Linear(4, 4) for name in "abcds"}, w=_p(4, 4)), (_x(4, 4, 4),)


# --- norms -----------------------------------------------------------------------------------------------


@exhibit
def gain_one_plus() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids) * 3.5
        x = x + m.v(F.silu(m.u(m.q(x))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9, False), "v": nn.Linear(9, D, False), "s": nn.Linear(D, 23, False)}
    return Fn(body, p=nn.Embedding(23, D), q=Rms(D, 1.0), r=Rms(D, 1.0), **parts), (_ids(23),)


@exhibit
def gain_one_plus_both_sides() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        x = x + m.t(m.v(F.gelu(m.u(m.q(x)))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9, False), "v": nn.Linear(9, D, False), "s": nn.Linear(D, 23, False)}
    return Fn(body, p=nn.Embedding(23, D), q=Rms(D, 1.0), r=Rms(D, 1.0), t=Rms(D, 1.0), **parts), (_ids(23),)


@exhibit
def mean_and_bias() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        x = x + m.v(F.gelu(m.u(m.q(x))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 23)}
    return Fn(body, p=nn.Embedding(23, D), q=norm(D), r=norm(D), **parts), (_ids(23),)


@exhibit
def norm_after_sum() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.o(m.p(ids))
        x = m.q(x + m.mix(x))
        x = m.r(x + m.v(F.gelu(m.u(x))))
        return m.s(x)

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 23)}
    norms = {name: norm(D) for name in "oqr"}
    return Fn(body, p=nn.Embedding(23, D), mix=Look(bias=True), **norms, **parts), (_ids(23),)


@exhibit
def groups_normed() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.g(m.a(x)))).mean((2, 3))

    parts = {"a": nn.Conv2d(3, 12, 3), "g": nn.GroupNorm(3, 12, EPS), "b": nn.Conv2d(12, 5, 1)}
    return Fn(body, **parts), (_x(2, 3, 6, 5),)


@exhibit
def unit_vectors() -> Made:
    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(m.u(x), dim=-1), F.normalize(m.v(y), dim=-1)
        return m.t.exp() * (a @ b.mT)

    return Fn(body, u=nn.Linear(5, D), v=nn.Linear(6, D), t=_p()), (_x(3, 5), _x(4, 6))


# --- attention -------------------------------------------------------------------------------------------


@exhibit
def parallel_branches() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.l(x) + m.v(F.gelu(m.u(x)))

    return _stack(Fn(body, l=Look(), u=nn.Linear(D, 9), v=nn.Linear(9, D)), norm(D))


@exhibit
def turned_in_part() -> Made:
    return _stack(Look(width=6, rotary=4))


@exhibit
def turned_and_shared() -> Made:
    return _stack(Look(groups=2, width=4, rotary=4, bias=True))


@exhibit
def shared_by_expand() -> Made:
    return _stack(Look(heads=6, groups=2))


@exhibit
def shared_by_repeat() -> Made:
    return _stack(Look(heads=6, groups=2, spread="repeat"))


@exhibit
def one_group() -> Made:
    return _stack(Look(heads=4, groups=1, width=3))


@exhibit
def biased_keys() -> Made:
    return _stack(Look(bias=True), norm(D))


@exhibit
def with_sink() -> Made:
    return _stack(Look(bias=True, sink=True))


@exhibit
def unit_queries() -> Made:
    return _stack(Look(unit=True, rotary=4, width=4))


@exhibit
def sloped_heads() -> Made:
    return _stack(Look(slopes=True))


def _fused(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = cut(m.w(x))
        return m.o(_join(_softmax_attend(q, k, v)))

    return _stack(Fn(body, w=nn.Linear(D, 36), o=nn.Linear(D, D)))


@exhibit
def fused_in_blocks() -> Made:
    return _fused(lambda y: tuple(_split(t, 3) for t in y.chunk(3, -1)))


@exhibit
def fused_by_head() -> Made:
    return _fused(lambda y: y.view(B, T, 3, 3, 4).permute(3, 0, 2, 1, 4).unbind(0))


@exhibit
def fused_interleaved() -> Made:
    return _fused(lambda y: y.view(B, T, 3, 4, 3).permute(4, 0, 2, 1, 3).unbind(0))


@exhibit
def kernel_attention() -> Made:
    """Positive features instead of softmax, summed in order."""

    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.elu(m.a(x)) + 1, F.elu(m.b(x)) + 1, m.c(x)
        state = (k[..., :, None] * v[..., None, :]).cumsum(1)
        return m.d((q[..., None, :] @ state).squeeze(-2))

    return _stack(Fn(body, a=nn.Linear(D, 6), b=nn.Linear(D, 6), c=nn.Linear(D, 5), d=nn.Linear(5, D)))


# --- experts ---------------------------------------------------------------------------------------------


@exhibit
def experts_all() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        share = m.g(x).softmax(-1)
        h = F.silu(torch.einsum("btd,edf->btef", x, m.u)) * torch.einsum("btd,edf->btef", x, m.w)
        return torch.einsum("btef,efd,bte->btd", h, m.v, share)

    return _stack(Fn(body, g=nn.Linear(D, 5, False), u=_p(5, D, 9), w=_p(5, D, 9), v=_p(5, 9, D)))


@exhibit
def experts_best_two() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        best, index = m.g(flat).softmax(-1).topk(2, -1)
        share = torch.zeros(flat.shape[0], 5, dtype=x.dtype).scatter(1, index, best)
        h = F.relu(torch.bmm(flat.expand(5, -1, -1), m.u))
        return (torch.bmm(h, m.v) * share.mT[..., None]).sum(0).view_as(x)

    return _stack(Fn(body, g=nn.Linear(D, 5, False), u=_p(5, D, 9), v=_p(5, 9, D)), norm(D))


# --- entrywise functions ---------------------------------------------------------------------------------


def _inner(f: Callable[[Tensor], Tensor], bias: bool = True, width: int = 9) -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(f(m.u(x)))

    return Fn(body, u=nn.Linear(D, width, bias), v=nn.Linear(width, 5, bias)), (_x(B, D),)


@exhibit
def rectified() -> Made:
    return _inner(F.relu)


@exhibit
def bell() -> Made:
    return _inner(F.gelu)


@exhibit
def odd_curve() -> Made:
    return _inner(torch.tanh)


@exhibit
def even_curve() -> Made:
    return _inner(torch.cos)


@exhibit
def squared() -> Made:
    return _inner(lambda x: F.relu(x).square())


@exhibit
def cubed() -> Made:
    return _inner(lambda x: x**3)


@exhibit
def clamped() -> Made:
    return _inner(lambda x: x.clamp(0.0, 6.0))


@exhibit
def nothing_between() -> Made:
    return _inner(lambda x: x)


@exhibit
def spread_over_features() -> Made:
    return _inner(lambda x: x.softmax(-1))


@exhibit
def largest_of_three() -> Made:
    return _inner(lambda x: x.unflatten(-1, (3, 3)).amax(-1).repeat_interleave(3, -1))


@exhibit
def sorted_features() -> Made:
    return _inner(lambda x: x.sort(-1).values)


@exhibit
def every_other_feature() -> Made:
    return _inner(lambda x: torch.cat([x[..., ::2], x[..., 1::2]], -1), width=8)


@exhibit
def rolled_features() -> Made:
    return _inner(lambda x: x + x.roll(1, -1))


@exhibit
def signed_slopes() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(m.f(m.u(x)))

    return Fn(body, u=nn.Linear(D, 9), f=nn.PReLU(9), v=nn.Linear(9, 5)), (_x(B, D),)


def _gate(f: Callable[[Tensor], Tensor]) -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(f(m.u(x)) * m.w(x))

    return Fn(body, u=nn.Linear(D, 9, False), w=nn.Linear(D, 9, False), v=nn.Linear(9, 5, False)), (_x(B, D),)


@exhibit
def gate_smooth() -> Made:
    return _gate(F.silu)


@exhibit
def gate_rectified() -> Made:
    return _gate(F.relu)


@exhibit
def gate_fused() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(F.glu(m.u(x), -1))

    return Fn(body, u=nn.Linear(D, 18), v=nn.Linear(9, 5)), (_x(B, D),)


# --- things not understood -------------------------------------------------------------------------------


@exhibit
def spectrum_in_a_branch() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x))) + m.d(torch.fft.fft(m.c(x).double(), dim=-1).real.to(x.dtype))

    parts = {"a": nn.Linear(D, 9), "b": nn.Linear(9, 6), "c": nn.Linear(D, 8), "d": nn.Linear(8, 6)}
    return Fn(body, **parts), (_x(B, D),)


@torch.library.custom_op("zoo::shuffle", mutates_args=())
def _shuffle(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1)


@_shuffle.register_fake
def _shuffled(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@exhibit
def foreign_operation() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x))) + m.d(torch.ops.zoo.shuffle(m.c(x)))

    parts = {"a": nn.Linear(D, 9), "b": nn.Linear(9, 6), "c": nn.Linear(D, 8), "d": nn.Linear(8, 6)}
    return Fn(body, **parts), (_x(B, D),)


@exhibit
def mixed_by_rank() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        order = y.sum(-1).argsort(-1)
        return m.b(F.relu(y.gather(1, order[..., None].expand_as(y))))

    return Fn(body, a=nn.Linear(D, 9), b=nn.Linear(9, 6)), (_x(B, T, D),)


# --- sharing ---------------------------------------------------------------------------------------------


@exhibit
def called_twice() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.v(F.relu(m.u(m.q(x))))
        return m.s(x)

    return Fn(body, q=Rms(D), u=nn.Linear(D, 9), v=nn.Linear(9, D), s=nn.Linear(D, 5)), (_x(B, D),)


@exhibit
def layers_share() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.c(F.relu(m.a(x)))
        return m.s(x + m.d(F.relu(m.b(x))))

    a, b = nn.Linear(D, 9), nn.Linear(D, 9)
    b.weight = a.weight
    return Fn(body, a=a, b=b, c=nn.Linear(9, D), d=nn.Linear(9, D), s=nn.Linear(D, 5)), (_x(B, D),)


@exhibit
def transposed_share() -> Made:
    """One matrix writes the inner space and, transposed, reads it."""

    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(x @ m.w.mT + m.b) @ m.w

    return Fn(body, w=_p(9, D), b=_p(9)), (_x(B, D),)


@exhibit
def applied_to_itself() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.s(m.a(F.relu(m.a(F.relu(m.r(x))))))

    return Fn(body, r=nn.Linear(5, 9), a=nn.Linear(9, 9), s=nn.Linear(9, 4)), (_x(B, 5),)


@exhibit
def low_rank_beside() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.s(F.relu(F.linear(x, m.w + 0.5 * (m.b @ m.a))))

    return Fn(body, w=_p(9, D), a=_p(2, D), b=_p(9, 2), s=nn.Linear(9, 4)), (_x(B, D),)


@exhibit
def weight_normed() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.s(F.relu(F.linear(x, m.g * m.w / m.w.norm(dim=1, keepdim=True), m.b)))

    return Fn(body, w=_p(9, D), g=_p(9, 1), b=_p(9), s=nn.Linear(9, 4)), (_x(B, D),)


@exhibit
def both_at_once() -> Made:
    """A product of three things, all of which depend on the same axis."""

    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bi,ijk,bj->bk", m.u(x), m.w, m.v(y))

    return Fn(body, u=nn.Linear(D, 4), v=nn.Linear(5, 6), w=_p(4, 6, 3)), (_x(B, D), _x(B, 5))


# --- shapes ----------------------------------------------------------------------------------------------


@exhibit
def token_in_front() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.t.expand(x.shape[0], -1, -1), m.p(x)], 1) + m.e
        x = x + m.mix(m.q(x))
        return m.s(m.r(x)[:, 0])

    parts = {"q": norm(D), "r": norm(D), "mix": Look(bias=True), "s": nn.Linear(D, 5)}
    return Fn(body, t=_p(1, 1, D), e=_p(1, T + 1, D), p=nn.Linear(10, D), **parts), (_x(B, T, 10),)


@exhibit
def ones_everywhere() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.e
        x = x + m.mix(m.q(x))
        return m.s(F.relu(m.u(x)) * m.z)

    parts = {"q": norm(D), "mix": Look(heads=1, width=1), "u": nn.Linear(D, 1), "s": nn.Linear(1, 1)}
    return Fn(body, e=_p(1, 1, D), z=_p(1, 1, 1), **parts), (_x(1, T, D),)


@exhibit
def scaled_branches() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.g * m.mix(m.q(x))
        return m.s(x + m.z * m.v(F.gelu(m.u(m.r(x)))))

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 5)}
    norms = {"q": norm(D), "r": norm(D)}
    return Fn(body, mix=Look(bias=True), g=_p(D), z=_p(), **norms, **parts), (_x(B, T, D),)


@exhibit
def joined_features() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.c(torch.cat([h, F.relu(m.b(h)), x], -1))

    return Fn(body, a=nn.Linear(D, 6), b=nn.Linear(6, 6), c=nn.Linear(12 + D, 5)), (_x(B, D),)


@exhibit
def pooled_features() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h) + h.mean(-1, keepdim=True) + h.square().sum(-1, keepdim=True)

    return Fn(body, a=nn.Linear(D, 6), b=nn.Linear(6, 5)), (_x(B, D),)


@exhibit
def stored_constants() -> Made:
    """A saved buffer that acts as a gain, and one that is not saved."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x) * m.k + m.n))

    made = Fn(body, a=nn.Linear(D, 9), b=nn.Linear(9, 5))
    made.register_buffer("k", torch.linspace(0.5, 1.5, 9))
    made.register_buffer("n", torch.linspace(-1.0, 1.0, 9), persistent=False)
    return made, (_x(B, D),)


# --- convolutions ----------------------------------------------------------------------------------------


@exhibit
def picture_stack() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.n(m.a(x))), 2)
        x = F.relu(m.o(m.b(x)))
        return m.s(F.relu(m.d(m.c(x))).mean((2, 3)))

    parts = {
        "a": nn.Conv2d(3, 8, 3, padding=1, bias=False),
        "n": nn.BatchNorm2d(8),
        "b": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "o": nn.BatchNorm2d(8),
        "c": nn.Conv2d(8, 12, 1),
        "d": nn.Conv2d(12, 6, 3, groups=3),
        "s": nn.Linear(6, 5),
    }
    return Fn(body, **parts), (_x(2, 3, 10, 11),)


@exhibit
def up_and_down() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        y = F.relu(m.b(h))
        y = F.interpolate(F.relu(m.c(y)), scale_factor=1.0)
        return m.d(torch.cat([h, m.u(y)], 1))

    parts = {
        "a": nn.Conv1d(4, 6, 3, padding=1),
        "b": nn.Conv1d(6, 8, 2, stride=2),
        "c": nn.Conv1d(8, 8, 1),
        "u": nn.ConvTranspose1d(8, 6, 2, stride=2),
        "d": nn.Conv1d(12, 5, 1),
    }
    return Fn(body, **parts), (_x(2, 4, 10),)


@exhibit
def folded_pixels() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(F.pixel_shuffle(m.a(x), 2)))

    return Fn(body, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(3, 4, 1)), (_x(2, 3, 5, 4),)


# --- real architectures ----------------------------------------------------------------------------------


def _config(cls: str, architecture: str, **fields: Any) -> Any:
    import transformers

    return getattr(transformers, cls)(architectures=[architecture], **fields)


def _text(cls: str, architecture: str, **fields: Any) -> Any:
    common = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 32,
    }
    return _config(cls, architecture, **(common | fields))


def _rms(cls: str, architecture: str, **fields: Any) -> Any:
    return _text(cls, architecture, **({"num_key_value_heads": 2, "rms_norm_eps": EPS} | fields))


def _layer(cls: str, architecture: str, **fields: Any) -> Any:
    return _text(cls, architecture, **({"layer_norm_eps": EPS} | fields))


_GPT = {
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 32,
    "layer_norm_epsilon": EPS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR = {
    "vocab_size": 37,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_OPT = {"ffn_dim": 20, "word_embed_proj_dim": 24}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _rms("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=2),
    "llama-tied": lambda: _rms("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
    "qwen2": lambda: _rms("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": lambda: _rms("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    "phi3": lambda: _rms("Phi3Config", "Phi3ForCausalLM"),
    "gemma3": lambda: _rms("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, num_hidden_layers=2),
    "mixtral": lambda: _rms("MixtralConfig", "MixtralForCausalLM", num_local_experts=4),
    "gpt2": lambda: _config("GPT2Config", "GPT2LMHeadModel", **_GPT, n_inner=20),
    "gptj": lambda: _config("GPTJConfig", "GPTJForCausalLM", **_GPT, n_inner=20, rotary_dim=4),
    "neox": lambda: _layer("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "opt": lambda: _text("OPTConfig", "OPTForCausalLM", **_OPT),
    "bloom": lambda: _config(
        "BloomConfig", "BloomForCausalLM", vocab_size=37, hidden_size=24, n_layer=1, n_head=4
    ),
    "falcon": lambda: _text(
        "FalconConfig", "FalconForCausalLM", num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=20
    ),
    "bert": lambda: _layer("BertConfig", "BertForMaskedLM"),
    "vit": lambda: _config(
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        layer_norm_eps=EPS,
    ),
    "whisper": lambda: _config(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        **_PAIR,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
    ),
    "t5": lambda: _config(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=37,
        d_model=24,
        d_kv=5,
        d_ff=20,
        num_layers=1,
        num_heads=4,
        layer_norm_epsilon=EPS,
        decoder_start_token_id=0,
    ),
    "resnet": lambda: _config(
        "ResNetConfig",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
    ),
}

NAMES = (*HOSTILE, *CONFIGS)


@dataclass(frozen=True)
class Specimen:
    """A traced model, what it is run on, and its atlases in every state.

    Attributes:
        name: in the zoo.
        trace: of the model as built.
        buffers: values of what is no parameter.
        inputs: example inputs by name, with values.
        gauge: atlases of the trace.
    """

    name: str
    trace: Trace
    buffers: Mapping[str, Tensor]
    inputs: Mapping[str, Any]
    gauge: Gauge


@functools.cache
def specimen(name: str) -> Specimen:
    """Trace a member of the zoo, once."""
    if name in HOSTILE:
        torch.manual_seed(0)
        module, args = HOSTILE[name]()
        traced = trace(module, args)
        buffers = dict(module.named_buffers(remove_duplicate=False))
        return Specimen(name, traced, buffers, dict(zip(traced.inputs, args, strict=True)), Gauge(traced))
    import warnings

    from transformers.utils import logging

    from regauge.hf import load_meta

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = load_meta(CONFIGS[name]())
        traced = trace(held.model, (), held.inputs)
        inputs = held.real_inputs(batch=3, length=7, seed=1)
    return Specimen(name, traced, held.buffers(), inputs, Gauge(traced))


class Bench:
    """Runs a specimen in true float64, as built or with a parameter of its own for every tied name."""

    def __init__(self, held: Specimen, untied: bool = False) -> None:
        self.held = held
        self.trace = untie(held.trace) if untied else held.trace

    def run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return list(run(self.trace, state.__getitem__, self.held.buffers, self.held.inputs))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||a|| over all outputs, where a is finite; infinite where b stops being finite."""
    square = total = 0.0
    for x, y in zip(a, b, strict=True):
        finite = torch.isfinite(x)
        if not bool(torch.isfinite(y)[finite].all()):
            return math.inf
        square += float((x[finite] - y[finite]).square().sum())
        total += float(x[finite].square().sum())
    assert total > 0, "the specimen returns nothing"
    return math.sqrt(square / total)


@functools.cache
def weights(name: str) -> Mapping[str, Tensor]:
    """Random weights for a specimen: gains and biases far from one and zero."""
    return random_state(specimen(name).trace, 1)


@functools.cache
def original(name: str) -> list[Tensor]:
    """Output of the specimen as built, for :func:`weights`."""
    return Bench(specimen(name)).run(weights(name))


@dataclass(frozen=True)
class Moved:
    """What moves made of a specimen."""

    plan: Rewrite
    state: State
    weights: Mapping[str, Tensor]
    bench: Bench

    @functools.cached_property
    def output(self) -> list[Tensor]:
        return self.bench.run(self.weights)


def carry_out(start: Mapping[str, Tensor], plan: Rewrite, names: Iterable[str]) -> dict[str, Tensor]:
    """Every step of a plan on whole tensors, in float64."""
    result: dict[str, Tensor] = {}
    for name in names:
        value = start[plan.copies.get(name, name)]
        for step in plan.steps.get(name, ()):
            value = step.apply(value)
        result[name] = value
    return result


def move(name: str, *moves: Any, seed: int = 0, start: Mapping[str, Tensor] | None = None) -> Moved:
    """Plan moves on a specimen and carry them out. Raises ``Refused`` as the moves do."""
    held = specimen(name)
    begin = weights(name) if start is None else start
    alias = held.trace.canonical
    begin = {other: begin[known] for other, known in alias.items() if known in begin}

    def view(so_far: Rewrite) -> Callable[[str], Tensor]:
        return lambda wanted: carry_out(begin, so_far, [wanted])[wanted]

    plan, state = make_plan(held.gauge, parse_recipe({"moves": list(moves)}), seed, view)
    names = alias if state.untied else held.trace.shapes
    return Moved(plan, state, carry_out(begin, plan, names), Bench(held, state.untied))


@functools.cache
def folded(name: str) -> Moved:
    """The specimen with everything untied and folded that can be: the state of ``atlas.folded``."""
    gauge = specimen(name).gauge
    moves = (["untie"] if gauge.tied else []) + (["fold-scales"] if gauge.foldable(untied=True) else [])
    return move(name, *moves) if moves else Moved(Rewrite(), State(), weights(name), Bench(specimen(name)))


@functools.cache
def atlas(name: str) -> Atlas:
    """As :func:`regauge.discover.discover`, once."""
    return discover(specimen(name).trace)
