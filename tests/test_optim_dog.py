"""DoG, LDoG and the average of iterates: the authors' values, and what every optimizer keeps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optim_laws import check_laws
from regauge.errors import BadInput
from regauge.optim import DoG, LDoG, PolynomialAverage

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "dog_golden.pt", weights_only=True)
GROUPS = (("conv", "gamma"), ("lin_ln", "lin", "bias"))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["dog", "dog_decay", "dog_eta", "ldog", "ldog_decay", "ldog_eta"])
def test_the_authors_values(name: str, foreach: bool) -> None:
    held = GOLDEN[name]
    params = {key: nn.Parameter(value.clone()) for key, value in GOLDEN["init"].items()}
    make = LDoG if name.startswith("l") else DoG
    optimizer = make(
        [{"params": [params[key] for key in keys]} for keys in GROUPS], foreach=foreach, **held["config"]
    )
    for step in held["steps"]:
        for key, param in params.items():
            param.grad = step["grads"][key].clone()
        optimizer.step()
        for key, param in params.items():
            assert float((param.detach() - step["params"][key]).abs().max()) < 1e-12
            assert torch.equal(param.grad, step["grads"][key])
        for group, distance, squares in zip(optimizer.param_groups, step["rbar"], step["G"], strict=True):
            assert torch.allclose(group["distance"], distance, rtol=1e-12, atol=0)
            assert torch.allclose(group["squares"], squares, rtol=1e-12, atol=0)


def test_two_steps_by_hand() -> None:
    """x₀ = (3, 4): r₀ = 0.1 · 6. After g = (2, 0): x₁ = (3 − 0.6, 4). Then r = 0.6 still, G = 4 + 9."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = DoG([w], reps_rel=0.1, eps=1e-300)
    w.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx([2.4, 4.0], abs=1e-15)
    w.grad = torch.tensor([0.0, 3.0], dtype=torch.float64)
    optimizer.step()
    assert w.tolist() == pytest.approx([2.4, 4.0 - 3 * 0.6 / math.sqrt(13)], abs=1e-15)
    w.grad = torch.tensor([0.0, 0.0], dtype=torch.float64)
    optimizer.step()
    away = math.hypot(0.6, 1.8 / math.sqrt(13))
    assert float(optimizer.param_groups[0]["distance"]) == pytest.approx(away, abs=1e-15)


@pytest.mark.parametrize("make", [DoG, LDoG])
def test_laws(make: Any) -> None:
    check_laws(make, reps_rel=0.05)
    check_laws(make, reps_rel=0.05, weight_decay=0.1)
    check_laws(make, init_eta=0.05)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_gradient_that_comes_late(foreach: bool) -> None:
    """Where it is None a parameter counts in ‖x₀‖ as if its gradient were zero."""

    def made(zero: bool) -> list[float]:
        a, b = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (3.0, 4.0))
        optimizer = DoG([a, b], reps_rel=0.1, foreach=foreach)
        for step in range(4):
            a.grad = torch.ones_like(a)
            b.grad = torch.ones_like(b) if step > 1 else torch.zeros_like(b) if zero else None
            optimizer.step()
        return [float(a), float(b)]

    assert made(zero=False) == made(zero=True)


def test_numbers_out_of_range() -> None:
    for options in ({"reps_rel": 0}, {"lr": 0}, {"weight_decay": -1}, {"init_eta": 0}, {"eps": 0}):
        with pytest.raises(BadInput, match="range"):
            DoG([nn.Parameter(torch.ones(2))], **options)


# --- the average ---------------------------------------------------------------------------------------


def test_the_authors_average() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = PolynomialAverage(model, GOLDEN["averager"]["gamma"])
    for index, step in enumerate(GOLDEN["averager"]["steps"]):
        model.load_state_dict(step["model"])
        average.step()
        for name, value in average.model.state_dict().items():
            assert float((value - step["average"][name]).abs().max()) < 1e-12
        if index == 2:  # stopped, and taken up again
            saved = copy.deepcopy(average.state_dict())
            average = PolynomialAverage(model, GOLDEN["averager"]["gamma"])
            average.load_state_dict(saved)


def test_gamma_zero_is_the_mean() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = PolynomialAverage(model, 0.0)
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(model.weight, value)
        average.step()
    assert float(average.model.weight) == pytest.approx(3.0)
    with pytest.raises(BadInput, match="gamma"):
        PolynomialAverage(model, -1)
