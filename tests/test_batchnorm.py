"""Batch norms fold exactly, borders included; what other tools do at borders is measured beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from regauge import packaged
from regauge.api import load, rewrite, rewrite_module
from regauge.errors import CheckpointError, Refused
from regauge.hf import load_meta
from regauge.modeling_regauge import Affine, Identity
from test_end_to_end import build

FOLD = {"moves": ["fold-batchnorm"]}


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, gains and shifts far from those of a fresh model, float64, in eval mode."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=draw))
            module.running_var.copy_(0.3 + torch.rand(module.num_features, generator=draw))
            with torch.no_grad():
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=draw))
                module.bias.copy_(torch.randn(module.num_features, generator=draw))
    return model.double().eval()


class Net(nn.Module):
    """Norm after a convolution, after a rectifier, after a GELU, and after a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), groups=2), nn.BatchNorm2d(6)
        self.c, self.nc = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.d, self.nd = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.na(self.a(x)))
        x = self.nb(functional.relu(self.b(x)))
        x = self.nc(functional.gelu(self.c(x)))
        return self.nd(self.d(x.mean((2, 3))))


def test_each_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = trained(Net()), torch.randn(3, 3, 8, 9, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), FOLD)
    assert certificate.evidence.float64.relative < 1e-14
    kinds = {name: type(module) for name, module in folded.named_children()}
    assert (kinds["na"], kinds["nd"]) == (Identity, Identity)
    middle, last = folded.get_submodule("nb"), folded.get_submodule("nc")
    assert isinstance(middle, Affine)
    assert middle.weight is None
    assert isinstance(last, Affine)
    assert last.weight is not None
    assert not any("running" in name or "batches" in name for name in folded.state_dict())


def test_a_negative_gain_does_not_pass_a_rectifier() -> None:
    torch.manual_seed(0)
    model, x = trained(Net()), torch.randn(3, 3, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        model.get_parameter("nb.weight")[2] *= -1
    folded, certificate = rewrite_module(model, (x,), FOLD)
    assert certificate.evidence.float64.relative < 1e-14
    middle = folded.get_submodule("nb")
    assert isinstance(middle, Affine)
    assert middle.weight is not None


def test_the_naive_fold_is_wrong_at_the_border() -> None:
    """Scale and shift pushed into the next, zero-padded convolution: right inside, wrong along the border."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))
    model, x = trained(net), torch.randn(1, 3, 10, 10, dtype=torch.float64)
    norm, last = model.get_submodule("2"), model.get_submodule("3")
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    a = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    h = norm.bias - norm.running_mean * a
    hidden = functional.relu(functional.conv2d(x, *model.get_submodule("0").parameters()))
    weight, bias = last.weight * a[None, :, None, None], last.bias + torch.einsum("oixy,i->o", last.weight, h)
    naive = functional.conv2d(hidden, weight, bias, padding=1)
    difference = (naive - model(x)).abs().detach()
    assert float(difference[..., 1:-1, 1:-1].max()) < 1e-13
    assert float(difference.max()) > 0.1
    folded, _ = rewrite_module(model, (x,), FOLD)
    assert float((folded(x) - model(x)).detach().abs().max()) < 1e-13


@pytest.mark.parametrize("name", ["crepe-tiny", "crepe-full"])
def test_crepe(name: str) -> None:
    try:
        model = packaged.module(name).double()
    except CheckpointError as error:
        pytest.skip(str(error))
    example: Any = packaged.example(name)
    frames = {key: value.double() for key, value in example.items()}
    folded, certificate = rewrite_module(model, frames, FOLD)
    assert certificate.evidence.float64.relative < 1e-12
    norms = [module for path, module in folded.named_modules() if path.endswith("norm")]
    assert len(norms) == 6
    with_scale = [
        module
        for module in norms
        if module.get_parameter("bias") is not None and len(list(module.parameters())) == 2
    ]
    # 21 gains of the last layer of the full model are negative: they stay where they are.
    assert len(with_scale) == (name == "crepe-full")


def test_a_directory(tmp_path: Path) -> None:
    model = build("resnet")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    model.save_pretrained(tmp_path / "source")
    result = rewrite(tmp_path / "source", tmp_path / "out", FOLD)
    exact = result.certificate.evidence.exact
    assert exact is not None
    assert exact.relative < 1e-12
    again = load(tmp_path / "out").eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in again.modules())
    inputs = load_meta(tmp_path / "source").real_inputs(batch=2, length=7, seed=0)
    with torch.no_grad():
        a, b = model(**inputs).logits, again(**inputs).logits
    assert float((a - b).norm() / a.norm()) < 1e-5


def test_nothing_to_fold() -> None:
    with pytest.raises(Refused, match="no batch norm"):
        rewrite_module(nn.Sequential(nn.Linear(3, 3)), (torch.randn(2, 3),), FOLD)
