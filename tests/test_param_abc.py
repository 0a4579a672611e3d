"""The shift of an abc-parametrisation leaves the whole training run as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from regauge.errors import BadInput, Refused
from regauge.param import Abc, shift

WIDTH = 24
THETA = {"0.weight": 0.7, "2.weight": -0.4, "2.bias": 0.7, "4.weight": 1.0}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3)
    ).double()


def train(net: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> list[torch.Tensor]:
    """Outputs on fixed inputs after every step."""
    random = torch.Generator().manual_seed(seed)
    fixed = torch.randn(7, 5, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    found = [net(fixed).detach()]
    for _ in range(steps):
        x = torch.randn(16, 5, generator=random, dtype=torch.float64)
        loss = F.cross_entropy(net(x), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(net(fixed).detach())
    return found


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, 0.3),
    "sgd, momentum, decay": lambda p: SGD(p, 0.1, 0.9, 0.1, 0.05),
    "sgd, nesterov": lambda p: SGD(p, 0.1, 0.9, nesterov=True),
    "adam": lambda p: Adam(p, 0.02, eps=1e-3),
    "adam, decay": lambda p: Adam(p, 0.02, (0.8, 0.9), 1e-2, 0.1, amsgrad=True),
    "adam, decoupled": lambda p: Adam(p, 0.02, weight_decay=0.3, decoupled_weight_decay=True),
    "adamw": lambda p: AdamW(p, 0.02, eps=1e-3, weight_decay=0.5),
    "adamw, groups": lambda p: AdamW(
        [
            {"params": p[:3], "lr": 0.03, "weight_decay": 0.4},
            {"params": p[3:], "lr": torch.tensor(0.01, dtype=torch.float64), "eps": 1e-2},
        ],
        foreach=False,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 5])
def test_the_trajectory_is_the_same(name: str, before: int) -> None:
    """Shifted at the start, or in the middle of a run with its moments; then once more, and back."""
    net = model()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    train(net, optimizer, before, 1)
    kept = copy.deepcopy(net.state_dict())
    other, its = shift(net, optimizer, THETA, WIDTH)
    assert all(value.equal(kept[key]) for key, value in net.state_dict().items())
    plain, shifted = train(net, optimizer, 20, 2), train(other, its, 20, 2)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, shifted, strict=True)) < 1e-10
    assert float((plain[-1] - plain[0]).abs().max()) > 1e-2
    again, its = shift(other, its, {"0.weight": 0.5, "4.weight": -1.0, "0.bias": 0.2}, WIDTH)
    plain, shifted = train(net, optimizer, 10, 3), train(again, its, 10, 3)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, shifted, strict=True)) < 1e-10


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps"])
def test_every_factor_matters(name: str, key: str) -> None:
    """With one factor of one parameter left out, the run is another one."""
    net = model()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    other, its = shift(net, optimizer, THETA, WIDTH)
    matters = False
    for group in its.param_groups:
        plain = optimizer.param_groups[0].get(key)
        if (
            plain is not None
            and float(plain)
            and float(group[key]) != float(plain)
            and len(its.param_groups) > 1
        ):
            group[key], matters = plain, True
    if not matters:
        return
    plain, shifted = train(net, optimizer, 20, 2), train(other, its, 20, 2)
    gap = max(float((a - b).abs().max()) for a, b in zip(plain, shifted, strict=True))
    assert gap > 1e-9


def test_a_shift_shows_in_the_weights_and_the_groups() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), 0.01, eps=1e-6, weight_decay=0.1)
    other, its = shift(net, optimizer, {"2.weight": 0.5}, 16.0)
    assert torch.allclose(other[2].parametrizations.weight.original, net[2].weight * 4)
    (moved,) = (g for g in its.param_groups if g["params"][0] is other[2].parametrizations.weight.original)
    assert (moved["lr"], moved["eps"], moved["weight_decay"]) == pytest.approx((0.04, 0.25e-6, 0.025))
    assert sum(len(group["params"]) for group in its.param_groups) == 6


def test_forms_of_one_parametrisation_are_shifts_of_each_other() -> None:
    """Readouts of μP for Adam: multiplier 1/n, or weights of size 1/n with a rate of 1/n."""
    assert Abc(1, 0, 0).shift(-1, "adam") == Abc(0, 1, 1)
    assert Abc(0.5, 0, 0).shift(-0.5, "sgd") == Abc(0, 0.5, 1)
    assert Abc(0, 0.5, 1).shift(0.3, "sgd").shift(-0.3, "sgd") == Abc(0, 0.5, 1)
    with pytest.raises(BadInput):
        Abc(0, 0, 0).shift(1, "lion")  # type: ignore[arg-type]


def test_what_is_not_known_is_refused() -> None:
    net = model()
    optimizer = SGD(net.parameters(), 0.1)
    with pytest.raises(Refused):
        shift(net, RMSprop(net.parameters()), THETA, WIDTH)
    for name in ("2.gain", "9.weight", "weight"):
        with pytest.raises(Refused):
            shift(net, optimizer, {name: 1.0}, WIDTH)
    with pytest.raises(Refused):
        shift(net, SGD([net[0].weight], 0.1), {"2.weight": 1.0}, WIDTH)
    for theta, width in ((float("nan"), 2.0), (1.0, 0.0)):
        with pytest.raises(BadInput):
            shift(net, optimizer, {"0.weight": theta}, width)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(Refused, match="2 uses"):
        shift(tied, SGD(tied.parameters(), 0.1), {"0.weight": 1.0}, WIDTH)
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(Refused):
        shift(normed, SGD(normed.parameters(), 0.1), {"0.weight": 1.0}, WIDTH)
