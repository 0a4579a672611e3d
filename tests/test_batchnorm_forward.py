"""What is left of a batch norm goes into its reader, exactly at borders too, or stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from regauge.api import inspect, rewrite_module
from regauge.modeling_regauge import Affine, Convolution, Identity
from test_batchnorm import trained


def fold(forward: str) -> dict[str, Any]:
    return {"moves": [{"name": "fold-batchnorm", "forward": forward}]}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / a.norm()).detach())


class Call(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


PLAIN: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "linear": ((5, 4), [nn.BatchNorm1d(4), nn.Linear(4, 3)]),
    "linear without bias": ((5, 4), [nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)]),
    "one axis": ((2, 4, 9), [nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, bias=False)]),
    "two axes": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, (3, 2), stride=2)]),
    "three axes": ((2, 4, 5, 5, 5), [nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2)]),
    "groups": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)]),
    "depthwise": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, bias=False)]),
    "max pooling": ((2, 4, 9), [nn.BatchNorm1d(4), nn.MaxPool1d(3, 2, 1), nn.Conv1d(4, 6, 2)]),
    "two poolings": (
        (2, 4, 19, 18),
        [nn.BatchNorm2d(4), *(nn.MaxPool2d(2, ceil_mode=True, padding=1),) * 2, nn.Conv2d(4, 6, 2)],
    ),
}
PADDED: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "one axis": ((2, 4, 9), [nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding=2, bias=False)]),
    "two axes": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, (5, 3), padding=(2, 1), stride=2)]),
    "three axes": ((2, 4, 5, 5, 5), [nn.BatchNorm3d(4), nn.Conv3d(4, 6, 3, padding=(0, 1, 2))]),
    "groups": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)]),
    "max pooling": ((2, 4, 9), [nn.BatchNorm1d(4), nn.MaxPool1d(3, 2, 1), nn.Conv1d(4, 6, 3, padding=1)]),
}


def net(tail: list[nn.Module], gelu: bool) -> nn.Module:
    """A batch norm behind a GELU keeps scale and shift; behind a ReLU after a map, the shift."""
    kinds = {nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d}
    linear = isinstance(tail[1], nn.Linear)
    stem = nn.Linear(4, 4) if linear else kinds[type(tail[0])](4, 4, 1)  # type: ignore[index]
    return trained(nn.Sequential(stem, nn.GELU() if gelu else nn.ReLU(), *tail))


@pytest.mark.parametrize("gelu", [True, False], ids=["scale and shift", "shift"])
@pytest.mark.parametrize("name", PLAIN)
def test_into_a_map_that_pads_nothing(name: str, gelu: bool) -> None:
    torch.manual_seed(0)
    shape, tail = PLAIN[name]
    model, x = net(tail, gelu), torch.randn(shape, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    assert isinstance(folded.get_submodule("2"), Identity)
    more = torch.randn(3, *(size + 2 * (at > 0) for at, size in enumerate(shape[1:])), dtype=torch.float64)
    assert relative(model(more), folded(more)) < 1e-14
    kept, _ = rewrite_module(model, (x,), fold("none"))
    assert isinstance(kept.get_submodule("2"), Affine)


@pytest.mark.parametrize("gelu", [True, False], ids=["scale and shift", "shift"])
@pytest.mark.parametrize("name", PADDED)
def test_into_a_padded_map_by_padding_values(name: str, gelu: bool) -> None:
    torch.manual_seed(0)
    shape, tail = PADDED[name]
    model, x = net(tail, gelu), torch.randn(shape, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), fold("padded"))
    assert certificate.evidence.float64.relative < 1e-14
    last = list(folded.children())[-1]
    assert isinstance(folded.get_submodule("2"), Identity)
    assert isinstance(last, Convolution)
    assert last.pad is not None
    more = torch.randn(3, *(size + 2 * (at > 0) for at, size in enumerate(shape[1:])), dtype=torch.float64)
    assert relative(model(more), folded(more)) < 1e-14
    with torch.no_grad():
        last.pad.zero_()  # what folding without padding values gives: right inside, wrong along the border
    naive = (model(more) - folded(more)).abs().detach()
    assert float(naive.max()) > 0.1
    inside = naive[(slice(None), slice(None), *(slice(2, -2),) * (naive.dim() - 2))]
    assert shape[2] < 9 or float(inside.max()) < 1e-13
    kept, _ = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert isinstance(kept.get_submodule("2"), Affine)
    inspect(folded, (more,))


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT


STAYS: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "two readers": ((2, 4, 9), [nn.BatchNorm1d(4), Call(lambda y: y + y.tanh()), nn.Conv1d(4, 6, 1)]),
    "average pooling": ((2, 4, 9), [nn.BatchNorm1d(4), nn.AvgPool1d(3, padding=1), nn.Conv1d(4, 6, 1)]),
    "rectifier": ((2, 4, 9), [nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 1)]),
    "explicit padding": (
        (2, 4, 9),
        [nn.BatchNorm1d(4), Call(lambda y: functional.pad(y, (1, 1))), nn.Conv1d(4, 6, 1)],
    ),
    "other axis": ((2, 4, 4), [nn.BatchNorm1d(4), nn.Linear(4, 3)]),
    "pooling of channels": ((5, 4), [nn.BatchNorm1d(4), nn.MaxPool1d(1), nn.Linear(4, 3)]),
    "pooling without a batch": ((2, 4, 4), [nn.BatchNorm1d(4), nn.MaxPool2d(1), nn.Conv1d(4, 4, 1)]),
    "no batch": ((4, 4, 9), [nn.BatchNorm1d(4), nn.Conv2d(4, 4, 1)]),
    "transposed": ((2, 4, 4), [nn.BatchNorm1d(4), Call(transposed), nn.Conv1d(4, 6, 1)]),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str) -> None:
    torch.manual_seed(0)
    shape, tail = STAYS[name]
    model, x = trained(nn.Sequential(nn.Tanh(), *tail)), torch.randn(shape, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), fold("padded"))
    assert certificate.evidence.float64.relative < 1e-14
    assert isinstance(folded.get_submodule("1"), Affine)
    assert torch.equal(folded.state_dict()[f"{len(tail)}.weight"], model.state_dict()[f"{len(tail)}.weight"])


class Twice(nn.Module):
    """A norm that two maps read, or that is also an output."""

    def __init__(self, output: bool) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.output = nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(4, 3), output

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(x)
        return self.a(y), y if self.output else self.b(y)


@pytest.mark.parametrize("output", [True, False])
def test_a_norm_with_more_than_one_reader(output: bool) -> None:
    """It goes into all of them, unless one of them is no map."""
    x = torch.randn(5, 4).double()
    folded, certificate = rewrite_module(trained(Twice(output)), (x,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    assert isinstance(folded.get_submodule("norm"), Affine if output else Identity)


@pytest.mark.parametrize("tail", ["max pooling", "two axes"])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_gain_that_does_not_pass(tail: str, value: float) -> None:
    """A negative one turns max pooling into min pooling; for a zero there is no padding value."""
    torch.manual_seed(0)
    shape, modules = PADDED[tail]
    model, x = net(modules, gelu=True), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        model.get_parameter("2.weight")[1] = value
    folded, certificate = rewrite_module(model, (x,), fold("padded"))
    assert certificate.evidence.float64.relative < 1e-14
    passes = tail == "two axes" and value != 0
    assert isinstance(folded.get_submodule("2"), Identity if passes else Affine)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [nn.ReLU, nn.Identity])
def test_one_map_between_two_norms(between: type[nn.Module], bias: bool) -> None:
    """Its rows take the norm after it, its columns the one before it; either may give it a bias."""
    torch.manual_seed(0)
    middle, norms = nn.Conv2d(4, 4, 3, bias=bias, groups=2), [nn.BatchNorm2d(4) for _ in range(2)]
    model = trained(nn.Sequential(nn.GELU(), norms[0], middle, between(), norms[1], nn.Conv2d(4, 2, 2)))
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    assert [type(folded.get_submodule(place)) for place in "14"] == [Identity, Identity]


class Before(nn.Module):
    """A pre-activation block: batch norm after the sum, rectifier, padded convolution, batch norm …"""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c1(functional.relu(self.n1(x)))
        return x + self.c2(functional.relu(self.n2(y)))


def test_pre_activation_blocks() -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 3, padding=1)
    head = [nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)]
    model = trained(nn.Sequential(stem, Before(), Before(), *head))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    kinds = {name: type(m) for name, m in folded.named_modules() if name[2:3] == "n"}
    assert kinds == {"1.n1": Affine, "1.n2": Identity, "2.n1": Affine, "2.n2": Identity}
    assert isinstance(folded.get_submodule("3"), Identity)
