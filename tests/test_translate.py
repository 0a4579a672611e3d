"""Translations: every claim holds to rounding, and nothing stops being noticed if one action is wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regauge.atlas import Action, Atlas, Generator, Kind
from regauge.discover import discover
from regauge.errors import RegaugeError
from regauge.probe import Prober
from regauge.shift import apply_shift, random_shift, shift_shape, source_shift
from regauge.trace import trace
from unread import without_unread

EXACT, CHANGED = 1e-10, 1e-6
B, T, D, H = 3, 7, 12, 3
Body = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Named parts and a function of them."""

    def __init__(self, body: Body, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def solve(body: Body, shape: tuple[int, ...] = (B, T, D), **parts: Any) -> tuple[Atlas, Prober]:
    module = Net(body, **parts)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    traced = trace(without_unread(module, x), (x,))
    inputs = dict(zip(traced.inputs, (x,), strict=True))
    return discover(traced), Prober(traced, dict(module.named_buffers()), inputs, 1)


def lin(n: int = D, m: int = D, bias: bool = True) -> nn.Linear:
    return nn.Linear(n, m, bias=bias)


def claims(atlas: Atlas) -> dict[str, list[str]]:
    """Source -> targets, each with its sign and the linear map gone through."""
    out: dict[str, list[str]] = {}
    for generator in atlas.of_kind(Kind.TRANSLATION):
        source, *targets = generator.actions
        assert source.exponent == 1
        assert source.through is None
        out[source.parameter] = [_written(action) for action in targets]
    return out


def _written(action: Action) -> str:
    sign = "+" if action.exponent > 0 else "-"
    return sign + action.parameter + ("" if action.through is None else f" {action.through.parameter}")


def check(atlas: Atlas, prober: Prober) -> None:
    """Exact as it stands; wrong without any one action, and wrong with any sign turned."""
    blind = {a.parameter for g in atlas.of_kind(Kind.NULL) for a in g.actions if not a.exponent}
    for generator in atlas.of_kind(Kind.TRANSLATION):
        assert prober.probe(generator).error < EXACT, generator
        for i, action in enumerate(generator.actions):
            if action.parameter in blind:
                continue
            rest = (*generator.actions[:i], *generator.actions[i + 1 :])
            turned = dataclasses.replace(action, exponent=-action.exponent)
            for actions in (rest, (*generator.actions[:i], turned, *generator.actions[i + 1 :])):
                mutant = dataclasses.replace(generator, actions=actions)
                assert moved(prober, mutant) > CHANGED, (i, action)


def moved(prober: Prober, generator: Generator) -> float:
    return prober.error(random_shift(prober.state, generator, torch.Generator().manual_seed(0)))


def limits(atlas: Atlas) -> str:
    return "; ".join(x.reason for space in atlas.spaces for x in space.limits if x.kind is Kind.TRANSLATION)


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(m: Any, x: Tensor, mask: str = "") -> Tensor:
    q, k, v = heads(m.a(x)), heads(m.b(x)), heads(m.c(x))
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(T, T).triu(1).bool()
    if mask == "before":
        s = s.masked_fill(future, -math.inf)
    if mask == "sink":
        s = torch.cat([s, m.s.expand(B, H, T, 1)], -1)
    w = s.softmax(-1)
    if mask == "sink":
        w = w[..., :-1]
    if mask == "after":
        w = w.masked_fill(future, 0.0)
    if mask == "scaled":
        w = w * m.s
    if mask == "over queries":
        w = w.transpose(-1, -2)
    return m.d(join(w @ v))


def attention(mask: str = "", **parts: Any) -> tuple[Atlas, Prober]:
    made = {name: lin() for name in "abcd"}
    return solve(
        functools.partial(attend, mask=mask), **{**made, "s": nn.Parameter(torch.ones(1, H, 1, 1)), **parts}
    )


@pytest.mark.parametrize("mask", ["", "before"])
def test_value_bias_moves_to_the_output(mask: str) -> None:
    atlas, prober = attention(mask)
    assert claims(atlas) == {"c.bias": ["-d.bias d.weight"]}
    check(atlas, prober)


@pytest.mark.parametrize("mask", ["after", "sink", "scaled", "over queries"])
def test_weights_that_do_not_sum_to_one_stop_it(mask: str) -> None:
    atlas, _ = attention(mask)
    assert claims(atlas) == {}


def test_a_missing_bias_slot_is_named() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.block(x)

    block = Net(attend, **{name: lin() for name in "abc"}, d=lin(bias=False))
    atlas, _ = solve(body, block=block)
    assert claims(atlas) == {}
    assert "needs a bias slot in block.d" in limits(atlas)


def test_grouped_values_are_repeated() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        k, v = (heads(part(x), 2) for part in (m.b, m.c))
        wide = [y[:, :, None].expand(B, 2, 3, T, 2).reshape(B, 6, T, 2) for y in (k, v)]
        return m.d(join(F.scaled_dot_product_attention(heads(m.a(x), 6), *wide)))

    atlas, prober = solve(body, a=lin(), b=lin(D, 4), c=lin(D, 4), d=lin())
    assert claims(atlas) == {"c.bias": ["-d.bias d.weight"]}
    (generator,) = atlas.of_kind(Kind.TRANSLATION)
    assert (generator.size, generator.copies[0][1]) == (2, 2)
    check(atlas, prober)


def test_shift_of_a_norm_moves_to_all_readers() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.n(m.u(x))
        return m.p(y).tanh() + m.q(y).sigmoid()

    atlas, prober = solve(body, u=lin(), n=nn.LayerNorm(D), p=lin(), q=lin())
    assert claims(atlas) == {"n.bias": ["-p.bias p.weight", "-q.bias q.weight"]}
    check(atlas, prober)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.p(m.n(x)).tanh() + m.w(m.n(x)), "needs a bias slot in w"),
        (lambda m, x: m.p(m.n(x)).tanh() + m.n(x).tanh(), "tanh takes no shift"),
        (lambda m, x: m.p(m.n(x)).tanh() * m.n(x), "mul takes no shift"),
        (lambda m, x: m.p(m.n(x).relu()), "relu takes no shift"),
        (lambda m, x: m.p(F.pad(m.n(x), (0, 0, 1, 0))), ""),
        (lambda m, x: m.p(m.n(x).cumsum(1)), ""),
        (lambda m, x: m.p(m.n(x).sum(1)), ""),
        (lambda m, x: m.p(torch.cat([m.n(x), x], 1)), ""),
        (lambda m, x: m.p(m.w(m.n(x)).tanh()), "needs a bias slot in w"),
        (lambda m, x: m.c(m.n(x).transpose(1, 2)).tanh(), "conv1d takes no shift"),
        (lambda m, x: m.p(m.n(x)), None),
        (lambda m, x: m.p(m.n(x)[:, 1:3].mean(1)), None),
        (lambda m, x: m.p(m.n(x).flip(1)), None),
        (lambda m, x: (m.p(2 * m.n(x)) - 1).tanh(), None),
        (lambda m, x: (m.w(m.n(x)) + m.g).tanh(), None),
        (lambda m, x: (m.w(m.n(x)) - m.g).tanh(), None),
        (lambda m, x: (m.g - m.w(m.n(x))).tanh(), None),
        (lambda m, x: (x + m.g - m.n(x)).tanh(), None),
        (lambda m, x: (m.p(x) + m.n(x)).tanh(), None),
        (lambda m, x: (m.p(x) + m.n(x)).tanh() + m.p(x), ""),
        (lambda m, x: (m.p(x) + m.n(x)).tanh() + m.p.bias, ""),
        (lambda m, x: torch.add(m.g, m.n(x), alpha=2).tanh(), ""),
        (lambda m, x: (lambda y: (y + m.n(x)).tanh() + y.sigmoid())(m.p(x)), ""),
        (lambda m, x: (lambda y: (y[None] + m.n(x)).tanh() + y.sigmoid())(m.p(x)), ""),
        (lambda m, x: (lambda y: (y + m.n(x)).tanh() + y.sigmoid())(m.p(x)[None]), ""),
        (lambda m, x: (m.p(x)[None] + m.n(x)).tanh(), None),
    ],
)  # fmt: skip
def test_every_branch_must_take_the_shift_back(body: Body, reason: str | None) -> None:
    parts = {"n": nn.LayerNorm(D), "p": lin(), "w": lin(bias=False), "g": nn.Parameter(torch.ones(D))}
    atlas, prober = solve(body, **parts, c=nn.Conv1d(D, 4, 3, padding=1))
    if reason is None:
        assert "n.bias" in claims(atlas) or "n.bias" in str(claims(atlas))
        check(atlas, prober)
    else:
        assert "n.bias" not in str(claims(atlas))
        assert reason in limits(atlas)


def test_a_reader_nobody_sees_needs_no_slot() -> None:
    """Keys without a bias: a constant added to all of them is invisible."""

    def body(m: Any, x: Tensor) -> Tensor:
        return attend(m, m.n(x))

    atlas, prober = solve(body, n=nn.LayerNorm(D), a=lin(), b=lin(bias=False), c=lin(), d=lin())
    assert claims(atlas)["n.bias"] == ["-a.bias a.weight", "-c.bias c.weight"]
    check(atlas, prober)


def test_shared_layers_take_it_back_in_every_use() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.d(m.c(x)).tanh()
        return x

    atlas, prober = solve(body, c=lin(), d=lin())
    assert claims(atlas) == {"c.bias": ["-d.bias d.weight"]}
    check(atlas, prober)


def test_shared_bias_with_two_maps_is_refused() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.n(x)
        return F.linear(y, m.v, m.g).tanh() + F.linear(y, m.w, m.g).sigmoid()

    v, w = (nn.Parameter(torch.ones(D, D)) for _ in range(2))
    atlas, _ = solve(body, n=nn.LayerNorm(D), v=v, w=w, g=nn.Parameter(torch.ones(D)))
    assert claims(atlas) == {}


def test_fused_projection_has_an_action_for_each_block() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in m.w(m.n(x)).split(D, -1))
        return m.d(join(F.scaled_dot_product_attention(q, k, v)))

    atlas, prober = solve(body, n=nn.LayerNorm(D), w=lin(D, 3 * D), d=lin())
    found = list(atlas.of_kind(Kind.TRANSLATION))
    offsets = {g.actions[0].parameter: [a.parts[0].offset for a in g.actions] for g in found}
    assert offsets == {"n.bias": [0, 0, D, 2 * D], "w.bias": [2 * D, 0]}
    check(atlas, prober)


def test_bias_moves_into_the_mean_of_a_batch_norm() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.o(m.c(x).relu())

    def normed(m: Any, x: Tensor) -> Tensor:
        return m.n(m.c(x)).relu()

    conv = nn.Conv1d(4, D, 3, padding=1)
    atlas, prober = solve(normed, (B, 4, T), c=conv, n=nn.BatchNorm1d(D))
    assert claims(atlas) in ({"c.bias": ["+n.running_mean"]}, {"n.running_mean": ["+c.bias"]})
    check(atlas, prober)
    after, _ = solve(body, (B, 4, T), c=conv, o=nn.BatchNorm1d(D))
    assert claims(after) == {}


def test_two_biases_of_one_sum_are_one_generator() -> None:
    atlas, prober = solve(lambda m, x: (m.p(x) + m.q(x.tanh())).sigmoid(), p=lin(), q=lin())
    assert claims(atlas) == {"p.bias": ["-q.bias"]}
    check(atlas, prober)


def test_setting_the_source_to_zero() -> None:
    atlas, prober = attention()
    (generator,) = atlas.of_kind(Kind.TRANSLATION)
    t = source_shift(prober.state["c.bias"], generator)
    assert tuple(t.shape) == shift_shape(generator) == (H, D // H)
    deltas = apply_shift(prober.state.__getitem__, generator, t)
    state = {name: tensor + deltas.get(name, 0) for name, tensor in prober.state.items()}
    assert (state["c.bias"] == 0).all()
    expected = prober.state["d.weight"] @ prober.state["c.bias"]
    assert torch.allclose(deltas["d.bias"], expected, rtol=0, atol=1e-14)
    assert prober.error(state) < EXACT


def test_a_shift_that_does_not_fit_is_refused() -> None:
    atlas, prober = attention()
    (generator,) = atlas.of_kind(Kind.TRANSLATION)
    with pytest.raises(RegaugeError, match="another shape"):
        apply_shift(prober.state, generator, torch.zeros(D))
    null = next(iter(atlas.of_kind(Kind.NULL)))
    with pytest.raises(RegaugeError, match="no translation"):
        apply_shift(prober.state, null, torch.zeros(1))
    short = {**prober.state, "d.bias": torch.zeros(4)}
    with pytest.raises(RegaugeError, match="does not lie"):
        apply_shift(short, generator, torch.zeros(shift_shape(generator)))


def test_json() -> None:
    atlas, _ = attention()
    assert Atlas.from_json(atlas.to_json()) == atlas


def _tiny(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    token = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "opt":
        return transformers.OPTConfig(**small, **token, ffn_dim=20, word_embed_proj_dim=12,
                                      architectures=["OPTForCausalLM"])  # fmt: skip
    if name == "bert":
        return transformers.BertConfig(**small, intermediate_size=20, architectures=["BertForMaskedLM"])
    return transformers.WhisperConfig(
        vocab_size=31, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20, num_mel_bins=5,
        max_source_positions=10, max_target_positions=20, **token, decoder_start_token_id=3,
        architectures=["WhisperForConditionalGeneration"])  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("opt", 3), ("bert", 4), ("whisper", 9)])
def test_real_architectures(name: str, count: int) -> None:
    from regauge.hf import load_meta

    loaded = load_meta(_tiny(name))
    traced = trace(loaded.model, (), loaded.inputs)
    atlas = discover(traced)
    inputs = loaded.real_inputs(batch=3, length=7, seed=1)
    check(atlas, Prober(traced, loaded.buffers(), inputs, 1))
    found = claims(atlas)
    assert len(found) == count
    if name == "opt":
        assert "needs a bias slot in lm_head" in limits(atlas.folded or atlas)
    if name == "bert":
        assert "-bert.encoder.layer.0.output.dense.bias" in found[
            "bert.encoder.layer.0.attention.output.LayerNorm.bias"
        ]  # fmt: skip
    if name == "whisper":
        assert len(found["model.encoder.layer_norm.bias"]) == 1  # the values; keys have no bias
