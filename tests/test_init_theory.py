"""Second moments at initialisation, layer by layer: predicted, and measured in wide layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regauge.errors import Refused
from regauge.nn import init
from regauge.nn.init.theory import Linear, Pointwise, Residual, Scale
from regauge.param import unit_scaling

WIDTH, BATCH, DEPTH = 384, 64, 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Act(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def chain(function: Callable, fill: Callable[..., object], seed: int) -> nn.Sequential:
    """Linear, f, …, Linear, drawn by ``fill(weight, first, generator)``."""
    random = seeded(seed)
    layers: list[nn.Module] = []
    for k in range(DEPTH):
        linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        fill(linear.weight, k == 0, random)
        layers += [linear, Act(function)] if k < DEPTH - 1 else [linear]
    return nn.Sequential(*layers)


def inputs(mean: float = 0.5) -> torch.Tensor:
    return mean + torch.randn(BATCH, WIDTH, generator=seeded(1234), dtype=torch.float64)


def relative(model: nn.Sequential, predicted: tuple[float, ...], x: torch.Tensor) -> list[float]:
    found = init.measure(model, x)
    return [found[str(k)].square / value - 1 for k, value in enumerate(predicted)]


RULES: dict[str, tuple[Callable, Callable, Callable[[bool], float]]] = {
    "he": (
        torch.relu,
        lambda w, first, g: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g),
        lambda first: 2 / WIDTH,
    ),
    "xavier_with_the_right_gain": (
        torch.tanh,
        lambda w, first, g: nn.init.xavier_normal_(w, init.gain(torch.tanh), generator=g),
        lambda first: init.gain(torch.tanh) ** 2 / WIDTH,
    ),
    "xavier_with_torch_gain": (
        torch.tanh,
        lambda w, first, g: nn.init.xavier_normal_(w, nn.init.calculate_gain("tanh"), generator=g),
        lambda first: 25 / 9 / WIDTH,
    ),
    "vi3nr_gelu": (
        F.gelu,
        lambda w, first, g: init.vi3nr_(
            w, None if first else F.gelu, 0.8, square=1.25 if first else None, generator=g
        ),
        lambda first: 0.64 / 1.25 / WIDTH if first else init.gain(F.gelu, 0.8) ** 2 / WIDTH,
    ),
    "vi3nr_sin": (
        lambda z: torch.sin(30 * z),
        lambda w, first, g: init.vi3nr_(
            w,
            None if first else lambda z: torch.sin(30 * z),
            square=1.25 if first else None,
            generator=g,
        ),
        lambda first: (1 / 1.25 if first else 2.0) / WIDTH,
    ),
    "vi3nr_sigmoid": (
        torch.sigmoid,
        lambda w, first, g: init.vi3nr_(
            w, None if first else torch.sigmoid, square=1.25 if first else None, generator=g
        ),
        lambda first: 1 / 1.25 / WIDTH if first else init.gain(torch.sigmoid) ** 2 / WIDTH,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_moments_are_those_predicted_in_every_layer(name: str) -> None:
    function, fill, variance = RULES[name]
    x = inputs()
    steps = [
        Linear(WIDTH, variance(k == 0)) if k % 2 == 0 else Pointwise(function) for k in range(2 * DEPTH - 1)
    ]
    predicted = init.predict(steps, 1.25)
    errors = [relative(chain(function, fill, seed), predicted, x) for seed in range(6)]
    assert max(abs(sum(parts) / len(parts)) for parts in zip(*errors, strict=True)) < 0.08
    if name.startswith("vi3nr"):
        sigma = 0.8 if name == "vi3nr_gelu" else 1.0
        assert predicted[::2] == pytest.approx([sigma**2] * DEPTH, rel=1e-9)
    if name == "he":
        assert predicted[::2] == pytest.approx([2.5] * DEPTH, rel=1e-9)
    if name == "xavier_with_the_right_gain":
        # The input is no tanh(z): after the first layers the fixed point σ = 1 is near.
        assert abs(predicted[-1] - 1) < 0.2
    if name == "xavier_with_torch_gain":
        assert predicted[-1] > 1.1


def test_steps_of_a_model_use_the_weights_as_drawn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(64, 96, 3),
        nn.GELU(),
        nn.Conv2d(96, 64, 2),
    ).double()
    x = torch.randn(32, 3, 10, 10, generator=seeded(), dtype=torch.float64)
    steps = init.steps_of(model)
    assert [type(step) for step in steps] == [Linear, Pointwise, Linear, Pointwise, Linear]
    assert steps[0].inputs == 27
    assert max(map(abs, relative(model, init.predict(steps, 1.0), x))) < 0.15
    for bad in (nn.Softmax(-1), nn.LayerNorm(4), nn.Flatten(), nn.Conv1d(2, 2, 3, padding=1), nn.Dropout()):
        with pytest.raises(Refused):
            init.steps_of(nn.Sequential(bad))


class Block(nn.Module):
    """x + f(x), f of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


def test_fixup_starts_as_the_identity_with_branches_of_the_variance_predicted() -> None:
    model = nn.Sequential(*[Block() for _ in range(DEPTH)])
    blocks = [(block.a, block.b) for block in model]
    init.fixup_(blocks, mode="fan_in", generator=seeded())
    x = inputs(0.0)
    found = init.measure(model, x)
    square = found["0"].square
    for k in range(DEPTH):
        assert found[f"{k}.a"].square / square == pytest.approx(2 / DEPTH, rel=0.1)
        assert found[f"{k}.b"].square == 0
        assert found[str(k)].square == square
    # With He branches instead, the stream doubles in every block: 1 + 1·(2 · 1/2)·… is what theory says.
    random = seeded(3)
    for layer in (layer for block in blocks for layer in block):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=random)
    he = Linear(WIDTH, 2 / WIDTH)
    branch = (he, Pointwise(torch.relu), he)
    predicted = init.predict([Residual(branch)] * DEPTH, float(x.square().mean()), normal=True)
    assert predicted[-1] / float(x.square().mean()) == pytest.approx(3.0**DEPTH)
    assert max(map(abs, relative(model, predicted, x))) < 0.3


class UnitBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        random = seeded(4)
        self.layers = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64) for _ in range(DEPTH)
        )
        self.taps = nn.ModuleList(nn.Identity() for _ in range(2 * DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, w in enumerate(self.layers):
            x = self.taps[2 * k](unit_scaling.linear(x, w))
            x = self.taps[2 * k + 1](unit_scaling.gelu(x))
        return x


def test_unit_scaling_keeps_the_moments_predicted() -> None:
    model = UnitBlocks()
    factor = unit_scaling.gelu_scales()[0]
    steps = [Linear(WIDTH, 1 / WIDTH), Pointwise(F.gelu), Scale(factor)] * DEPTH
    predicted = init.predict(steps, 1.0)
    found = init.measure(model, inputs(0.0))
    for k in range(DEPTH):
        assert found[f"taps.{2 * k}"].square == pytest.approx(predicted[3 * k], rel=0.12)
        assert found[f"taps.{2 * k + 1}"].square == pytest.approx(predicted[3 * k + 2], rel=0.12)
    # The constant of GELU makes its variance one, not its second moment: the mean adds to each layer.
    z = torch.randn(400_000, generator=seeded(), dtype=torch.float64)
    assert float((factor * F.gelu(z)).std()) == pytest.approx(1, abs=0.05)
    assert predicted[2] == pytest.approx(float((factor * F.gelu(z)).square().mean()), rel=0.02)


def test_prediction_refuses_what_it_cannot_know() -> None:
    linear = Linear(4, 0.25)
    with pytest.raises(Refused):
        init.predict([Pointwise(torch.relu)], 1.0)
    with pytest.raises(Refused):
        init.predict([linear, Pointwise(torch.relu), Pointwise(torch.relu)], 1.0)
    with pytest.raises(Refused):
        init.predict([linear, Residual((linear, Pointwise(torch.relu)))], 1.0)
    weighted = Residual((linear, Scale(2.0)), skip=0.5, weight=3.0)
    assert init.predict([weighted], 1.0) == (0.25 + 9 * 4,)


def test_moments_count_all_calls() -> None:
    twice = nn.Sequential(layer := nn.Linear(3, 3), nn.Tanh(), layer)
    x = torch.randn(5, 3, generator=seeded())
    found = init.measure(twice, x)
    both = torch.cat([layer(x), twice(x)]).detach()
    assert found["0"].count == 30
    assert found["0"].mean == pytest.approx(float(both.mean()), rel=1e-5)
    assert found["0"].variance == pytest.approx(float(both.var(correction=0)), rel=1e-5)
    assert not layer._forward_hooks


# --- guessing bias ------------------------------------------------------------------------------------


def network(function: Callable, depth: int, classes: int) -> Callable[[torch.Generator], nn.Module]:
    def make(random: torch.Generator) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(200, 200, bias=False), Act(function)]
        model = nn.Sequential(*layers, nn.Linear(200, classes, bias=False))
        for p in model.parameters():
            init.vi3nr_(p, function, generator=random)
        return model

    return make


@pytest.mark.parametrize(("function", "depth"), [(torch.relu, 1), (torch.relu, 2), (torch.tanh, 1)])
def test_guessing_bias_of_two_classes_has_the_spread_predicted(function: Callable, depth: int) -> None:
    x = torch.randn(300, 200, generator=seeded(9))
    shares = init.guessing_bias(network(function, depth, 2), x, range(200))
    assert shares.shape == (200, 2)
    assert torch.equal(shares.sum(1), torch.ones(200, dtype=torch.float64))
    rho = 0.0
    for _ in range(depth):
        rho = init.correlation(function, rho)
    sampling = 0.25 / 300
    predicted = math.sqrt(init.binary_spread(rho) ** 2 + sampling)
    assert float(shares[:, 0].std()) == pytest.approx(predicted, rel=0.15)
    assert float(shares[:, 0].mean()) == pytest.approx(0.5, abs=4 * predicted / math.sqrt(200))


def test_correlation_of_relu_is_the_arc_cosine_kernel() -> None:
    for rho in (0.0, 0.3, 0.9, 1.0):
        angle = math.acos(rho)
        exact = (math.sin(angle) + (math.pi - angle) * rho) / math.pi
        assert init.correlation(torch.relu, rho) == pytest.approx(exact, abs=1e-5)
    assert init.correlation(torch.tanh, 0.0) == pytest.approx(0, abs=1e-20)


def test_guesses_count_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 0, 0], [0, 0, 5], [0, 0, 1], [2, 1, 0]])
    assert init.guesses(lambda x: x, logits).tolist() == [0.5, 0, 0.5]
    assert init.binary_spread(1.0) == pytest.approx(0.5)
    assert init.binary_spread(0.0) == 0
