"""Cases of rules for places: shapes, images, products, rows looked up, rotary positions."""

# ruff: noqa: E501
from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from regauge.atlas import Kind
from rule_nets import COMPLEX, LINEAR, NOTHING, ONES, PERM, POSITIVE, SCALE, Case, N, between, gained, images

PLACES: dict[str, Case] = {
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
