"""Norms whose statistics are constants go into the maps beside them; gains are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regauge import norms_regauge as core
from regauge.api import load, rewrite, rewrite_module
from regauge.errors import Refused
from regauge.modeling_regauge import Affine, Norm
from regauge.moves import forward as forward_fold
from regauge.nn.adab2n import AdaB2N1d, AdaB2N2d
from regauge.nn.powernorm import PowerNorm
from regauge.nn.repbn import PRepBN, RepBN
from regauge.nn.unified import UnifiedNorm
from test_end_to_end import build
from test_grow import outputs
from zoo import distance


class Block(nn.Module):
    """Attention and a gated map, each read from a norm by several maps, one of them without a bias."""

    def __init__(self, norm: Callable[[int], nn.Module], size: int) -> None:
        super().__init__()
        self.before, self.qkv, self.o = norm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner, self.up = norm(size), nn.Linear(size, 2 * size)
        self.gate, self.down = nn.Linear(size, 2 * size, bias=False), nn.Linear(2 * size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v))
        y = self.inner(x)
        return x + self.down(torch.relu(self.up(y)) * self.gate(y))


class Net(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], size: int = 12) -> None:
        super().__init__()
        self.entry, self.after = nn.Linear(5, size), norm(size)
        self.blocks = nn.ModuleList([Block(norm, size) for _ in range(2)])
        self.last, self.head = norm(size), nn.Linear(size, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.after(self.entry(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def trained(norm: Callable[[int], nn.Module], steps: int = 12) -> nn.Module:
    """With running statistics and gains of their own; the schedule of a PRepBN at its end."""
    torch.manual_seed(0)
    model = Net(norm).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "weight" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        for _ in range(steps):
            model(2 * torch.randn(4, 6, 5).double() + 1)
    return model.eval()


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "unified": lambda size: UnifiedNorm(size, warmup=4),
    "repbn": RepBN,
    "prepbn": lambda size: PRepBN(size, steps=5),
    "prepbn of an rms norm": lambda size: PRepBN(size, "rms", steps=5),
}


@pytest.mark.parametrize("name", NORMS)
def test_nothing_is_left_of_it(name: str) -> None:
    model, x = trained(NORMS[name]), torch.randn(3, 9, 5).double()
    folded, certificate = rewrite_module(model, (x[:2, :4],), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    assert distance(model(x).detach(), folded(x).detach()) < 1e-14
    own = {type(norm) for norm in (model.get_submodule("after"), nn.LayerNorm(1), nn.RMSNorm(1), RepBN(1))}
    assert not any(type(module) in {*own, Affine} for module in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_reader_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the norm goes into all of its readers but the last."""
    real: Any = forward_fold.find_readers
    model, x = trained(UnifiedNorm), torch.randn(3, 9, 5).double()
    monkeypatch.setattr("regauge.moves.batchnorm.find_readers", lambda *args: real(*args)[:1])
    with pytest.raises(Exception, match="certificate failed"):
        rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})


class Passing(nn.Module):
    """A stream that is also read beside the norm, which stands after a map of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 6), UnifiedNorm(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y + self.b(self.norm(y))


def test_what_is_read_beside_the_norm_stays() -> None:
    model = Passing().double().train()
    model(3 * torch.randn(9, 4, 5).double())
    x = torch.randn(3, 4, 5).double()
    folded, _ = rewrite_module(model.eval(), (x,), {"moves": ["fold-batchnorm"]})
    assert distance(model(x).detach(), folded(x).detach()) < 1e-14
    assert torch.equal(folded.get_parameter("a.weight"), model.get_parameter("a.weight"))


def test_statistics_of_every_token_stay() -> None:
    x = torch.randn(3, 9, 5).double()
    with pytest.raises(Refused, match="no batch norm"):
        rewrite_module(trained(lambda size: PowerNorm(size, warmup=3)), (x,), {"moves": ["fold-batchnorm"]})


GAINS: dict[str, Callable[[int], nn.Module]] = {
    "magnitude": lambda size: core.MagnitudeNorm(size, 1e-5, form="layer", bias=True),
    "lns": lambda size: core.ScaledNorm(size, scale=0.3, bias=True),
    "offset": lambda size: core.ScaledNorm(size, scale=1.0, offset=1.0),
}


@pytest.mark.parametrize("name", GAINS)
def test_gains_are_made_once(name: str) -> None:
    model, x = trained(GAINS[name]), torch.randn(3, 9, 5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    collapsed, certificate = rewrite_module(model, (x,), {"moves": ["collapse"]})
    assert certificate.evidence.float64.relative < 1e-14
    assert all(
        isinstance(collapsed.get_submodule(path), Norm) for path in ("after", "last", "blocks.1.inner")
    )
    assert distance(model(2 * x).detach(), collapsed(2 * x).detach()) < 1e-14
    with pytest.raises(Refused, match="more parameters than"):
        rewrite_module(collapsed, (x,), {"moves": ["collapse"]})


@pytest.mark.parametrize("transposed", [False, True])
def test_vectors_around_a_map_go_into_it(transposed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), core.ScaledLinear(5, 6, transposed=transposed), nn.Tanh()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    x = torch.randn(3, 4, 5).double()
    collapsed, _ = rewrite_module(model, (x,), {"moves": ["collapse"]})
    assert isinstance(collapsed.get_submodule("1"), nn.Linear)
    assert distance(model(x).detach(), collapsed(x).detach()) < 1e-15


def test_back_to_what_it_was(tmp_path: Path) -> None:
    """Upgraded and folded again, a model is a stock one with the old values."""
    model = build("llama")
    model.save_pretrained(tmp_path / "source")
    for kind in ("magnitude", "branched", "lns"):
        rewrite(tmp_path / "source", tmp_path / kind, {"moves": [{"name": "upgrade", "norm": kind}]})
        result = rewrite(tmp_path / kind, tmp_path / f"{kind}-back", {"moves": ["collapse"]})
        assert (result.certificate.evidence.exact or result.certificate.evidence.float64).relative < 1e-14
        again = load(tmp_path / f"{kind}-back").eval()
        assert not any(type(module).__module__ == core.__name__ for module in again.modules())
        found = outputs(again, tmp_path / "source")
        assert distance(outputs(model, tmp_path / "source"), found) < 1e-6


class Placed(nn.Module):
    """A gain for each position and a shift for each feature."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(9, 1)), nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (9,), eps=1e-5) * self.gain + self.shift


def test_a_gain_of_positions_is_none_of_features() -> None:
    model = nn.Sequential(nn.Linear(5, 9), Placed(9), nn.Linear(9, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    with pytest.raises(Refused, match="more parameters"):
        rewrite_module(model, (torch.randn(3, 9, 5).double(),), {"moves": ["collapse"]})


class Divided(nn.Module):
    """A norm by a stored variance, of features on the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.variance, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(self.variance) + self.shift


@pytest.mark.parametrize("kind", [UnifiedNorm, Divided])
def test_features_stay_on_the_last_axis(kind: Callable[[int], nn.Module]) -> None:
    """Of two axes the second is the last; what is left must not take it for the second of three."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), kind(6), nn.Tanh()).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    folded, _ = rewrite_module(model, (torch.randn(4, 6),), {"moves": ["fold-batchnorm"]})
    assert isinstance(folded[2], Affine)
    for x in (torch.randn(4, 5, 6), torch.randn(4, 6, 6)):
        assert distance(model(x).detach(), folded(x).detach()) < 1e-6


def test_one_number_and_one_axis() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Divided(1)).eval()
    with pytest.raises(Refused, match="no batch norm"):
        rewrite_module(model, (torch.randn(6),), {"moves": ["fold-batchnorm"]})


def test_a_norm_in_another_dtype_gives_that_of_its_input() -> None:
    """Batch norms are often kept in float32 in a model in bfloat16; what is left of one is no cast."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GELU(), nn.BatchNorm1d(4), nn.GELU(), nn.Conv1d(4, 2, 3))
    model.to(torch.bfloat16).eval()[2].float()
    x = torch.randn(2, 3, 9, dtype=torch.bfloat16)
    folded, _ = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert isinstance(folded[2], Affine)
    assert folded[:3](x).dtype == torch.bfloat16
    assert distance(model(x).detach().float(), folded(x).detach().float()) < 2e-2


def test_positions_in_one_axis() -> None:
    """AdaB2N takes all positions as one axis; its channels are on the second however many there are."""
    flat = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), AdaB2N1d(6), nn.Tanh())
    image = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), AdaB2N2d(6), nn.Tanh())
    for model, seen, other in (
        (flat, torch.randn(4, 6), torch.randn(2, 6, 6)),
        (image, torch.randn(2, 3, 4, 5), torch.randn(3, 3, 5, 2)),
    ):
        model.eval()
        with torch.no_grad():
            for tensor in (*model[2].parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
        folded, _ = rewrite_module(model, (seen,), {"moves": ["fold-batchnorm"]})
        assert isinstance(folded[2], Affine)
        for x in (seen, other):
            assert distance(model(x).detach(), folded(x).detach()) < 1e-6
