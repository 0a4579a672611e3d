"""Small exact moves: against references written down here, and on random models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from regauge.api import load, rewrite, rewrite_module
from regauge.errors import Refused
from regauge.modeling_regauge import Identity


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
    """Without its layer scales the stream turns: they were what stopped it."""
    model = vision(name)
    model.save_pretrained(tmp_path / "source")
    moves = ["fold-shifts", "fold-scales", "fold-layer-scale"]
    with pytest.raises(Refused, match="lambda"):
        rewrite(tmp_path / "source", tmp_path / "no", {"moves": [*moves[:2], "rotate"]})
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": [*moves, "rotate", "strip"]})
    assert result.certificate.evidence.exact.relative < 1e-12
    again = load(tmp_path / "out").eval()
    gains = {key: value for key, value in again.state_dict().items() if "lambda" in key}
    assert all(bool((value == 1).all()) for value in gains.values())
    assert sum(isinstance(module, Identity) for module in again.modules()) == (4 if name == "dinov2" else 0)
    assert len(gains) == (0 if name == "dinov2" else 4)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert distance(model(x).logits, again(x).logits) < 1e-5
