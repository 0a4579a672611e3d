"""Cases of rules for entries: entry by entry, along an axis, in a normalisation."""

# ruff: noqa: E501
from __future__ import annotations

import torch
from torch.nn import functional as F

from regauge.atlas import Kind
from rule_nets import (
    LINEAR,
    NOTHING,
    ONES,
    ORTHOGONAL,
    PERM,
    POSITIVE,
    SCALE,
    SIGN,
    Case,
    N,
    between,
    gained,
    images,
)

FIXED = torch.linspace(0.5, 2, N)
MASK = torch.arange(N) % 2 == 0
ROWS = torch.tensor([[True], [False], [True]])

ENTRIES: dict[str, Case] = {
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
    "full of a parameter": gained(lambda h, g: h + torch.zeros_like(g) + torch.ones_like(g), ONES),
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
}  # fmt: skip
