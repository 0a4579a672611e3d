"""What every optimizer must keep, whatever its steps are."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regauge.errors import BadInput

Make = Callable[..., Optimizer]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range, sign: float = 1.0) -> None:
    """Steps on data that depend on the number of the step alone."""
    like = next(model.parameters())
    for step in steps:
        random = torch.Generator().manual_seed(step)
        x = torch.randn(8, 5, generator=random).to(like.dtype)
        y = torch.randint(3, (8,), generator=random)
        optimizer.zero_grad()
        (sign * nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor], within: float = 0.0) -> bool:
    return all(float((a[name] - b[name]).abs().max()) <= within for name in a)


def check_laws(make: Make, **options: Any) -> None:
    """``make(named_parameters, **options)``: the options maximize and foreach are given here."""
    runs: dict[Any, dict[str, Tensor]] = {}
    for foreach in (True, False, None):
        model = net()
        train(model, make(model.named_parameters(), foreach=foreach, **options), range(8))
        runs[foreach] = state(model)
    assert not equal(runs[True], state(net()), 1e-9)
    assert equal(runs[True], runs[False], 1e-14)
    assert equal(runs[True], runs[None])

    model = net()
    train(model, make(model.named_parameters(), maximize=True, **options), range(8), -1.0)
    assert equal(state(model), runs[None], 1e-14)

    for foreach in (True, False):  # stopped, written to a file, and taken up again
        model = net()
        first = make(model.named_parameters(), foreach=foreach, **options)
        train(model, first, range(4))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = net()
        again.load_state_dict(saved["model"])
        second = make(again.named_parameters(), foreach=foreach, **options)
        second.load_state_dict(saved["optimizer"])
        train(again, second, range(4, 8))
        assert equal(state(again), runs[foreach], 1e-15)
    _gradients(make, **options)


def _gradients(make: Make, **options: Any) -> None:
    """None is skipped, sparse is refused, a closure is called, bfloat16 stays so."""
    model = net()
    kept = copy.deepcopy(model[0].weight)
    optimizer = make(model.named_parameters(), **options)
    for foreach in (True, False):
        for group in optimizer.param_groups:
            group["foreach"] = foreach
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model[0].weight.grad = None
        before = model[3].weight.detach().clone()
        assert optimizer.step(lambda: 3.0) == 3.0
        assert torch.equal(model[0].weight, kept)
        assert not torch.equal(model[3].weight, before)
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient

    table = nn.Parameter(torch.ones(4, 3))
    optimizer = make([("table", table)], **options)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (4, 3), check_invariants=True)
    with pytest.raises(BadInput, match="sparse"):
        optimizer.step()

    model = net(torch.bfloat16)
    train(model, make(model.named_parameters(), **options), range(3))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
