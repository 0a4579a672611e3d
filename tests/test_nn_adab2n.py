"""AdaB2N against the authors' runs over three tasks, and by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from norm_steps import golden, load, near, randn, same_state
from regauge.errors import BadInput, Refused
from regauge.nn.adab2n import AdaB2N1d, AdaB2N2d, end_task, set_tasks

GOLDEN = golden("adab2n")
RUNS = ("kappa_0.0", "kappa_0.4", "kappa_1.0")
PARAMETERS = ("weight", "bias", "task_weight")


def names(name: str) -> str:
    return "current" if name == "cur_tasks" else name


def layer_of(case: dict[str, Any]) -> AdaB2N2d:
    config = case["config"]
    layer = AdaB2N2d(
        config["num_features"],
        config["num_tasks"],
        config["kappa"],
        config["eps"],
        config["momentum"],
        absent_share=True,
        dtype=torch.float64,
    )
    load(layer, case["init"], names)
    return layer


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_the_authors(name: str) -> None:
    """Step 7 has samples of the last task only: the authors' shares then do not add up to 1."""
    case = GOLDEN[name]
    layer = layer_of(case)
    for number, step in enumerate(case["steps"]):
        what = f"step {number}"
        if int(layer.current) < step["cur_tasks"]:
            layer.end_task()
        same_state(layer, step["state_before"], names, what)
        layer.zero_grad()
        if step["counts"] is not None:
            layer.set_tasks(step["counts"]["sample_task_indices"])
        x = step["x"].clone().requires_grad_()
        y = layer(x)
        near(y, step["y"], what)
        near(layer.loss, torch.as_tensor(step["norm_loss"]), f"{what}: loss")
        ((y * step["grad_out"]).sum() + case["config"]["lambd_in_loss"] * layer.loss).backward()
        near(x.grad, step["grad_x"], f"{what}: x")
        for parameter in PARAMETERS:
            own, wanted = layer.get_parameter(parameter), step[f"grad_{parameter}"]
            if wanted is None:
                assert own.grad is None
            else:
                near(own.grad, wanted, f"{what}: {parameter}")
        for buffer, value in step["state_after"].items():
            if names(buffer) in dict(layer.named_buffers()):
                near(layer.get_buffer(names(buffer)), value, f"after {what}: {buffer}")
        if step["last_eta_after"] is not None:
            assert float(layer.rate()) == pytest.approx(step["last_eta_after"], rel=1e-12)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    parameter -= case["config"]["lr"] * parameter.grad
    layer.eval()
    same_state(layer, case["eval"]["state"], names, "at the end")
    near(layer(case["eval"]["x"]), case["eval"]["y"], "evaluation")
    near(layer.fold()(case["eval"]["x"]), case["eval"]["y"], "folded")
    assert layer.loss is None


@pytest.mark.parametrize("kappa", [0.1, 0.4, 0.7])
def test_rates_are_those_of_the_authors(kappa: float) -> None:
    """Theirs is kept as a number that no state holds; here it follows from the count of steps."""
    layer = AdaB2N2d(2, kappa=kappa, dtype=torch.float64)
    for wanted in GOLDEN[f"eta_schedule_kappa_{kappa}"]:
        layer.num_batches_tracked.add_(1)
        assert float(layer.rate()) == pytest.approx(wanted, rel=1e-12)


def test_the_rate_is_that_of_an_average_at_0_and_of_the_momentum_at_1() -> None:
    for step in (1, 2, 50):
        for kappa, wanted in ((0.0, 1 / step), (1e-9, 1 / step), (1.0, 0.1)):
            layer = AdaB2N2d(2, kappa=kappa, dtype=torch.float64)
            layer.num_batches_tracked.fill_(step)
            assert float(layer.rate()) == pytest.approx(wanted, rel=1e-6)


def test_present_tasks_share_all_of_the_weight() -> None:
    """x → x + a changes nothing, absent task or not, unless its share is kept as published."""
    x, tasks = randn(6, 3, 2, 2), torch.full((6,), 1)
    outputs = {}
    for absent_share in (False, True):
        layer = AdaB2N2d(3, 2, absent_share=absent_share, dtype=torch.float64)
        layer.end_task()
        for shift in (0.0, 5.0):
            layer.set_tasks(tasks)
            outputs[absent_share, shift] = layer(x + shift)
    assert torch.allclose(outputs[False, 0.0], outputs[False, 5.0], rtol=0, atol=1e-12)
    assert not torch.allclose(outputs[True, 0.0], outputs[True, 5.0], rtol=0, atol=0.1)


def test_tasks_serve_for_one_call() -> None:
    layer = AdaB2N2d(3, 2, dtype=torch.float64)
    layer.end_task()
    with torch.no_grad():
        layer.task_weight.copy_(torch.tensor([3.0, -1.0]))
    x = randn(6, 3, 2, 2)
    layer.set_tasks(torch.tensor([0, 0, 1, 1, 1, 1]))
    weighted, plain = layer(x), layer(x)
    assert not torch.allclose(weighted, plain, rtol=0, atol=0.01)
    batch = nn.BatchNorm2d(3, dtype=torch.float64)
    assert torch.allclose(plain, batch(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 5)])
def test_one_axis_or_none_of_space(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    assert torch.allclose(
        AdaB2N1d(4, dtype=torch.float64)(x), nn.BatchNorm1d(4, dtype=torch.float64)(x), atol=1e-12
    )
    with pytest.raises(BadInput, match="axes"):
        AdaB2N2d(4)(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_becomes_one(training: bool) -> None:
    batch = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(batch.parameters()):
            parameter.copy_(randn(4, seed=number))
    for number in range(3):
        batch(2 + randn(6, 4, 3, 3, seed=number))
    batch.train(training)
    layer = AdaB2N2d.upgrade_from(batch, tasks=5, kappa=0.4)
    assert (layer.training, layer.momentum, layer.tasks) == (training, 0.2, 5)
    x = randn(3, 4, 2, 2, seed=9)
    assert torch.allclose(layer(x), batch(x), rtol=0, atol=1e-12)


def test_a_layer_with_a_loss_is_copied() -> None:
    layer = AdaB2N2d(3)
    layer(torch.randn(4, 3, 2, 2))
    assert layer.loss is not None
    assert copy.deepcopy(layer).loss is None


def test_what_is_refused() -> None:
    model = nn.Sequential(AdaB2N2d(3, 2), nn.ReLU(), AdaB2N2d(3, 2))
    with pytest.raises(BadInput, match="not begun"):
        set_tasks(model, torch.tensor([0, 1]))
    end_task(model)
    set_tasks(model, torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="no further task"):
        end_task(model)
    with pytest.raises(Refused, match="training mode"):
        model[0].fold()
    with pytest.raises(Refused, match="cannot become"):
        AdaB2N2d.upgrade_from(nn.LayerNorm(3))
    with pytest.raises(Refused, match="another eps"):
        AdaB2N2d.upgrade_from(nn.BatchNorm2d(3), eps=1e-2)
    with pytest.raises(BadInput, match="out of range"):
        AdaB2N2d(3, kappa=1.5)
