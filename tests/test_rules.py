"""Every rule against concrete probing: what it lets pass does pass, the next larger kind does not."""

# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regauge.atlas import Atlas, Kind
from regauge.discover import discover
from regauge.interpret import interpret, op_name
from regauge.probe import LARGER, Prober
from regauge.rules import RULES
from regauge.rules.rotary import find_rotary
from regauge.trace import Trace, trace

N = 6
Body = Callable[[Any, torch.Tensor], Any]
GROUPS = {Kind.PERMUTATION, Kind.COMPLEX, Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR}
DIAGONAL = {Kind.SIGN, Kind.POSITIVE, Kind.SCALE}

PERM = frozenset({Kind.PERMUTATION})
POSITIVE = frozenset({Kind.PERMUTATION, Kind.POSITIVE})
SIGN = frozenset({Kind.PERMUTATION, Kind.SIGN})
SCALE = frozenset({Kind.PERMUTATION, Kind.SCALE})
ONES = frozenset({Kind.ORTHOGONAL_ONES})
ORTHOGONAL = frozenset({Kind.ORTHOGONAL})
LINEAR = frozenset({Kind.GENERAL_LINEAR})
COMPLEX = frozenset({Kind.COMPLEX})
NOTHING: frozenset[Kind] = frozenset()


class Net(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]], body: Body) -> None:
        super().__init__()
        self.p = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self.p, x)


class Case:
    """A module, an input, and the kinds expected for each (parameter, axis)."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], body: Body, expected: dict[tuple[str, int], frozenset[Kind]],
        x: tuple[int, ...] | torch.Tensor = (3, 5),
    ) -> None:  # fmt: skip
        self.shapes, self.body, self.expected = shapes, body, expected
        draw = torch.Generator().manual_seed(0)
        self.x = x if isinstance(x, torch.Tensor) else torch.randn(x, generator=draw)


def between(op: Callable[[torch.Tensor], torch.Tensor], kinds: frozenset[Kind]) -> Case:
    """b · op(a · x): what the space between a and b admits."""
    return Case(
        {"a": (N, 5), "b": (4, N)}, lambda p, x: F.linear(op(F.linear(x, p["a"])), p["b"]), {("a", 0): kinds}
    )


def gained(op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], kinds: frozenset[Kind]) -> Case:
    """b · op(a · x, g) with a vector of parameters g."""
    return Case(
        {"a": (N, 5), "b": (4, N), "g": (N,)},
        lambda p, x: F.linear(op(F.linear(x, p["a"]), p["g"]), p["b"]),
        {("a", 0): kinds},
    )


def images(op: Callable[[torch.Tensor], torch.Tensor], kinds: frozenset[Kind]) -> Case:
    """A convolution, the operation, another convolution."""
    return Case(
        {"a": (N, 2, 3, 3), "b": (3, N, 1, 1)},
        lambda p, x: F.conv2d(op(F.conv2d(x, p["a"])), p["b"]),
        {("a", 0): kinds},
        (3, 2, 11, 7),
    )


FIXED = torch.linspace(0.5, 2, N)
MASK = torch.arange(N) % 2 == 0
ROWS = torch.tensor([[True], [False], [True]])

CASES: dict[str, Case] = {
    # copies and casts
    "clone": between(lambda h: h.clone().contiguous(), LINEAR),
    "cast to integers": between(lambda h: (4 * h).to(torch.int64).to(h.dtype), PERM),
    "copy": between(lambda h: torch.ops.aten.copy(torch.zeros_like(h), h), LINEAR),
    "dropout in eval mode": between(lambda h: F.dropout(h, 0.5, False), LINEAR),
    # linear with constants
    "neg": between(lambda h: -h, LINEAR),
    "times a number": between(lambda h: 3 * h / 2, LINEAR),
    "times zero": between(lambda h: h + 0.0 * h, LINEAR),
    "plus a number": between(lambda h: h + 0.5, ONES),
    "number minus": between(lambda h: 0.5 - h, ONES),
    "times a fixed vector": between(lambda h: h * FIXED, frozenset({Kind.SCALE})),
    "plus a fixed vector": between(lambda h: h + FIXED, NOTHING),
    "plus rows of numbers": between(lambda h: h + torch.arange(3.0)[:, None], ONES),
    # two activations
    "sum of two": between(lambda h: h + h.relu(), POSITIVE),
    "gain": gained(lambda h, g: h * g, SCALE),
    "divided by a vector": gained(lambda h, g: h / g, SCALE),
    "shift": gained(lambda h, g: h + g, LINEAR),
    "subtract": gained(lambda h, g: h - 2 * g, LINEAR),
    "addcmul": gained(lambda h, g: torch.addcmul(h, g, g), POSITIVE),
    "lerp": gained(lambda h, g: torch.lerp(h, h.expand_as(h) + g, 0.3), LINEAR),
    "division that rounds": gained(lambda h, g: torch.div(h, g, rounding_mode="floor"), PERM),
    "maximum": gained(lambda h, g: torch.maximum(h, g), PERM),
    "one over": between(lambda h: 1 / (2 + h.abs()), SIGN),
    "glu": Case(
        {"a": (2 * N, 5), "b": (4, N)},
        lambda p, x: F.linear(F.glu(F.linear(x, p["a"])), p["b"]),
        {("a", 0): frozenset({Kind.PERMUTATION, Kind.SCALE})},
    ),
    # one activation, entry by entry
    "relu": between(F.relu, POSITIVE),
    "leaky relu": between(lambda h: F.leaky_relu(h, 0.1), POSITIVE),
    "prelu": gained(lambda h, g: F.prelu(h, g), POSITIVE),
    "threshold at zero": between(lambda h: F.threshold(h, 0, 0), POSITIVE),
    "threshold elsewhere": between(lambda h: F.threshold(h, 0.1, 0), PERM),
    "clamp at zero": between(lambda h: h.clamp(min=0), POSITIVE),
    "clamp max zero": between(lambda h: h.clamp(max=0), POSITIVE),
    "clamp": between(lambda h: h.clamp(-0.5, 0.5), PERM),
    "clamp by a vector": gained(lambda h, g: h.clamp(min=g), PERM),
    "abs": between(torch.abs, frozenset({Kind.PERMUTATION, Kind.POSITIVE, Kind.SIGN})),
    "tanh": between(torch.tanh, SIGN),
    "sin": between(torch.sin, SIGN),
    "cos": between(torch.cos, SIGN),
    "gelu": between(F.gelu, PERM),
    "sigmoid": between(torch.sigmoid, PERM),
    "square": between(torch.square, frozenset({Kind.PERMUTATION, Kind.POSITIVE, Kind.SIGN})),
    "cube": between(lambda h: h**3, SCALE),
    "square by itself": between(lambda h: h * h, frozenset({Kind.PERMUTATION, Kind.POSITIVE, Kind.SIGN})),
    "root": between(lambda h: h.abs().sqrt(), frozenset({Kind.PERMUTATION, Kind.POSITIVE, Kind.SIGN})),
    "odd power": between(lambda h: h.abs() ** 0.123456789, PERM | {Kind.SIGN}),
    "masked to zero": between(lambda h: h.masked_fill(MASK, 0), frozenset({Kind.SCALE})),
    "masked to one by rows": between(lambda h: h.masked_fill(ROWS, 1), ONES),
    "where zero": between(lambda h: torch.where(ROWS, h, 0.0), LINEAR),
    "where a fixed vector": between(lambda h: torch.where(ROWS, h, FIXED), NOTHING),
    "where of two": gained(lambda h, g: torch.where(ROWS, h, g), ONES),
    "where by sign": between(lambda h: torch.where(h > 0, h, 2 * h), PERM),
    "full of a parameter": gained(lambda h, g: h + torch.zeros_like(h) + torch.ones_like(h), ONES),
    "new full": between(lambda h: h + torch.full_like(h, 2.0), ONES),
    "only a shape": between(lambda h: h + torch.zeros_like(torch.empty_like(h)), LINEAR),
    # along an axis
    "softmax": between(lambda h: h.softmax(-1), PERM),
    "log softmax": between(lambda h: h.log_softmax(-1), PERM),
    "centred": between(lambda h: h - h.mean(-1, keepdim=True), ONES),
    "variance": between(lambda h: h / (1 + h.var(-1, keepdim=True)), ONES),
    "standard deviation": between(lambda h: h / (1 + torch.std(h, -1, keepdim=True)), ONES),
    "root mean square": between(lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3), ORTHOGONAL),
    "unit length": between(lambda h: F.normalize(h, dim=-1, eps=0.0), ORTHOGONAL),
    "length of order one": between(lambda h: h / (1 + torch.linalg.vector_norm(h, 1, -1, True)), SIGN),
    "number of nonzeros": between(lambda h: h * torch.linalg.vector_norm(h, 0, -1, True), PERM),
    "largest": between(lambda h: h / (1 + h.amax(-1, keepdim=True).abs()), PERM),
    "largest and where": between(lambda h: h * h.max(-1, keepdim=True)[0], PERM),
    "logsumexp": between(lambda h: h - h.logsumexp(-1, keepdim=True), PERM),
    "product": between(lambda h: h * h.prod(-1, keepdim=True), PERM),
    "cumsum": between(lambda h: h.cumsum(-1), NOTHING),
    "cumsum of rows": between(lambda h: h.cumsum(0), LINEAR),
    "cumprod of rows": between(lambda h: h.cumprod(0), SCALE & SIGN),
    "sorted": between(lambda h: h.sort(-1)[0], PERM),
    "index that sorts": between(lambda h: h.argsort(-1).to(h.dtype), NOTHING),
    "largest three": Case(
        {"a": (N, 5), "b": (4, 3)}, lambda p, x: F.linear(F.linear(x, p["a"]).topk(3, -1)[0], p["b"]), {("a", 0): PERM}
    ),
    # normalisation layers
    "layer norm": gained(lambda h, g: F.layer_norm(h, (N,), g, g), frozenset({Kind.PERMUTATION})),
    "layer norm bare": between(lambda h: F.layer_norm(h, (N,)), ONES),
    "layer norm over two axes": between(
        lambda h: F.layer_norm(h.view(3, 2, 3), (2, 3)).reshape(3, N), frozenset({Kind.ORTHOGONAL_ONES})
    ),
    "rms norm": between(lambda h: F.rms_norm(h, (N,)), ORTHOGONAL),
    "group norm": images(lambda h: F.group_norm(h, 2), ONES | SIGN),
    "group norm with gain": gained(lambda h, g: F.group_norm(h, 2, g, g), PERM),
    "batch norm": Case(
        {"a": (N, 5), "b": (4, N), "m": (N,), "v": (N,)},
        lambda p, x: F.linear(F.batch_norm(F.linear(x, p["a"]), p["m"], p["v"]), p["b"]),
        {("a", 0): SCALE},
    ),
    "batch norm of the batch": between(lambda h: F.batch_norm(h, None, None, training=True), SIGN),
    "batch norm that ignores what is stored": Case(
        {"a": (N, 5), "b": (4, N), "m": (N,), "v": (N,)},
        lambda p, x: (
            torch.batch_norm(
                F.linear(x, p["a"]), None, None, p["m"].clone(), p["v"].clone(), True, 0.1, 1e-5, False
            )
            @ p["b"].t()
        ),
        {("a", 0): SIGN},
    ),
    "weight norm": Case(
        {"a": (N, 5), "g": (N, 1), "b": (4, N)},
        lambda p, x: F.linear(F.linear(x, torch._weight_norm(p["a"], p["g"], 0)), p["b"]),
        {("a", 0): frozenset({Kind.PERMUTATION, Kind.POSITIVE, Kind.SIGN}), ("g", 0): SCALE},
    ),
    "instance norm": images(lambda h: F.instance_norm(h), SIGN),
    "native group norm": images(lambda h: torch.ops.aten.native_group_norm(h, None, None, 3, N, 45, 2, 1e-5)[0], ONES | SIGN),
    "statistics that are used": between(lambda h: torch.ops.aten.native_layer_norm(h, [N], None, None, 1e-5)[1] * h, NOTHING),
    # shapes
    "reshape and back": between(lambda h: h.view(3, 2, 3).flatten(1), LINEAR),
    "transpose": between(lambda h: h.t().contiguous().permute(1, 0).unsqueeze(0).squeeze(0), LINEAR),
    "all axes reversed": between(lambda h: torch.ops.aten.numpy_T(h.view(3, 2, 3)).permute(2, 1, 0).flatten(1), LINEAR),
    "movedim": between(lambda h: h.movedim(0, 1).swapaxes(0, 1), LINEAR),
    "halves": between(lambda h: torch.cat([h[:, :2].relu(), h[:, 2:]], -1), POSITIVE | LINEAR),
    "split": between(lambda h: torch.cat(h.split([2, 4], -1), -1), LINEAR),
    "chunk and unbind": between(lambda h: h.view(3, 2, 3).unbind(1)[0].repeat(1, 2), LINEAR),
    "stack": between(lambda h: torch.stack([h[:, :3], h[:, 3:]], -1).flatten(1), LINEAR),
    "every second": between(lambda h: torch.cat([h[:, ::2], h[:, 1::2]], -1), LINEAR),
    "narrow and select": between(lambda h: h.narrow(1, 0, N) + h.select(1, 0)[:, None], ONES),
    "expand": between(lambda h: h[:, :1].expand(3, N) + h, ONES),
    "repeat": Case(
        {"a": (3, 5), "b": (4, N)}, lambda p, x: F.linear(F.linear(x, p["a"]).repeat(1, 2), p["b"]), {("a", 0): LINEAR}
    ),
    "repeat interleave": Case(
        {"a": (3, 5), "b": (4, N)},
        lambda p, x: F.linear(F.linear(x, p["a"]).repeat_interleave(2, 1), p["b"]),
        {("a", 0): LINEAR},
    ),
    "flip": between(lambda h: h.flip(-1), NOTHING),
    "flip of rows": between(lambda h: h.flip(0), LINEAR),
    "roll": between(lambda h: h.roll(1, -1), NOTHING),
    "triangle": between(lambda h: torch.tril(h), frozenset({Kind.SCALE})),
    "pad the axis": between(lambda h: F.pad(h, (1, 1))[:, 1:-1], NOTHING),
    "pad rows with zeros": between(lambda h: F.pad(h, (0, 0, 1, 1)), LINEAR),
    "pad rows with ones": between(lambda h: F.pad(h, (0, 0, 1, 1), value=1.0), ONES),
    "unfold": between(lambda h: h.unfold(0, 2, 1).sum(-1), LINEAR),
    "slice scatter": between(lambda h: torch.slice_scatter(h, h[:, 2:4].relu(), 1, 2, 4), POSITIVE | LINEAR),
    "select scatter": between(lambda h: torch.select_scatter(h, h[0], 0, 1), LINEAR),
    # images
    "convolution": images(lambda h: h, LINEAR),
    "max pool": images(lambda h: F.max_pool2d(h.relu(), 2), POSITIVE),
    "average pool": images(lambda h: F.avg_pool2d(h, 2), LINEAR),
    "adaptive pool": images(lambda h: F.adaptive_avg_pool2d(h, 2), LINEAR),
    "upsample": images(lambda h: F.interpolate(h, scale_factor=2), LINEAR),
    "reflection": images(lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"), LINEAR),
    "pool of one image": Case(
        {"a": (N, 2, 3, 3), "b": (3, N, 1, 1)},
        lambda p, x: F.conv2d(F.max_pool2d(F.conv2d(x, p["a"]), 3, 1, 1), p["b"]).mean((1, 2)),
        {("a", 0): POSITIVE},
        (2, 11, 7),
    ),
    "depthwise": Case(
        {"a": (N, 2, 1, 1), "d": (N, 1, 3, 3), "b": (3, N, 1, 1)},
        lambda p, x: F.conv2d(F.conv2d(F.conv2d(x, p["a"]), p["d"], groups=N), p["b"]).mean((2, 3)),
        {("a", 0): SCALE},
        (3, 2, 5, 7),
    ),
    "grouped": Case(
        {"a": (N, 2, 1, 1), "d": (N, 3, 3, 3), "b": (3, N, 1, 1)},
        lambda p, x: F.conv2d(F.conv2d(F.conv2d(x, p["a"]), p["d"], groups=2, padding="same"), p["b"]).mean((2, 3)),
        {("a", 0): LINEAR | PERM, ("d", 0): LINEAR | PERM},
        (3, 2, 5, 7),
    ),
    "transposed": Case(
        {"a": (N, 2, 1, 1), "d": (N, 4, 3, 3), "b": (3, 8, 1, 1)},
        lambda p, x: F.conv2d(F.conv_transpose2d(F.conv2d(x, p["a"]), p["d"], groups=2, stride=2), p["b"]).mean((2, 3)),
        {("a", 0): LINEAR | PERM},
        (3, 2, 5, 7),
    ),
    "pixel shuffle": Case(
        {"a": (4 * N, 2, 1, 1), "b": (3, N, 1, 1)},
        lambda p, x: F.conv2d(F.pixel_shuffle(F.conv2d(x, p["a"]), 2), p["b"]).mean((2, 3)),
        {("a", 0): LINEAR},
        (3, 2, 5, 7),
    ),
    "pixel unshuffle": Case(
        {"a": (N, 2, 1, 1), "b": (3, 4 * N, 1, 1)},
        lambda p, x: F.conv2d(F.pixel_unshuffle(F.conv2d(x, p["a"]), 2), p["b"]).mean((2, 3)),
        {("a", 0): LINEAR},
        (3, 2, 4, 6),
    ),
    "windows": Case(
        {"a": (N, 2, 1, 1), "b": (3, 4 * N)},
        lambda p, x: (p["b"] @ F.unfold(F.conv2d(x, p["a"]), 2)).mean(2),
        {("a", 0): LINEAR},
        (3, 2, 4, 6),
    ),
    # products
    "matmul": Case({"a": (5, N), "b": (N, 4)}, lambda p, x: x @ p["a"] @ p["b"], {("a", 1): LINEAR}),
    "addmm": Case(
        {"a": (5, N), "b": (N, 4), "c": (N,)},
        lambda p, x: torch.addmm(p["c"], x, p["a"]) @ p["b"],
        {("a", 1): LINEAR, ("c", 0): LINEAR},
    ),
    "einsum": Case(
        {"a": (N, 2, 5), "b": (4, 2, N)},
        lambda p, x: torch.einsum("bhn,ohn->bo", torch.einsum("bi,nhi->bhn", x, p["a"]), p["b"]),
        {("a", 0): LINEAR, ("a", 1): LINEAR},
    ),
    "einsum of three": Case(
        {"a": (N, 5), "b": (4, N), "c": (N,)},
        lambda p, x: torch.einsum("bi,ni,on->bo", x, p["a"], p["b"]),
        {("a", 0): LINEAR},
    ),
    "einsum of one": Case(
        {"a": (N, 5), "b": (4, N)},
        lambda p, x: torch.einsum("nb->bn", p["a"] @ x.t()) @ p["b"].t(),
        {("a", 0): LINEAR},
    ),
    "attention": Case(
        {"q": (4, N, 5), "k": (4, N, 5), "v": (4, 3, 5), "o": (4, 4, 3)},
        lambda p, x: torch.einsum(
            "bhte,ohe->bto",
            F.scaled_dot_product_attention(*[torch.einsum("bti,hei->bhte", x, p[n]) for n in "qkv"], is_causal=True),
            p["o"],
        ),
        {("q", 1): LINEAR, ("v", 1): LINEAR, ("q", 0): PERM},
        (2, 3, 5),
    ),
    "causal attention along a learned axis": Case(
        {"q": (7, N, 5), "o": (4, 7)},
        lambda p, x: torch.einsum(
            "bte,ot->boe",
            F.scaled_dot_product_attention(*[torch.einsum("bi,tei->bte", x, p["q"])] * 3, is_causal=True),
            p["o"],
        ).mean(-1),
        {("q", 0): NOTHING},
    ),
    # looked up
    "embedding": Case(
        {"w": (9, N), "b": (4, N)}, lambda p, x: F.embedding(x, p["w"]) @ p["b"].t(), {("w", 0): NOTHING, ("w", 1): LINEAR},
        torch.tensor([[1, 2], [3, 8]]),
    ),
    "rows by index select": between(lambda h: h.index_select(0, torch.tensor([2, 0])), LINEAR),
    "entries by index select": between(lambda h: h.index_select(1, torch.tensor([2, 0, 1, 3, 4, 5])), NOTHING),
    "constant run": between(lambda h: torch.cat([h[:, [0, 1, 2]], h[:, [3, 4, 5]]], 1), LINEAR),
    "several indices": between(lambda h: h.view(3, 2, 3)[torch.arange(3), torch.tensor([0, 1, 0])].repeat(1, 2), LINEAR),
    "gathered by data": Case(
        {"a": (N, 5)}, lambda p, x: F.linear(x, p["a"]).gather(1, torch.tensor([[0, 3], [1, 1], [2, 5]])), {("a", 0): NOTHING}
    ),
    "one expert of each": Case(
        {"r": (4, 5), "e": (4, N, 5), "d": (4, 3, N)},
        lambda p, x: _experts(p, x),
        {("r", 0): PERM, ("e", 0): PERM, ("e", 1): LINEAR},
    ),
    "experts by scatter": Case(
        {"r": (4, 5), "e": (4, N, 5), "d": (4, 3, N)},
        lambda p, x: _dense_experts(p, x),
        {("r", 0): PERM, ("e", 1): LINEAR},
    ),
    "experts by one hot": Case(
        {"r": (4, 5), "e": (3, 4)},
        lambda p, x: F.one_hot(F.linear(x, p["r"]).argmax(-1), 4).to(x.dtype) @ p["e"].t(),
        {("r", 0): PERM, ("e", 1): PERM},
    ),
    "experts compared by number": Case(
        {"r": (4, 5), "e": (3, 2)},
        lambda p, x: (F.linear(x, p["r"]).topk(2, -1)[1] > 1).to(x.dtype) @ p["e"].t(),
        {("r", 0): NOTHING},
    ),
    "experts scattered into numbers": Case(
        {"r": (4, 5), "e": (3, 4)},
        lambda p, x: torch.arange(4.0).repeat(3, 1).scatter(1, F.linear(x, p["r"]).topk(2, -1)[1], 9.0) @ p["e"].t(),
        {("r", 0): NOTHING},
    ),
    "first expert only": Case(
        {"r": (4, 5), "e": (4, N, 5), "d": (4, 3, N)},
        lambda p, x: torch.einsum(
            "bn,bon->bo", torch.einsum("bi,bni->bn", x, p["e"][_first(p, x)]).relu(), p["d"][_first(p, x)]
        ),
        {("r", 0): PERM, ("e", 1): POSITIVE},
    ),
    # rotary
    "rotate halves": Case({"q": (N, 5), "k": (N, 5)}, lambda p, x: _rotary(p, x, "halves"), {("q", 0): COMPLEX}, (2, 4, 5)),
    "rotate pairs": Case({"q": (N, 5), "k": (N, 5)}, lambda p, x: _rotary(p, x, "pairs"), {("q", 0): COMPLEX}, (2, 4, 5)),
    "rotate complex": Case({"q": (N, 5), "k": (N, 5)}, lambda p, x: _rotary(p, x, "complex"), {("q", 0): COMPLEX}, (2, 4, 5)),
    "rotate by two tables": Case({"q": (N, 5), "k": (N, 5)}, lambda p, x: _rotary(p, x, "wrong"), {("q", 0): frozenset({Kind.SCALE})}, (2, 4, 5)),
    # one result of several
    "parameter as an output": Case({"a": (N, 5), "b": (4, N)}, lambda p, x: (x @ p["a"].t() @ p["b"].t(), p["a"]), {("a", 0): NOTHING}),
    "unknown operation": between(lambda h: torch.fft.fft(h, dim=-1).abs(), NOTHING),
    "used with and without one": gained(lambda h, g: h * (1 + g) * g, frozenset({Kind.SCALE})),
    "gain of one plus": gained(lambda h, g: h * (1 + g), SCALE),
}  # fmt: skip


def _first(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p["r"]).topk(2, -1)[1][:, 0]


def _experts(p: Any, x: torch.Tensor) -> torch.Tensor:
    weight, index = F.linear(x, p["r"]).softmax(-1).topk(2, -1)
    flat = index.reshape(-1)
    rows = x.repeat_interleave(2, 0)
    hidden = torch.einsum("ri,rni->rn", rows, p["e"][flat])
    out = torch.einsum("rn,ron->ro", hidden, p["d"][flat]) * weight.reshape(-1, 1)
    return out.view(-1, 2, 3).sum(1)


def _dense_experts(p: Any, x: torch.Tensor) -> torch.Tensor:
    score = F.linear(x, p["r"])
    value, index = score.topk(2, -1)
    weight = torch.zeros_like(score).scatter(1, index, value.softmax(-1))
    picked = score.gather(1, index).sum(-1, keepdim=True)
    hidden = torch.einsum("bi,eni->ben", x, p["e"])
    return torch.einsum("ben,eon,be->bo", hidden, p["d"], weight) * picked


def _rotary(p: Any, x: torch.Tensor, style: str) -> torch.Tensor:
    angle = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.3, 0.1]))
    cos, sin = angle.cos(), angle.sin()
    other = (2 * angle).sin() if style == "wrong" else sin

    def turn(h: torch.Tensor) -> torch.Tensor:
        if style == "pairs":
            a, b = h[..., ::2], h[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        if style == "complex":
            pairs = torch.view_as_complex(h.reshape(2, 4, 3, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        a, b = h[..., :3], h[..., 3:]
        return torch.cat([a * cos - b * sin, b * cos + a * other], -1)

    q, k = turn(F.linear(x, p["q"])), turn(F.linear(x, p["k"]))
    return q @ k.transpose(1, 2)


@cache
def traced(name: str) -> Trace:
    case = CASES[name]
    return trace(Net(case.shapes, case.body), (), {"x": case.x})


@cache
def atlas_of(name: str) -> Atlas:
    return discover(traced(name))


def found(atlas: Atlas, parameter: str, axis: int) -> frozenset[Kind]:
    """Kinds of groups and diagonals, of more than one entry, that act along an axis of a parameter."""
    return frozenset(
        g.kind
        for g in atlas.generators
        if g.size > 1 and g.kind in GROUPS | DIAGONAL
        for action in g.actions
        if action.parameter == f"p.{parameter}" and action.axis == axis
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_lets_pass_keeps_the_output(name: str) -> None:
    prober = Prober(traced(name), {}, {"x": CASES[name].x}, 3)
    assert all(bool(torch.isfinite(out).all()) for out in prober.base)
    for generator in atlas_of(name).generators:
        assert prober.probe(generator).error < 1e-11, (generator.kind, generator.actions)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_lets_pass_exactly_the_kinds_expected(name: str) -> None:
    for (parameter, axis), kinds in CASES[name].expected.items():
        assert found(atlas_of(name), parameter, axis) == kinds, (parameter, axis)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if any(case.expected.values())])
def test_the_next_larger_kind_changes_the_output(name: str) -> None:
    """Where the expected kinds hold the largest of a space: an element of the next kind must not pass."""
    prober = Prober(traced(name), {}, {"x": CASES[name].x}, 3)
    for generator in atlas_of(name).generators:
        larger = LARGER.get(generator.kind)
        if larger is None or generator.size < 3 or name in SIGNED.get(generator.kind, ()):
            continue
        if generator.kind in DIAGONAL and any(
            other.kind in GROUPS - {Kind.PERMUTATION} and other.acting == generator.acting
            for other in atlas_of(name).generators
        ):
            continue  # contained in a larger group, with another dependence
        assert prober.probe(generator, larger).error > 1e-6, (generator.kind, generator.actions)


SIGNED = {
    Kind.POSITIVE: ("abs", "square", "square by itself", "root", "addcmul", "odd power"),
    Kind.SCALE: ("cube",),
    Kind.PERMUTATION: ("number of nonzeros",),
    Kind.ORTHOGONAL_ONES: ("where of two",),
}
"""Cases in which the next kind passes as well, or has no powers: signs in a generator of their own; a count
of nonzeros that no element changes; a choice between two vectors that is linear in both."""

UNTESTED = {
    "shaped": "random or uninitialised values",
    "assertion": "computes nothing",
}


def test_every_rule_is_exercised() -> None:
    seen = {
        op_name(node) for name in CASES for node in traced(name).graph.nodes if node.op == "call_function"
    }
    rules = {rule.__name__ for op, rule in RULES.items() if op in seen}
    missing = {rule.__name__ for rule in RULES.values()} - rules - set(UNTESTED)
    assert not missing


def test_every_operation_named_by_a_rule_exists() -> None:
    for name in RULES:
        family, _, op = name.partition(".")
        assert family in ("getitem", "_set_grad_enabled") or hasattr(torch.ops.aten, op), name


def test_no_rule_claims_an_operation_that_writes_in_place() -> None:
    for name in RULES:
        packet = (
            getattr(torch.ops.aten, name.removeprefix("aten."), None) if name.startswith("aten.") else None
        )
        if packet is not None:
            schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
            assert any(not schema.is_mutable for schema in schemas), name


def test_in_place_code_is_traced_as_if_it_were_not() -> None:
    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, p["a"])
        h.mul_(2).add_(h.clone())
        h[:, :2] = h[:, :2].relu()
        return F.linear(h, p["b"])

    t = trace(Net({"a": (N, 5), "b": (4, N)}, body), (), {"x": torch.ones(3, 5)})
    for node in t.graph.nodes:
        if node.op == "call_function":
            assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False), node
    atlas = discover(t)
    assert found(atlas, "a", 0) == POSITIVE | LINEAR
    prober = Prober(t, {}, {"x": torch.ones(3, 5)}, 1)
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)


def test_an_unknown_operation_is_counted_and_stops_what_it_touches() -> None:
    atlas = atlas_of("unknown operation")
    assert any("without a rule" in refusal.reason for refusal in atlas.refusals)


def test_a_rule_that_fails_is_a_refusal_that_names_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("no such axis")

    monkeypatch.setitem(RULES, "aten.relu", broken)
    atlas = discover(traced("relu"))
    assert found(atlas, "a", 0) == NOTHING
    assert [r.reason for r in atlas.refusals] == ["aten.relu: its rule failed (IndexError: no such axis)"]


def test_a_rule_that_gives_another_shape_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.relu", lambda walk, node, x: walk.reshape(x, (3, 2, 3)))
    atlas = discover(traced("relu"))
    assert found(atlas, "a", 0) == NOTHING
    assert "rule failed" in atlas.refusals[0].reason


def test_rotary_is_recognised_in_its_spellings_only() -> None:
    for style in ("halves", "pairs", "complex"):
        assert len(find_rotary(traced(f"rotate {style}").graph)) == 2, style
    assert not find_rotary(traced("rotate by two tables").graph)


def test_a_head_that_turns_at_its_own_speed_is_not_exchanged_with_another() -> None:
    angle = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.3, 0.1]))
    speeds = torch.stack([angle, 2 * angle])[:, :, :]

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = (torch.einsum("bti,hei->bhte", x, p[n]) for n in "qk")
        cos, sin = speeds.cos(), speeds.sin()
        q, k = (
            torch.cat([h[..., :3] * cos - h[..., 3:] * sin, h[..., 3:] * cos + h[..., :3] * sin], -1)
            for h in (q, k)
        )
        return torch.einsum("bhte,bhse,oh->bots", q, k, p["o"])

    x = torch.ones(2, 4, 5)
    t = trace(Net({"q": (2, N, 5), "k": (2, N, 5), "o": (3, 2)}, body), (), {"x": x})
    assert len(find_rotary(t.graph)) == 2
    atlas = discover(t)
    assert Kind.COMPLEX in found(atlas, "q", 1)
    assert Kind.PERMUTATION not in found(atlas, "q", 0)
    prober = Prober(t, {}, {"x": torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))}, 1)
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)


def test_numbers_made_in_the_code_keep_their_values_on_meta() -> None:
    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        number = torch.tensor([2.0, 3.0, 4.0], device=x.device)
        return x[:, [1]] * p["a"] * number + x.new_tensor(5.0)

    with torch.device("meta"):
        model = Net({"a": (3,)}, body)
        t = trace(model, (), {"x": torch.empty(2, 3)})
    assert all(value.device.type == "cpu" for value in t.constants.values())
    x = torch.ones(2, 3)
    out = Prober(t, {}, {"x": x}, 1)
    expected = out.state["p.a"] * torch.tensor([2.0, 3.0, 4.0]) + 5
    assert torch.allclose(out.base[0], expected.expand(2, 3))


def test_an_element_may_not_differ_along_an_axis_that_a_contraction_mixes() -> None:
    """Heads are mixed by a square matrix and added to themselves: one element for all heads."""

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("bi,hei->bhe", x, p["a"])
        h = h + torch.einsum("gh,bhe->bge", p["m"], h)
        return torch.einsum("bhe,ohe->bo", h, p["o"])

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    t = trace(Net({"a": (4, N, 5), "m": (4, 4), "o": (2, 4, N)}, body), (), {"x": x})
    atlas = discover(t)
    prober = Prober(t, {}, {"x": x}, 1)
    linear = [g for g in atlas.generators if g.kind is Kind.GENERAL_LINEAR and g.size == N]
    assert [g.copies for g in linear] == [()]
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)


def test_two_lists_of_selected_experts_are_not_one() -> None:
    """A row picks one expert to write and another to read: no scale may differ between experts."""

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        index = F.linear(x, p["r"]).topk(2, -1)[1]
        hidden = torch.einsum("bi,bni->bn", x, p["e"][index[:, 0]])
        return torch.einsum("bn,bon->bo", hidden, p["d"][index[:, 1]])

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    t = trace(Net({"r": (4, 5), "e": (4, N, 5), "d": (4, 3, N)}, body), (), {"x": x})
    atlas = discover(t)
    prober = Prober(t, {}, {"x": x}, 1)
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)
    assert {g.kind for g in atlas.generators if g.copies} <= {Kind.NULL, Kind.TRANSLATION}


def test_the_walk_does_not_depend_on_anything_but_the_graph() -> None:
    first, second = (interpret(traced("layer norm")) for _ in range(2))
    assert [repr(type(f)) + f.node for f in first.result.facts] == [
        repr(type(f)) + f.node for f in second.result.facts
    ]


def test_a_change_that_leaves_the_domain_of_a_root_is_not_called_invisible() -> None:
    """One key: the softmax over it is one whatever the scores are, but not where they are no numbers."""

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.batch_norm(F.linear(x, p["a"]), p["m"], p["v"])
        return (h.softmax(0) * x.sum()).sum(-1)

    x = torch.ones(1, 5)
    t = trace(Net({"a": (N, 5), "m": (N,), "v": (N,)}, body), (), {"x": x})
    nulls = {a.parameter for g in discover(t).generators if g.kind is Kind.NULL for a in g.actions}
    assert "p.v" not in nulls
    assert nulls
