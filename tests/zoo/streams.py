"""Networks around one space that every layer reads: tied, square, and normed in many ways."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import EPS, D, Exhibits, Fn, Look, Made, Rms, noise, norm, param, softmax_attend, tokens

exhibit = Exhibits()

# --- tied and square -----------------------------------------------------------------------------------


def _tie(body: Any, gain: nn.Module) -> Made:
    table = nn.Embedding(19, D)
    head = nn.Linear(D, 19, False)
    head.weight = table.weight
    return Fn(body, p=table, u=nn.Linear(D, 9), v=nn.Linear(9, D), r=gain, s=head), (tokens(19),)


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
        x = x + m.d(softmax_attend(q, k, v).transpose(1, 2).reshape(8, 8, 8))
        return m.s(x + m.v(F.relu(m.u(x))))

    parts = {name: nn.Linear(8, 8) for name in "abcduvs"}
    return Fn(body, p=nn.Embedding(8, 8), **parts), (tokens(8, 8, 8),)


@exhibit
def everything_four() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t(x).view(4, 4, 4, 1).transpose(1, 2) for t in (m.a, m.b, m.c))
        x = x + m.d(softmax_attend(q, k, v).transpose(1, 2).reshape(4, 4, 4))
        return m.s(x @ m.w.mT + x)

    return Fn(body, **{name: nn.Linear(4, 4) for name in "abcds"}, w=param(4, 4)), (noise(4, 4, 4),)


# --- norms -----------------------------------------------------------------------------------------------


@exhibit
def gain_one_plus() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids) * 3.5
        x = x + m.v(F.silu(m.u(m.q(x))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9, False), "v": nn.Linear(9, D, False), "s": nn.Linear(D, 23, False)}
    return Fn(body, p=nn.Embedding(23, D), q=Rms(D, 1.0), r=Rms(D, 1.0), **parts), (tokens(23),)


@exhibit
def gain_one_plus_both_sides() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        x = x + m.t(m.v(F.gelu(m.u(m.q(x)))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9, False), "v": nn.Linear(9, D, False), "s": nn.Linear(D, 23, False)}
    return Fn(body, p=nn.Embedding(23, D), q=Rms(D, 1.0), r=Rms(D, 1.0), t=Rms(D, 1.0), **parts), (
        tokens(23),
    )


@exhibit
def mean_and_bias() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids)
        x = x + m.v(F.gelu(m.u(m.q(x))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 23)}
    return Fn(body, p=nn.Embedding(23, D), q=norm(D), r=norm(D), **parts), (tokens(23),)


@exhibit
def mean_without_shift() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.p(ids) + m.z
        x = x + m.mix(m.q(x))
        x = x + m.v(F.gelu(m.u(m.o(x))))
        return m.s(m.r(x))

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 23)}
    norms = {name: nn.LayerNorm(D, eps=EPS, bias=False) for name in "oqr"}
    return Fn(body, p=nn.Embedding(23, D), z=param(7, D), mix=Look(bias=True), **norms, **parts), (
        tokens(23),
    )


@exhibit
def norm_after_sum() -> Made:
    def body(m: Any, ids: Tensor) -> Tensor:
        x = m.o(m.p(ids))
        x = m.q(x + m.mix(x))
        x = m.r(x + m.v(F.gelu(m.u(x))))
        return m.s(x)

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 23)}
    norms = {name: norm(D) for name in "oqr"}
    return Fn(body, p=nn.Embedding(23, D), mix=Look(bias=True), **norms, **parts), (tokens(23),)


@exhibit
def groups_normed() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.g(m.a(x)))).mean((2, 3))

    parts = {"a": nn.Conv2d(3, 12, 3), "g": nn.GroupNorm(3, 12, EPS), "b": nn.Conv2d(12, 5, 1)}
    return Fn(body, **parts), (noise(2, 3, 6, 5),)


@exhibit
def unit_vectors() -> Made:
    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = F.normalize(m.u(x), dim=-1), F.normalize(m.v(y), dim=-1)
        return m.t.exp() * (a @ b.mT)

    return Fn(body, u=nn.Linear(5, D), v=nn.Linear(6, D), t=param()), (noise(3, 5), noise(4, 6))
