"""Attention in many spellings, and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.parts import (
    B,
    D,
    Exhibits,
    Fn,
    Look,
    Made,
    T,
    join_heads,
    norm,
    param,
    softmax_attend,
    split_heads,
    stack,
)

exhibit = Exhibits()

# --- attention -------------------------------------------------------------------------------------------


@exhibit
def parallel_branches() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.l(x) + m.v(F.gelu(m.u(x)))

    return stack(Fn(body, l=Look(), u=nn.Linear(D, 9), v=nn.Linear(9, D)), norm(D))


@exhibit
def turned_in_part() -> Made:
    return stack(Look(width=6, rotary=4))


@exhibit
def turned_and_shared() -> Made:
    return stack(Look(groups=2, width=4, rotary=4, bias=True))


@exhibit
def shared_by_expand() -> Made:
    return stack(Look(heads=6, groups=2))


@exhibit
def shared_by_repeat() -> Made:
    return stack(Look(heads=6, groups=2, spread="repeat"))


@exhibit
def one_group() -> Made:
    return stack(Look(heads=4, groups=1, width=3))


@exhibit
def biased_keys() -> Made:
    return stack(Look(bias=True), norm(D))


@exhibit
def with_sink() -> Made:
    return stack(Look(bias=True, sink=True))


@exhibit
def unit_queries() -> Made:
    return stack(Look(unit=True, rotary=4, width=4))


@exhibit
def sloped_heads() -> Made:
    return stack(Look(slopes=True))


def _fused(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = cut(m.w(x))
        return m.o(join_heads(softmax_attend(q, k, v)))

    return stack(Fn(body, w=nn.Linear(D, 36), o=nn.Linear(D, D)))


@exhibit
def fused_in_blocks() -> Made:
    return _fused(lambda y: tuple(split_heads(t, 3) for t in y.chunk(3, -1)))


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

    return stack(Fn(body, a=nn.Linear(D, 6), b=nn.Linear(D, 6), c=nn.Linear(D, 5), d=nn.Linear(5, D)))


# --- experts ---------------------------------------------------------------------------------------------


@exhibit
def experts_all() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        share = m.g(x).softmax(-1)
        h = F.silu(torch.einsum("btd,edf->btef", x, m.u)) * torch.einsum("btd,edf->btef", x, m.w)
        return torch.einsum("btef,efd,bte->btd", h, m.v, share)

    return stack(Fn(body, g=nn.Linear(D, 5, False), u=param(5, D, 9), w=param(5, D, 9), v=param(5, 9, D)))


@exhibit
def experts_best_two() -> Made:
    def body(m: Any, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        best, index = m.g(flat).softmax(-1).topk(2, -1)
        share = torch.zeros(flat.shape[0], 5, dtype=x.dtype).scatter(1, index, best)
        h = F.relu(torch.bmm(flat.expand(5, -1, -1), m.u))
        return (torch.bmm(h, m.v) * share.mT[..., None]).sum(0).view_as(x)

    return stack(Fn(body, g=nn.Linear(D, 5, False), u=param(5, D, 9), v=param(5, 9, D)), norm(D))
