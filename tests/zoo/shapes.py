"""Shared parameters, unusual shapes, convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import B, D, Exhibits, Fn, Look, Made, Rms, T, noise, norm, param

exhibit = Exhibits()

# --- sharing ---------------------------------------------------------------------------------------------


@exhibit
def called_twice() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.v(F.relu(m.u(m.q(x))))
        return m.s(x)

    return Fn(body, q=Rms(D), u=nn.Linear(D, 9), v=nn.Linear(9, D), s=nn.Linear(D, 5)), (noise(B, D),)


@exhibit
def layers_share() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.c(F.relu(m.a(x)))
        return m.s(x + m.d(F.relu(m.b(x))))

    a, b = nn.Linear(D, 9), nn.Linear(D, 9)
    b.weight = a.weight
    return Fn(body, a=a, b=b, c=nn.Linear(9, D), d=nn.Linear(9, D), s=nn.Linear(D, 5)), (noise(B, D),)


@exhibit
def transposed_share() -> Made:
    """One matrix writes the inner space and, transposed, reads it."""

    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(x @ m.w.mT + m.b) @ m.w

    return Fn(body, w=param(9, D), b=param(9)), (noise(B, D),)


@exhibit
def applied_to_itself() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.s(m.a(F.relu(m.a(F.relu(m.r(x))))))

    return Fn(body, r=nn.Linear(5, 9), a=nn.Linear(9, 9), s=nn.Linear(9, 4)), (noise(B, 5),)


@exhibit
def low_rank_beside() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.s(F.relu(F.linear(x, m.w + 0.5 * (m.b @ m.a))))

    return Fn(body, w=param(9, D), a=param(2, D), b=param(9, 2), s=nn.Linear(9, 4)), (noise(B, D),)


@exhibit
def weight_normed() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.s(F.relu(F.linear(x, m.g * m.w / m.w.norm(dim=1, keepdim=True), m.b)))

    return Fn(body, w=param(9, D), g=param(9, 1), b=param(9), s=nn.Linear(9, 4)), (noise(B, D),)


@exhibit
def both_at_once() -> Made:
    """A product of three things, all of which depend on the same axis."""

    def body(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bi,ijk,bj->bk", m.u(x), m.w, m.v(y))

    return Fn(body, u=nn.Linear(D, 4), v=nn.Linear(5, 6), w=param(4, 6, 3)), (noise(B, D), noise(B, 5))


# --- shapes ----------------------------------------------------------------------------------------------


@exhibit
def token_in_front() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.t.expand(x.shape[0], -1, -1), m.p(x)], 1) + m.e
        x = x + m.mix(m.q(x))
        return m.s(m.r(x)[:, 0])

    parts = {"q": norm(D), "r": norm(D), "mix": Look(bias=True), "s": nn.Linear(D, 5)}
    return Fn(body, t=param(1, 1, D), e=param(1, T + 1, D), p=nn.Linear(10, D), **parts), (noise(B, T, 10),)


@exhibit
def ones_everywhere() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.e
        x = x + m.mix(m.q(x))
        return m.s(F.relu(m.u(x)) * m.z)

    parts = {"q": norm(D), "mix": Look(heads=1, width=1), "u": nn.Linear(D, 1), "s": nn.Linear(1, 1)}
    return Fn(body, e=param(1, 1, D), z=param(1, 1, 1), **parts), (noise(1, T, D),)


@exhibit
def scaled_branches() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        x = x + m.g * m.mix(m.q(x))
        return m.s(x + m.z * m.v(F.gelu(m.u(m.r(x)))))

    parts = {"u": nn.Linear(D, 9), "v": nn.Linear(9, D), "s": nn.Linear(D, 5)}
    norms = {"q": norm(D), "r": norm(D)}
    return Fn(body, mix=Look(bias=True), g=param(D), z=param(), **norms, **parts), (noise(B, T, D),)


@exhibit
def joined_features() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.c(torch.cat([h, F.relu(m.b(h)), x], -1))

    return Fn(body, a=nn.Linear(D, 6), b=nn.Linear(6, 6), c=nn.Linear(12 + D, 5)), (noise(B, D),)


@exhibit
def pooled_features() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h) + h.mean(-1, keepdim=True) + h.square().sum(-1, keepdim=True)

    return Fn(body, a=nn.Linear(D, 6), b=nn.Linear(6, 5)), (noise(B, D),)


@exhibit
def stored_constants() -> Made:
    """A saved buffer that acts as a gain, and one that is not saved."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x) * m.k + m.n))

    made = Fn(body, a=nn.Linear(D, 9), b=nn.Linear(9, 5))
    made.register_buffer("k", torch.linspace(0.5, 1.5, 9))
    made.register_buffer("n", torch.linspace(-1.0, 1.0, 9), persistent=False)
    return made, (noise(B, D),)


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
    return Fn(body, **parts), (noise(2, 3, 10, 11),)


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
    return Fn(body, **parts), (noise(2, 4, 10),)


@exhibit
def folded_pixels() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(F.pixel_shuffle(m.a(x), 2)))

    return Fn(body, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(3, 4, 1)), (noise(2, 3, 5, 4),)
