"""Null directions: what the atlas claims nobody sees is invisible, and nothing else of that form is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regauge.atlas import Action, Atlas, Generator, Kind
from regauge.discover import discover
from regauge.probe import Prober
from regauge.shift import random_shift
from regauge.trace import trace
from unread import without_unread

EXACT, CHANGED = 1e-10, 1e-6
B, T, D, H = 3, 7, 12, 3


class Net(nn.Module):
    """Named parts and a function of them."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def solve(body: Callable[[Any, Tensor], Tensor], **parts: Any) -> tuple[Atlas, Prober]:
    module = Net(body, **parts)
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    traced = trace(without_unread(module, x), (x,))
    buffers = dict(module.named_buffers())
    return discover(traced), Prober(traced, buffers, dict(zip(traced.inputs, (x,), strict=True)), 1)


def linear(n: int, m: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(n, m, bias=bias)


def named(atlas: Atlas) -> set[tuple[str, int | None]]:
    """(parameter, axis) of every constant direction; axis None where anything may be added."""
    return {
        (action.parameter, action.axis if action.exponent else None)
        for generator in atlas.of_kind(Kind.NULL)
        for action in generator.actions
    }


def check(atlas: Atlas, prober: Prober) -> None:
    for generator in atlas.of_kind(Kind.NULL):
        assert prober.probe(generator).error < EXACT, generator


def measured(prober: Prober) -> set[tuple[str, int | None]]:
    """The same by trial: add ``c[rest]`` along each axis, and anything, to each whole parameter."""
    draw = torch.Generator().manual_seed(3)
    found: set[tuple[str, int | None]] = set()

    def invisible(name: str, shape: list[int]) -> bool:
        state = dict(prober.state)
        state[name] = state[name] + torch.randn(shape, generator=draw, dtype=torch.float64)
        return prober.error(state) < EXACT

    for name, tensor in prober.state.items():
        if invisible(name, list(tensor.shape)):
            found.add((name, None))
            continue
        for axis in range(tensor.dim()):
            shape = [1 if i == axis else n for i, n in enumerate(tensor.shape)]
            if tensor.shape[axis] > 1 and invisible(name, shape):
                found.add((name, axis))
    return found


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def turn(x: Tensor) -> Tensor:
    """Rotary embedding, halves paired."""
    half = x.shape[-1] // 2
    angle = torch.arange(1, 1 + x.shape[-2])[:, None] * (0.3 ** torch.arange(half))
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attend(m: Any, x: Tensor, rotary: bool = False, mask: float | None = None, top: bool = False) -> Tensor:
    q, k, v = (heads(part(x)) for part in (m.a, m.b, m.c))
    if rotary:
        q, k = turn(q), turn(k)
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        s = s.masked_fill(torch.ones(T, T).triu(1).bool(), mask)
    w = s.sigmoid() if top else s.softmax(-1)
    return m.d((w @ v).transpose(1, 2).flatten(2))


def attention(**options: Any) -> tuple[Atlas, Prober]:
    parts = {name: linear(D, D) for name in "abcd"}
    return solve(functools.partial(attend, **options), **parts)


WRITERS = {("u.weight", 0), ("u.bias", 0)}
READER = {("v.weight", 1)}  # what it reads sums to zero
BOTH = WRITERS | READER
OTHER = {("p.weight", 0), ("p.bias", 0)}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda m, x: m.v(F.layer_norm(m.u(x), (D,))), BOTH),
        (lambda m, x: m.v(m.n(m.u(x))), WRITERS),
        (lambda m, x: m.v(rms(m.u(x))), set()),
        (lambda m, x: m.v((lambda y: y - y.mean(-1, keepdim=True))(m.u(x)).tanh()), WRITERS),
        (lambda m, x: m.v(m.u(x).softmax(-1)), WRITERS),
        (lambda m, x: m.u(x).log_softmax(-1), WRITERS),
        (lambda m, x: m.v(m.u(x).softmax(1)), {("u.bias", None)}),
        (lambda m, x: m.v(F.layer_norm(m.u(x).tanh(), (D,))), READER),
        (lambda m, x: m.v(F.layer_norm(m.u(x) * m.g, (D,))), READER),
        (lambda m, x: m.v(F.layer_norm(3 - m.u(x) * 2, (D,))), BOTH),
        (lambda m, x: m.v(F.layer_norm(m.u(x), (D,)) + m.u(x)), set()),
        (lambda m, x: m.v(F.layer_norm(torch.cat([m.u(x), m.p(x)], 1), (D,))), BOTH | OTHER),
        (lambda m, x: m.w(F.layer_norm(torch.cat([m.u(x), m.p(x)], 2), (2 * D,))), {("w.weight", 1)}),
        (lambda m, x: m.v(F.layer_norm(x + m.g, (D,))), {*READER, ("g", 0)}),
        (lambda m, x: m.v(F.layer_norm(m.u(x).cumsum(1), (D,))), BOTH),
        (lambda m, x: m.v(m.u(x).cumsum(1).softmax(1)), set()),
        (lambda m, x: m.v(F.pad(m.u(x), (0, 0, 1, 0)).softmax(1)), set()),
        (lambda m, x: m.v(F.pad(m.u(x), (0, 0, 1, 0), value=1.0).softmax(1)), set()),
        (lambda m, x: torch.einsum("btd,td->bt", m.u(x), m.h).softmax(1), set()),
        (lambda m, x: torch.einsum("btd,d->bt", m.u(x), m.g).softmax(1), {("u.bias", None)}),
        (lambda m, x: m.v(F.layer_norm(m.u(x) * x[..., :1], (D,))), BOTH),
        (lambda m, x: m.v(F.layer_norm(m.u(x) * x, (D,))), READER),
    ],
)  # fmt: skip
def test_claims_are_exactly_what_is_invisible(
    body: Callable[[Any, Tensor], Tensor], expected: set[tuple[str, int | None]]
) -> None:
    parts = {name: linear(D, D) for name in "uvp"}
    net = {**parts, "w": linear(2 * D, D), "n": nn.LayerNorm(D), "g": nn.Parameter(torch.ones(D))}
    net["h"] = nn.Parameter(torch.ones(T, D))
    atlas, prober = solve(body, **net)
    check(atlas, prober)
    assert named(atlas) == expected
    used = {name for space in atlas.spaces for name, _ in space.parameters}
    assert {item for item in measured(prober) if item[0] in used} == expected


@pytest.mark.parametrize("mask", [None, -math.inf, -1e9])
def test_key_bias_is_null(mask: float | None) -> None:
    atlas, prober = attention(mask=mask)
    check(atlas, prober)
    assert named(atlas) == measured(prober) == {("b.bias", None)}


@pytest.mark.parametrize("options", [{"rotary": True}, {"mask": 0.5}, {"top": True}])
def test_key_bias_is_not_null(options: dict[str, Any]) -> None:
    atlas, prober = attention(**options)
    assert named(atlas) == measured(prober) == set()


def test_joined_residual_gets_one_factor_for_the_whole_axis() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(F.layer_norm(torch.cat([x @ m.e, x @ m.f], -1) + m.u(x), (D,)))

    atlas, prober = solve(body, e=nn.Parameter(torch.ones(D, 4)), f=nn.Parameter(torch.ones(D, 8)),
                          u=linear(D, D), v=linear(D, D))  # fmt: skip
    (generator,) = atlas.of_kind(Kind.NULL)
    assert generator.size == D
    assert named(atlas) == BOTH
    check(atlas, prober)
    assert measured(prober) == BOTH


def test_fused_projection_has_only_its_key_block_null() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in m.w(x).split(D, -1))
        return m.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    atlas, prober = solve(body, w=linear(D, 3 * D), d=linear(D, D))
    (generator,) = atlas.of_kind(Kind.NULL)
    (action,) = generator.actions
    assert (action.parameter, action.parts[0].offset, action.parts[0].size) == ("w.bias", D, D)
    check(atlas, prober)


def test_bias_in_front_of_an_instance_norm_is_null() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.v(F.instance_norm(m.u(x.transpose(1, 2))).transpose(1, 2))

    atlas, prober = solve(body, u=nn.Conv1d(D, D, 3, padding=1), v=linear(D, D))
    check(atlas, prober)
    assert named(atlas) == measured(prober) == {("u.bias", None)}


def test_indices_from_scores_are_readers() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        s = m.u(x)
        best = s.topk(2, -1)[1]
        return m.v(F.layer_norm(s, (D,))) + m.t[best].sum(2)

    atlas, prober = solve(body, u=linear(D, D), v=linear(D, D), t=nn.Parameter(torch.ones(D, D)))
    check(atlas, prober)
    assert "u.weight" not in {name for name, _ in named(atlas)}


def _bigger(generator: Generator) -> Generator:
    """Anything may be added, where only a constant may."""
    free = [dataclasses.replace(action, exponent=Fraction(0)) for action in generator.actions]
    return dataclasses.replace(generator, actions=tuple(free))


def test_a_larger_claim_fails() -> None:
    atlas, prober = solve(lambda m, x: m.v(F.layer_norm(m.u(x), (D,))), u=linear(D, D), v=linear(D, D))
    (generator,) = atlas.of_kind(Kind.NULL)
    draw = torch.Generator().manual_seed(0)
    assert prober.error(random_shift(prober.state, _bigger(generator), draw)) > CHANGED


def test_random_shift_touches_only_its_block() -> None:
    action = next(iter(attention()[0].of_kind(Kind.NULL))).actions[0]
    generator = Generator("g0", Kind.NULL, "unit", 1, (), (action,), "s0")
    state = {"b.bias": torch.zeros(D), "other": torch.ones(2, dtype=torch.float32)}
    moved = random_shift(state, generator, torch.Generator().manual_seed(0))
    assert moved["other"] is state["other"]
    assert moved["b.bias"].dtype == torch.float64
    assert (moved["b.bias"] != 0).all()
    assert (state["b.bias"] == 0).all()


def _tiny(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    if name == "gpt2":
        return transformers.GPT2Config(vocab_size=31, n_embd=12, n_layer=1, n_head=3, bos_token_id=1,
                                       eos_token_id=2, architectures=["GPT2LMHeadModel"])  # fmt: skip
    if name == "bert":
        return transformers.BertConfig(**small, num_attention_heads=3, architectures=["BertForMaskedLM"])
    if name == "vit":
        return transformers.ViTConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=1,
                                      num_attention_heads=3, patch_size=8, image_size=16,
                                      architectures=["ViTForImageClassification"])  # fmt: skip
    return transformers.Qwen2Config(**small, num_attention_heads=3, num_key_value_heads=1, bos_token_id=1,
                                    eos_token_id=2, architectures=["Qwen2ForCausalLM"])  # fmt: skip


@functools.cache
def model(name: str) -> tuple[Atlas, Prober]:
    from regauge.hf import load_meta

    loaded = load_meta(_tiny(name))
    traced = trace(loaded.model, (), loaded.inputs)
    inputs = loaded.real_inputs(batch=3, length=7, seed=1)
    return discover(traced), Prober(traced, loaded.buffers(), inputs, 1)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "qwen2"])
def test_real_architectures(name: str) -> None:
    atlas, prober = model(name)
    check(atlas, prober)
    claimed = named(atlas)
    whole = {item for item in claimed if "c_attn" not in item[0]}
    assert whole == measured(prober)
    assert bool(claimed) == (name != "qwen2")
    if name == "gpt2":
        assert ("transformer.h.0.attn.c_attn.bias", None) in claimed
        assert ("transformer.wte.weight", 1) not in claimed  # tied to the head, which reads the mean


def test_untying_frees_the_embedding() -> None:
    atlas, _ = model("gpt2")
    assert atlas.folded is not None
    assert ("transformer.wte.weight", 1) in named(atlas.folded)


def test_generators_survive_json() -> None:
    atlas, _ = attention()
    assert Atlas.from_json(atlas.to_json()) == atlas
    (action,) = next(iter(atlas.of_kind(Kind.NULL))).actions
    assert isinstance(action, Action)
