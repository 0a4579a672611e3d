"""Placements against the authors' decoder layers, and the sums they write down."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from nn_laws import compiles, distance, golden
from regauge.errors import BadInput
from regauge.nn.placement import KINDS, Placement, Residual, deepnorm_gain, placements
from regauge.nn.plain import LayerNorm, RMSNorm

# Names of the norms of a layer in the authors' state dicts: those of the attention, those of the MLP.
NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "peri": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pre": ("pre", {}),
    "post": ("post", {}),
    "post_pre": ("mix-ln", {"post": 2}),
    "sandwich": ("peri", {}),
    "deeppost": ("deepnorm", {"skip": 8**0.5}),
    "LNS_branch_reached": ("lns", {}),
    "LNS_as_published": ("lns", {"as_published": True}),
}


class Attention(nn.Module):
    """Attention with rotary positions, of given matrices."""

    def __init__(self, params: dict[str, torch.Tensor], heads: int) -> None:
        super().__init__()
        self.params, self.heads = params, heads

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None, :, None] * self.params["self_attn.rotary_emb.inv_freq"]
        a, b = x.chunk(2, -1)
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()],
            -1,
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            functional.linear(x, self.params[f"self_attn.{name}_proj.weight"])
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            for name in "qkv"
        )
        q, k = self.turn(q, positions), self.turn(k, positions)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        return functional.linear(y, self.params["self_attn.o_proj.weight"])


class Gated(nn.Module):
    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.params = params

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (functional.linear(x, self.params[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        return functional.linear(functional.silu(gate) * up, self.params["mlp.down_proj.weight"])


def built(kept: Placement, params: dict[str, torch.Tensor], config: dict[str, Any]) -> list[Residual]:
    blocks = []
    for index, sublayer in enumerate((Attention(params, config["heads"]), Gated(params))):
        block = Residual(sublayer, lambda: RMSNorm(config["hidden"], config["eps"]), kept)
        names = NORMS["peri" if kept.after else "post" if kept.around else "pre"][index]
        names = (names,) if isinstance(names, str) else names
        held = [norm for norm in (block.before, block.after, block.around) if isinstance(norm, RMSNorm)]
        if kept.branch == 0:
            assert not held
            names = ()
        for name, norm in zip(names, held, strict=True):
            norm.load_state_dict({"weight": params[f"{name}.weight"]})
        blocks.append(block)
    return blocks


@pytest.mark.parametrize("key", CASES)
def test_layers_are_those_of_the_authors(key: str) -> None:
    case = golden("placements_mixln_lns")[key]
    config, (kind, options) = case["config"], CASES[key]
    h = case["x"]
    made = placements(kind, config["layers"], **options)
    assert len(made) == len(case["hidden_states"]) == 4
    for kept, params, expected in zip(made, case["params"], case["hidden_states"], strict=True):
        attention, mlp = built(kept, params, config)
        h = mlp(attention(h, case["attention_mask"], case["position_ids"]))
        assert distance(h, expected) < 1e-5
    if key == "LNS_as_published":
        assert distance(h, case["x"]) == 0


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x + 1


@pytest.mark.parametrize("kind", KINDS)
def test_sums(kind: str) -> None:
    """Each row of the table for layer 3 of 8, with a sublayer that is not linear in the scale of its norm."""
    x = torch.randn(2, 6, dtype=torch.float64)
    layer = LayerNorm(6).double()
    nn.init.normal_(layer.weight, 1, 0.3, generator=torch.Generator().manual_seed(0))
    block = Residual(Twice(), lambda: layer, placements(kind, 8)[2], dtype=torch.float64)
    n, f = layer, Twice()
    expected = {
        "pre": x + f(n(x)),
        "post": n(x + f(x)),
        "peri": x + n(f(n(x))),
        "mix-ln": x + f(n(x)),
        "lns": x + f(n(x) / 3**0.5),
        "deepnorm": n(16**0.25 * x + f(x)),
        "inverse-depth": x + f(x) / 16,
        "inverse-root": x + f(x) / 4,
        "skipinit": x,
    }[kind]
    assert distance(block(x), expected) < 1e-13
    compiles(block, x)


def test_first_quarter_is_post() -> None:
    for depth, first in ((12, 3), (24, 6), (7, 1), (3, 0)):
        assert [kept.around for kept in placements("mix-ln", depth)] == [True] * first + [False] * (
            depth - first
        )
    assert placements("mix-ln", 5, post=0) == placements("pre", 5)
    assert placements("mix-ln", 5, post=5) == placements("post", 5)


def test_skipinit_adds_layers_without_changing_the_function() -> None:
    torch.manual_seed(0)
    block = Residual(
        nn.Linear(4, 4, dtype=torch.float64), None, placements("skipinit", 1)[0], dtype=torch.float64
    )
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert float(block.branch.grad.abs()) > 0
    assert float(block.sublayer.weight.grad.abs().max()) == 0
    with torch.no_grad():
        block.branch.fill_(1)
    assert distance(block(x), x + block.sublayer(x)) < 1e-15
    again = Residual(nn.Linear(4, 4), None, placements("skipinit", 1)[0]).double()
    again.load_state_dict(block.state_dict(), strict=True)
    assert distance(again(x), block(x)) == 0
    assert block.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_growth_of_aligned_branches() -> None:
    """f(h) = h: λ = 1 / n bounds the product of n maps by e, λ = 1 / √n does not bound it."""
    for kind, size in (("inverse-depth", math.e), ("inverse-root", math.exp(math.sqrt(100) - 0.5))):
        h = torch.ones(1, dtype=torch.float64)
        for kept in placements(kind, 50):
            for _ in range(2):
                h = Residual(nn.Identity(), None, kept)(h)
        assert abs(math.log(float(h)) - math.log(size)) < 0.05


def test_deepnorm_gain() -> None:
    assert deepnorm_gain(2) == 0.5
    assert placements("deepnorm", 8)[0].skip == 2


def test_refuses() -> None:
    with pytest.raises(BadInput, match="no such placement"):
        placements("sandwich", 4)
    with pytest.raises(BadInput, match="no option post"):
        placements("pre", 4, post=1)
    with pytest.raises(BadInput, match="numbers of layers"):
        placements("mix-ln", 4, post=5)
    with pytest.raises(BadInput, match="numbers of layers"):
        placements("pre", 0)
    with pytest.raises(BadInput, match="has norms"):
        Residual(nn.Identity(), None, placements("pre", 1)[0])
