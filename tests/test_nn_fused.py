"""Compiled layers are the layers they were: outputs, gradients, states, names."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nn_laws import distance
from regauge import norms_regauge as core
from regauge.errors import Refused
from regauge.nn.entry import generic
from regauge.nn.fused import fused, norms
from regauge.nn.repbn import PRepBN
from regauge.nn.seednorm import SeeDNorm
from regauge.nn.unified import UnifiedNorm

SIZE = 12
pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


OWN = (SeeDNorm, UnifiedNorm, PRepBN, nn.LayerNorm, core.MagnitudeNorm, SeeDNorm)
FEW = (SeeDNorm, UnifiedNorm)


class Net(nn.Module):
    """Norms, of which one holds others and one is used under two names."""

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([kind(SIZE) for kind in kinds])
        self.maps = nn.ModuleList([nn.Linear(SIZE, SIZE) for _ in kinds])
        self.act, self.again = nn.GELU(), self.norms[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, linear in zip(self.norms, self.maps, strict=True):
            x = x + self.act(linear(norm(x)))
        return self.again(x)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def made(*kinds: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return generic(Net(kinds), torch.Generator().manual_seed(0)).train()


def test_the_norms_of_a_model_are_found() -> None:
    model = made(*OWN, LlamaRMSNorm)
    assert list(norms(model)) == list(model.norms)
    assert list(norms(model.norms[2])) == [model.norms[2]]


@pytest.mark.parametrize(("backend", "kinds"), [("aot_eager", OWN), ("inductor", FEW)])
def test_the_same_function_gradients_and_state(backend: str, kinds: tuple[type[nn.Module], ...]) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    plain, model = made(*kinds), made(*kinds)
    assert fused(model, backend=backend) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    for step in range(3):
        x = torch.randn(2, 3 + step, SIZE, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = plain(a), model(b)
        assert distance(y, z) < 1e-12
        y.square().sum().backward(), z.square().sum().backward()
        assert distance(a.grad, b.grad) < 1e-10
    for (name, own), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert own.grad is None if other.grad is None else distance(own.grad, other.grad) < 1e-9, name
    assert all(distance(v, model.state_dict()[k]) < 1e-12 for k, v in plain.state_dict().items())
    plain.eval(), model.eval()
    assert distance(plain(x), model(x)) < 1e-12
    assert counters["frames"]["ok"] >= len(kinds), "nothing was compiled"
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.norms[0].weight.add_(1.0)
    assert distance(plain(x), model(x)) < 1e-12
    assert distance(copied(x), model(x)) > 1e-3


def test_equal_layers_share_a_graph_of_all_lengths() -> None:
    model = fused(nn.Sequential(*[SeeDNorm(SIZE) for _ in range(12)]), backend="eager")
    with torch.no_grad():
        for batch, length in ((2, 5), (4, 9), (3, 6)):
            model(torch.randn(batch, length, SIZE))
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_norm_it_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match="no normalisation layer"):
        fused(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.PReLU(4), nn.Dropout()))
    assert not capfd.readouterr().err
