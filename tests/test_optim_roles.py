"""Roles of parameters, and the groups that are made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regauge.errors import BadInput
from regauge.hf import load_meta
from regauge.optim import AdamP, Role, groups, roles, scale_invariant, table
from zoo.configs import CONFIGS
from zoo.parts import Fn, Rms

X = torch.zeros(5, 6)


def found(name: str) -> dict[str, str]:
    held = load_meta(CONFIGS[name]())
    return {key: str(assigned.role) for key, assigned in roles(held.model, held.inputs).items()}


def test_norms_before_and_after_a_branch() -> None:
    """Peri-LN with norms of queries and keys: gains of one plus a parameter, and a rotary embedding."""
    layer = "model.layers.0."
    got = {key.removeprefix(layer): role for key, role in found("gemma3").items() if key.startswith(layer)}
    assert got == {
        "self_attn.q_proj.weight": "invariant weight",
        "self_attn.k_proj.weight": "invariant weight",
        "self_attn.v_proj.weight": "invariant weight",
        "self_attn.o_proj.weight": "invariant weight",
        "self_attn.q_norm.weight": "scale",
        "self_attn.k_norm.weight": "scale",
        "mlp.gate_proj.weight": "weight",
        "mlp.up_proj.weight": "invariant weight",
        "mlp.down_proj.weight": "invariant weight",
        "input_layernorm.weight": "input scale",
        "post_attention_layernorm.weight": "output scale",
        "pre_feedforward_layernorm.weight": "input scale",
        "post_feedforward_layernorm.weight": "output scale",
    }


def test_roles_of_other_architectures() -> None:
    gpt2 = found("gpt2")
    assert gpt2["transformer.wte.weight"] == gpt2["transformer.wpe.weight"] == "embedding"
    assert {role for key, role in gpt2.items() if key.endswith("bias")} == {"bias"}
    assert {role for key, role in gpt2.items() if ".ln_" in key and key.endswith("weight")} == {"input scale"}
    assert found("llama")["lm_head.weight"] == "embedding"
    bert = found("bert")
    assert bert["bert.embeddings.LayerNorm.weight"] == "output scale"
    resnet = found("resnet")
    first, second = (f"resnet.encoder.stages.0.layers.0.layer.{i}.normalization.weight" for i in (0, 1))
    assert (resnet[first], resnet[second]) == ("scale", "output scale")


def test_names_do_not_matter() -> None:
    def body(m: Fn, x: Tensor) -> Tensor:
        return m.bias(x + m.scale * m.embedding(m.q(x))) + m.weight

    parts = {"bias": nn.Linear(6, 3, bias=False), "embedding": nn.Linear(6, 6), "q": Rms(6)}
    net = Fn(body, **parts, scale=nn.Parameter(torch.ones(6)), weight=nn.Parameter(torch.zeros(3)))
    got = {name: str(assigned.role) for name, assigned in roles(net, (X,)).items()}
    assert got == {
        "scale": "output scale",
        "weight": "bias",
        "bias.weight": "embedding",
        "embedding.weight": "weight",
        "embedding.bias": "bias",
        "q.w": "input scale",
    }


def test_a_parameter_in_two_uses_and_one_in_none() -> None:
    net = Fn(lambda m, x: torch.tanh(m.a(x * m.g) + m.g), a=nn.Linear(6, 6), g=nn.Parameter(torch.ones(6)),
             idle=nn.Parameter(torch.ones(6)))  # fmt: skip
    got = roles(net, (X,))
    assert got["g"].role is Role.WEIGHT
    assert "added" in got["g"].reason
    assert got["idle"].reason == "is not used"


def net() -> nn.Module:
    torch.manual_seed(0)
    ends = nn.RMSNorm(8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)
    return nn.Sequential(nn.Linear(6, 8, bias=False), *ends)


def test_groups_go_into_any_optimizer() -> None:
    model = net()
    made = groups(model, (X,), 0.1)
    assert {group["role"]: group["weight_decay"] for group in made} == {
        "input scale": 0.1,
        "invariant weight": 0.1,
        "bias": 0.0,
        "embedding": 0.0,
        "weight": 0.1,
    }
    assert sum(len(group["params"]) for group in made) == len(list(model.parameters()))
    optimizer = AdamP(made, lr=0.1, views=scale_invariant(model, (X,)))
    model(torch.ones(5, 6)).sum().backward()
    optimizer.step()
    views = {group["role"]: group["views"] for group in optimizer.param_groups}
    assert views["invariant weight"] == [(0, 1)]
    assert views["bias"] == [None, None]
    again = AdamP(groups(model, (X,), 0.1), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert {group["role"]: group["views"] for group in again.param_groups} == views
    torch.optim.AdamW(groups(net(), (X,), 0.1), lr=0.1)


def test_other_factors_and_frozen_parameters() -> None:
    model = net()
    model[4].weight.requires_grad_(False)
    made = groups(model, (X,), 0.1, decay={"bias": 2.0, Role.INVARIANT: 0.0})
    decays = {group["role"]: group["weight_decay"] for group in made}
    assert decays == {"input scale": 0.1, "invariant weight": 0.0, "bias": 0.2, "weight": 0.1}
    with pytest.raises(BadInput, match="role"):
        groups(model, (X,), 0.1, decay={"gain": 1.0})


def test_the_table_has_a_line_for_every_parameter() -> None:
    lines = table(roles(net(), (X,))).splitlines()
    assert len(lines) == 1 + len(list(net().parameters()))
    assert " ".join(lines[1].split()) == "0.weight invariant weight its scale is removed as a whole, by 1"
