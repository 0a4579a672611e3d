"""Companded weights: the same function at the start, bounded ever after."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nn_laws import compiles, distance
from regauge.errors import BadInput, Refused
from regauge.nn.compander import Compander, compand


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 7, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"bound": 3.0, "slope": 4.0}, {"learned": True}])
def test_keeps_the_function_and_gives_it_back(options: dict[str, object]) -> None:
    layer, x = linear(), torch.randn(3, 5, dtype=torch.float64)
    before, weight = layer(x), layer.weight.detach().clone()
    compand(layer, **options)
    assert distance(layer(x), before) < 1e-14
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
    assert ("outer" in dict(layer.parametrizations.weight[0].named_parameters())) == bool(
        options.get("learned")
    )
    compiles(layer, x)
    state = layer.state_dict()
    other = compand(linear(), bound=9.0)
    if not options.get("learned"):
        other.load_state_dict(state, strict=True)
        assert distance(other(x), before) < 1e-14
    parametrize.remove_parametrizations(layer, "weight")
    assert distance(layer.weight, weight) < 1e-14
    assert type(layer) is nn.Linear


def test_bounded_odd_and_steep_at_zero() -> None:
    psi = Compander(0.5, slope=3.0, like=torch.zeros((), dtype=torch.float64))
    v = torch.linspace(-1e6, 1e6, 1001, dtype=torch.float64, requires_grad=True)
    w = psi(v)
    assert float(w.detach().abs().max()) < 0.5
    assert distance(psi(-v), -w) == 0
    a, b = float(psi.outer), float(psi.inner)
    assert abs(a * math.pi / 2 - 0.5) < 1e-15
    w.sum().backward()
    assert distance(v.grad, a * b / (b**2 + v.detach() ** 2)) < 1e-12
    assert abs(float(v.grad[500]) - 3.0) < 1e-12


def test_refuses() -> None:
    layer = linear()
    largest = float(layer.weight.detach().abs().max())
    with pytest.raises(Refused, match="outside the range"):
        compand(layer, bound=largest)
    assert not parametrize.is_parametrized(layer)
    assert type(layer) is nn.Linear
    with pytest.raises(BadInput, match="no such parameter"):
        compand(layer, "gain")
    with pytest.raises(BadInput, match="above zero"):
        compand(layer, slope=0.0)
    nn.init.zeros_(layer.weight)
    with pytest.raises(BadInput, match="no range"):
        compand(layer)
