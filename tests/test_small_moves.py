"""Small exact moves: against references written down here, and on random models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from regauge.api import load, rewrite, rewrite_module
from regauge.embedding_scale import traced, without_scale
from regauge.errors import Refused
from regauge.modeling_regauge import Identity
from test_end_to_end import build


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


# --- gains on branches -------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (6,), act: Any = torch.relu) -> None:
        super().__init__()
        self.u, self.v, self.s = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.g, self.act = nn.Parameter(torch.randn(shape)), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.u(x)
        return self.s(x + self.g * self.v(self.act(x)))


def folded(model: nn.Module, *moves: Any) -> tuple[nn.Module, Any]:
    x = torch.randn(5, 4, dtype=torch.float64)
    return rewrite_module(model, (x,), {"moves": list(moves)})


@pytest.mark.parametrize("shape", [(6,), (1,), ()])
@pytest.mark.parametrize("zero", [False, True])
def test_a_gain_on_a_branch_goes_into_its_writer(shape: tuple[int, ...], zero: bool) -> None:
    torch.manual_seed(1)
    model = Branches(shape, torch.tanh).double()
    if zero:
        model.g.data.reshape(-1)[0] = 0.0
    changed, certificate = folded(model, "fold-layer-scale")
    assert certificate.evidence.float64.relative < 1e-14
    gain = model.g.detach().expand(6)
    assert torch.allclose(changed.get_parameter("v.weight"), gain[:, None] * model.v.weight, atol=1e-15)
    assert torch.allclose(changed.get_parameter("v.bias"), gain * model.v.bias, atol=1e-15)
    assert bool((changed.get_parameter("g") == 1).all())
    assert torch.equal(changed.get_parameter("s.weight"), model.s.weight)


class Rectified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.s, self.g = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.g * torch.relu(self.u(x))
        return self.s(y) + y.sin()[:, :3]


def test_through_a_rectifier_only_positive_gains_go() -> None:
    torch.manual_seed(1)
    model = Rectified().double()
    changed, _ = folded(model, "fold-layer-scale")
    assert torch.allclose(changed.get_parameter("u.weight"), model.g[:, None] * model.u.weight, atol=1e-15)
    model.g.data[2] = -1.0
    with pytest.raises(Refused, match="only lets positive scales pass"):
        folded(model, "fold-layer-scale")


class Read(Branches):
    """The writer is read a second time."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.v(self.act(self.u(x)))
        return self.s(x.sin() + self.g * x)


def test_a_writer_that_is_read_otherwise_keeps_its_scale() -> None:
    with pytest.raises(Refused, match="reads it too"):
        folded(Read().double(), "fold-layer-scale")


def test_gains_of_norms_are_left_to_fold_scales() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, bias=False), nn.Linear(6, 2)).double()
    with pytest.raises(Refused, match="no gain here"):
        folded(net, "fold-layer-scale")


_VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}


def vision(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dinov2":
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**_VIT, mlp_ratio=2))
    else:
        config = transformers.BeitConfig(**_VIT, intermediate_size=20, layer_scale_init_value=0.1)
        model = transformers.BeitForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", ["dinov2", "beit"])
def test_layer_scales_of_transformers(name: str, tmp_path: Path) -> None:
    """Without its layer scales the stream turns: they were what stopped it. That of DINOv2 stays where it is:
    its code can put a mask token into it, which is not read where there is no mask."""
    model = vision(name)
    model.save_pretrained(tmp_path / "source")
    moves = ["fold-shifts", "fold-scales", "fold-layer-scale"]
    with pytest.raises(Refused, match="lambda" if name == "beit" else "mask_token on other inputs"):
        rewrite(tmp_path / "source", tmp_path / "no", {"moves": [*moves[:2], "rotate"]})
    moves += ["rotate"] * (name == "beit")
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": [*moves, "strip"]})
    assert result.certificate.evidence.exact.relative < 1e-12
    again = load(tmp_path / "out").eval()
    gains = {key: value for key, value in again.state_dict().items() if "lambda" in key}
    assert all(bool((value == 1).all()) for value in gains.values())
    assert sum(isinstance(module, Identity) for module in again.modules()) == (4 if name == "dinov2" else 0)
    assert len(gains) == (0 if name == "dinov2" else 4)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert distance(model(x).logits, again(x).logits) < 1e-5


# --- constants on embeddings --------------------------------------------------------------------------------


def language(name: str) -> Any:
    """A random model whose embedding is multiplied by a constant, and the key that says so."""
    common = {"vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if name == "granite":
        sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
        config: Any = transformers.GraniteConfig(
            **common,
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=2,
            embedding_multiplier=12.0,
            tie_word_embeddings=False,
        )
        return transformers.GraniteForCausalLM(config).eval(), "embedding_multiplier", 12.0
    config = transformers.XGLMConfig(**common, d_model=24, ffn_dim=20, num_layers=1, attention_heads=4)
    return transformers.XGLMForCausalLM(config).eval(), "scale_embedding", 24**0.5


@pytest.mark.parametrize("name", ["granite", "xglm"])
def test_a_constant_goes_into_the_embedding(name: str, tmp_path: Path) -> None:
    model, key, constant = language(name)
    model.save_pretrained(tmp_path / "source")
    untie = ["untie"] if name == "xglm" else []
    moves = [*untie, "fold-embedding-scale", "permute"]
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": moves[:-1]})
    assert result.certificate.evidence.exact.relative < 1e-14
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert getattr(again.config, key) == (False if name == "xglm" else 1.0)
    old, new = (m.get_input_embeddings().weight.detach() for m in (model, again))
    assert torch.allclose(new, constant * old, rtol=1e-6)
    head = again.get_output_embeddings().weight.detach()
    assert torch.equal(head, model.get_output_embeddings().weight)
    ids = torch.randint(4, 37, (2, 9))
    with torch.no_grad():
        assert distance(model(ids).logits, again(ids).logits) < 1e-6
    assert rewrite(tmp_path / "source", tmp_path / "more", {"moves": moves}).certificate.passed
    with pytest.raises(Refused, match="multiplied by a constant"):
        rewrite(tmp_path / "out", tmp_path / "twice", {"moves": ["fold-embedding-scale"]})
    if untie:
        with pytest.raises(Refused, match="put untie before"):
            rewrite(tmp_path / "source", tmp_path / "tied", {"moves": ["fold-embedding-scale"]})


def test_a_constant_that_no_key_leaves_out_stays(tmp_path: Path) -> None:
    """Gemma's is the root of the width, which no key of its own says."""
    build("gemma3").save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match=r"the constant is 4\.898"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["untie", "fold-embedding-scale"]})


def test_a_constant_in_plain_code_stays() -> None:
    with pytest.raises(Refused, match="plain module"):
        folded(nn.Sequential(nn.Linear(4, 3)).double(), "fold-embedding-scale")


def test_a_key_that_changes_more_is_not_taken() -> None:
    config = language("granite")[0].config.to_dict() | {"architectures": ["GraniteForCausalLM"]}
    before = traced(config)
    assert without_scale(before, traced(config | {"embedding_multiplier": 1.0})) == {
        "model.embed_tokens.weight": 12.0
    }
    more: list[dict[str, Any]] = [{"residual_multiplier": 0.5}, {"embedding_multiplier": 3.0}]
    more += [{"attention_bias": True}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}]
    for other in more:
        assert not without_scale(before, traced(config | {"embedding_multiplier": 1.0} | other))
