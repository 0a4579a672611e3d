"""What is done to the entries of one inner space, and operations that nobody understands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import B, D, Exhibits, Fn, Made, T, noise

exhibit = Exhibits()

# --- entrywise functions ---------------------------------------------------------------------------------


def _inner(f: Callable[[Tensor], Tensor], bias: bool = True, width: int = 9) -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(f(m.u(x)))

    return Fn(body, u=nn.Linear(D, width, bias), v=nn.Linear(width, 5, bias)), (noise(B, D),)


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

    return Fn(body, u=nn.Linear(D, 9), f=nn.PReLU(9), v=nn.Linear(9, 5)), (noise(B, D),)


def _gate(f: Callable[[Tensor], Tensor]) -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(f(m.u(x)) * m.w(x))

    return Fn(body, u=nn.Linear(D, 9, False), w=nn.Linear(D, 9, False), v=nn.Linear(9, 5, False)), (
        noise(B, D),
    )


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

    return Fn(body, u=nn.Linear(D, 18), v=nn.Linear(9, 5)), (noise(B, D),)


# --- things not understood -------------------------------------------------------------------------------


@exhibit
def spectrum_in_a_branch() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x))) + m.d(torch.fft.fft(m.c(x).double(), dim=-1).real.to(x.dtype))

    parts = {"a": nn.Linear(D, 9), "b": nn.Linear(9, 6), "c": nn.Linear(D, 8), "d": nn.Linear(8, 6)}
    return Fn(body, **parts), (noise(B, D),)


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
    return Fn(body, **parts), (noise(B, D),)


@exhibit
def mixed_by_rank() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        order = y.sum(-1).argsort(-1)
        return m.b(F.relu(y.gather(1, order[..., None].expand_as(y))))

    return Fn(body, a=nn.Linear(D, 9), b=nn.Linear(9, 6)), (noise(B, T, D),)
