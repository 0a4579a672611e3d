"""Lab models: what they compute, what they start from, and that the rest of the library works on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regauge.api import inspect, rewrite_module
from regauge.atlas import Kind
from regauge.errors import BadInput, CheckpointError
from regauge.lab import build, load, parse_run, save, train
from regauge.lab.blocks import Attention, rotated
from regauge.lab.norms import IMAGES, TOKENS
from regauge.lab.start import INITS
from regauge.nn import gated, plain, powernorm, repbn, seednorm, tanh, unified
from regauge.nn.placement import KINDS

SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "context": 8, "expansion": 2}
TEXT = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small(**keys: Any) -> Any:
    return build({**SMALL, **keys}, seed=1)


def inputs(kind: str) -> torch.Tensor:
    return TEXT if kind == "decoder" else IMAGE


CASES = [
    *({"norm": norm} for norm in (*TOKENS, "none") if norm != "prepbn"),
    {"norm": "prepbn", "norm_options": {"start": 0.5}},
    *({"placement": placement} for placement in KINDS),
    *({"positions": positions} for positions in ("learned", "none")),
    {"qk_norm": True, "bias": True, "activation": "silu"},
    {"kind": "vit", "norm": "layernorm"},
    {"kind": "vit", "norm": "dyt", "placement": "peri"},
    *({"kind": "cnn", "norm": norm} for norm in (*IMAGES, "none")),
    {"kind": "cnn", "norm": "group", "placement": "post"},
]


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: ",".join(f"{k}={v}" for k, v in keys.items()))
def test_every_model_has_gradients_everywhere_and_comes_back(keys: dict[str, Any], tmp_path: Path) -> None:
    model = small(**keys)
    x = inputs(keys.get("kind", "decoder"))
    if keys.get("placement") == "skipinit":  # branches that add nothing have no gradient
        for name, parameter in model.named_parameters():
            if name.endswith("branch"):
                nn.init.ones_(parameter)
    for norm in model.modules():  # as do gates and slopes that start at zero
        if isinstance(norm, (TOKENS["seednorm"], TOKENS["gatednorm"])):  # type: ignore[arg-type]
            for parameter in norm.parameters():
                with torch.no_grad():
                    parameter.add_(0.1)
    model(x).square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert [n for n in missing if not n.endswith(("task_weight", "key.bias"))] == []
    save(model, tmp_path)
    again = load(tmp_path)
    assert not again.training
    assert torch.equal(again(x), model.eval()(x))
    assert again.config == model.config


@pytest.mark.parametrize("kind", ["decoder", "vit", "cnn"])
@pytest.mark.parametrize("norm", ["none", "pre"])
def test_models_can_be_exported(kind: str, norm: str) -> None:
    name = "none" if norm == "none" else {"cnn": "batch"}.get(kind, "rmsnorm")
    model = small(kind=kind, norm=name).eval()
    program = torch.export.export(model, (inputs(kind),))
    assert torch.equal(program.module()(inputs(kind)), model(inputs(kind)))


def test_a_decoder_sees_no_later_token() -> None:
    model = small(norm="layernorm").eval()
    changed = TEXT.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 256
    same = (model(TEXT) == model(changed)).all(-1)
    assert bool(same[:, :5].all())
    assert not bool(same[:, 5:].any())


def test_rotary_scores_depend_on_distances_alone() -> None:
    model = small()
    q, k = (torch.randn(1, 8, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    cos, sin = model.cos.double(), model.sin.double()
    scores = rotated(q, cos, sin) @ rotated(k, cos, sin).T
    for offset in range(-3, 4):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert scores.std() > 0.1


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours = Attention(16, 4, causal=True, norm=None, bias=True).double()
    other = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        parts = (ours.query, ours.key, ours.value)
        other.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        other.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        other.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), other(x, x, x, attn_mask=mask)[0], rtol=1e-12, atol=1e-12)


def test_each_placement_has_the_norms_of_the_literature() -> None:
    counts = {"pre": 5, "post": 4, "peri": 10, "lns": 5, "deepnorm": 4, "inverse-depth": 0, "skipinit": 0}
    for placement, count in counts.items():
        model = small(placement=placement, norm="layernorm")
        assert sum(isinstance(module, nn.LayerNorm) for module in model.modules()) == count, placement


def test_a_norm_with_a_nonlinearity_takes_the_place_of_the_activation() -> None:
    for norm, placement, same in (("evonorm-b0", "pre", True), ("evonorm-b0", "post", False)):
        nets = [
            small(kind="cnn", norm=norm, placement=placement, activation=activation)
            for activation in ("relu", "tanh")
        ]
        assert torch.equal(nets[0](IMAGE), nets[1](IMAGE)) == same


@pytest.mark.parametrize("init", INITS)
def test_inits_differ_and_repeat(init: str) -> None:
    one, two = (build({**SMALL, "init": init}, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    if init != "default":
        default = build(SMALL, seed=3).state_dict()
        assert any(not torch.equal(one[name], default[name]) for name in one)


def test_what_inits_say_of_themselves() -> None:
    wide: dict[str, Any] = {**SMALL, "width": 128, "depth": 8}
    assert not build({**wide, "init": "fixup"}).get_parameter("layers.0.mlp.sublayer.down.weight").any()
    default = build(wide).get_parameter("layers.0.mlp.sublayer.up.weight")
    assert float(default.detach().std()) == pytest.approx(128**-0.5, rel=0.02)
    deep = build({**wide, "init": "deepnorm"})
    gained = deep.get_parameter("layers.0.mlp.sublayer.up.weight")
    torch.testing.assert_close(gained, default * (8 * 8) ** -0.25)
    assert torch.equal(
        deep.get_parameter("layers.0.attention.sublayer.query.weight"),
        build(wide).get_parameter("layers.0.attention.sublayer.query.weight"),
    )
    identity = build({**wide, "init": "idinit"}).get_parameter("layers.3.attention.sublayer.value.weight")
    assert torch.equal(identity, torch.eye(128))
    last = build({**wide, "init": "idinit"}).get_parameter("layers.3.attention.sublayer.out.weight")
    assert float(last.detach().abs().max()) == pytest.approx(1e-6)
    scaled = build({**wide, "init": "vi3nr", "activation": "relu"})
    down = scaled.get_parameter("layers.0.mlp.sublayer.down.weight")
    assert float(down.detach().std()) == pytest.approx(math.sqrt(2 / 256), rel=0.02)
    out = scaled.get_parameter("layers.0.attention.sublayer.out.weight")
    assert float(out.detach().std()) == pytest.approx(128**-0.5, rel=0.02)


def test_names_of_layers_are_those_of_the_table() -> None:
    entries = [e for m in (plain, seednorm, gated, tanh, powernorm, unified, repbn) for e in m.ENTRIES]
    draw = torch.Generator().manual_seed(0)
    for entry in entries:
        made = TOKENS[entry.name](12)
        ours, theirs = (part.to(torch.float64).eval() for part in (made, entry.bare(12, draw)))
        known = {
            "layernorm": nn.LayerNorm,
            "rmsnorm": nn.RMSNorm,
        }  # those of torch compute the same and are faster
        assert isinstance(ours, known.get(entry.name, type(theirs)))


def test_unknown_names_are_errors_with_the_nearest() -> None:
    for keys, text in (
        ({"norm": "rmsnorn"}, "did you mean 'rmsnorm'"),
        ({"norm": "rmsnorm", "norm_options": {"epz": 1}}, "did you mean 'eps'"),
        ({"norm": "layernorm", "kind": "cnn"}, "no norm 'layernorm'"),
        ({"placement": "prae"}, "no such placement"),
        ({"placement": "pre", "placement_options": {"posts": 1}}, "did you mean 'post'"),
        ({"init": "fixupp"}, "did you mean 'fixup'"),
        ({"init": "mimetic", "kind": "cnn", "norm": "batch"}, "for transformers"),
        ({"init": "small", "init_options": {"sdt": 1}}, "did you mean 'std'"),
        ({"heads": 3}, "heads must divide width"),
        ({"widht": 3}, "did you mean 'width'"),
    ):
        with pytest.raises(BadInput, match=text):
            small(**keys)


def test_a_directory_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no lab model"):
        load(tmp_path)
    save(small(), tmp_path / "a")
    save(small(depth=3), tmp_path / "b")
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="do not fit"):
        load(tmp_path / "a")
    with pytest.raises(BadInput, match="not a lab model"):
        save(nn.Linear(2, 2), tmp_path / "c")  # type: ignore[arg-type]


def test_the_stream_of_a_pre_rmsnorm_decoder_can_be_rotated() -> None:
    model = small(norm="rmsnorm").double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.add_(0.3 * torch.randn_like(module.weight))
    stream = next(s for s in inspect(model, (TEXT,)).spaces if ("embedding.weight", 1) in s.parameters)
    assert Kind.ORTHOGONAL not in stream.admits
    assert Kind.ORTHOGONAL in stream.admits_folded
    folded, certificate = rewrite_module(model, (TEXT,), {"moves": ["fold-scales", "strip"]})
    assert certificate.evidence.float64.relative < 1e-12
    stream = next(s for s in inspect(folded, (TEXT,)).spaces if ("embedding.weight", 1) in s.parameters)
    assert Kind.ORTHOGONAL in stream.admits
    turned, certificate = rewrite_module(model, (TEXT,), {"moves": ["fold-scales", "rotate"]})
    assert certificate.evidence.float64.relative < 1e-12
    assert not torch.allclose(turned.get_parameter("embedding.weight"), model.embedding.weight)


@pytest.mark.parametrize(
    ("norm", "options"), [("unified", {"warmup": 5}), ("prepbn", {"steps": 10}), ("repbn", {})]
)
def test_trained_norms_with_stored_statistics_fold_away(norm: str, options: dict[str, Any]) -> None:
    config = {
        "model": {**SMALL, "norm": norm, "norm_options": options},
        "data": {"batch": 4, "characters": 20000, "held_out": 1},
        "optimizer": {"lr": 3e-3, "warmup": 0},
        "steps": 25,
        "log_every": 25,
    }
    model = train(parse_run(config)).model.double().eval()
    folded, certificate = rewrite_module(model, (TEXT,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-10
    assert (folded(TEXT) - model(TEXT)).abs().max() < 1e-10
    assert not any("running" in name or "before" in name for name in folded.state_dict())
