"""Means over processes: two with half of a batch each are one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from norm_steps import near, randn
from regauge.errors import BadInput
from regauge.nn.adab2n import AdaB2N2d
from regauge.nn.evonorm import EvoNormB0
from regauge.nn.powernorm import PowerNorm
from regauge.nn.repbn import PRepBN, RepBN
from regauge.nn.statistics import kept, position_mean, upcast
from regauge.nn.unified import UnifiedNorm

F64 = torch.float64
LAYERS = {
    "powernorm": lambda: PowerNorm(6, 2, warmup=2, dtype=F64),
    "unified": lambda: UnifiedNorm(6, (2, 3), 2, True, dtype=F64),
    "repbn": lambda: RepBN(6, dtype=F64),
    "prepbn": lambda: PRepBN(6, warm=1, steps=6, dtype=F64),
    "adab2n": lambda: AdaB2N2d(6, 2, 0.4, dtype=F64),
    "evonorm-b0": lambda: EvoNormB0(6, dtype=F64),
    "alone": lambda: RepBN(6, synchronize=False, dtype=F64),
}
IMAGES = ("adab2n", "evonorm-b0")


def run(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Four steps on a share of each batch: outputs, gradients and the state."""
    layer = LAYERS[name]()
    found: dict[str, torch.Tensor] = {}
    if name == "adab2n":
        layer.end_task()
    for number in range(4):
        shape = (6, 6, 4, 3) if name in IMAGES else (6, 5, 6)
        share = slice(rank * 6 // world, (rank + 1) * 6 // world)
        x = (randn(*shape, seed=number) + torch.arange(6.0).reshape(6, *(1,) * (len(shape) - 1)))[share]
        x = x.clone().requires_grad_()
        if name == "adab2n":
            layer.set_tasks(torch.tensor([0, 1, 1, 1, 1, 0])[share])
            y = layer(x)
        elif name in IMAGES:
            y = layer(x)
        else:
            pad = torch.zeros(6, 5, dtype=torch.bool)
            pad[0, 2:], pad[4, 4:] = True, True
            y = layer(x, pad[share])
        layer.zero_grad()
        (y * randn(*shape, seed=50 + number)[share]).sum().backward()
        found[f"y{number}"], found[f"x{number}"] = y.detach(), x.grad
        for key, parameter in layer.named_parameters():
            if parameter.grad is not None:
                found[f"{key}{number}"] = parameter.grad.clone()
    return {**found, **{f"state.{key}": value for key, value in layer.state_dict().items()}}


def serve(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({name: run(name, rank, 2) for name in LAYERS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    code = "import sys, test_nn_statistics as tests; tests.serve(int(sys.argv[1]), sys.argv[2])"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(100) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "alone"])
def test_two_processes_are_one(name: str, halves: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    """Outputs and gradients of x in two halves, those of parameters in two summands, equal states.

    ``task_weight`` takes part in what is summed over processes, and has its part of the gradient in each.
    """
    whole, (first, second) = run(name, 0, 1), (half[name] for half in halves)
    assert set(whole) == set(first) == set(second)
    for key, wanted in whole.items():
        if key.startswith("state."):
            near(first[key], wanted, key)
            near(second[key], wanted, key)
        elif key[:-1] in ("x", "y"):
            near(torch.cat((first[key], second[key])), wanted, key)
        else:
            near(first[key] + second[key], wanted, key)


def test_a_layer_can_be_kept_to_its_process(halves: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    states = [half["alone"]["state.running_mean"] for half in halves]
    assert not torch.allclose(*states, rtol=0, atol=0.1)
    assert torch.equal(halves[0]["alone"]["y0"], run("alone", 0, 2)["y0"])


def test_means_over_positions() -> None:
    x, pad = randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.bool)
    pad[1, 1:] = True
    mean, count = position_mean(x, kept(x, pad))
    near(mean, x[~pad].mean(0), "mean")
    assert count == 9
    near(position_mean(x)[0], x.mean((0, 1)), "all")
    nothing, count = position_mean(x, kept(x, torch.ones(3, 4)))
    assert count == 1
    assert not nothing.any()
    with pytest.raises(BadInput, match="mask"):
        kept(x, pad.T)
    assert upcast(x.bfloat16()).dtype == torch.float32
    assert upcast(x).dtype == torch.float64
