"""What the tests of layers with running statistics share: recorded training steps, and two of them split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, Any]:
    return torch.load(DATA / f"{name}_golden.pt", weights_only=True)


def near(found: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float | None = None) -> None:
    """Within 1e-12 in float64 and 1e-5 in float32, relative to the largest entry."""
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    if not found.dtype.is_floating_point:
        assert torch.equal(found, wanted), (what, found, wanted)
        return
    tolerance = tolerance or (1e-12 if wanted.dtype == torch.float64 else 1e-5)
    scale = max(1.0, wanted.abs().max().item())
    error = (found - wanted).abs().max().item() / scale
    assert error <= tolerance, (what, error)


def load(layer: nn.Module, state: dict[str, torch.Tensor], names: Callable[[str], str | None]) -> None:
    """The recorded state, in the shapes of the layer; ``names`` gives a tensor's name here, None for none."""
    own = layer.state_dict()
    renamed = {names(name): value for name, value in state.items()}
    renamed.pop(None, None)
    assert set(renamed) == set(own)
    layer.load_state_dict({name: value.reshape(own[name].shape) for name, value in renamed.items()})


def same_state(
    layer: nn.Module, state: dict[str, torch.Tensor], names: Callable[[str], str | None], what: str
) -> None:
    own = layer.state_dict()
    for name, value in state.items():
        if names(name) is not None:
            near(own[names(name)], value.reshape(own[names(name)].shape), f"{what}: {name}")


Names = Callable[[str], "str | None"]
Step = dict[str, Any]


def check_steps(
    layer: nn.Module,
    case: dict[str, Any],
    names: Names,
    call: Callable[[Step, torch.Tensor], torch.Tensor],
    after: Callable[[int], None] = lambda number: None,
    tolerance: float | None = None,
) -> None:
    """Outputs, gradients and states of a recorded run, its parameters moved by plain gradient descent.

    Args:
        call: the layer's output for a step and its x.
        after: called after each step.
    """
    for number, step in enumerate(case["steps"]):
        what = f"step {number}"
        same_state(layer, step["state_before"], names, what)
        layer.zero_grad()
        x = step["x"].clone().requires_grad_()
        y = call(step, x)
        near(y, step["y"], what, tolerance)
        y.backward(step["grad_out"])
        near(x.grad, step["grad_x"], f"{what}: x", tolerance)
        grads = step.get("grads") or {key: step[f"grad_{key}"] for key in ("weight", "bias")}
        for name, gradient in grads.items():
            own = layer.get_parameter(names(name))
            # A parameter that took no part has no gradient there; a zero says the same.
            wanted = torch.zeros_like(own) if gradient is None else gradient.reshape(own.shape)
            near(
                torch.zeros_like(own) if own.grad is None else own.grad, wanted, f"{what}: {name}", tolerance
            )
        buffers = {names(name) for name in step["state_after"]} & set(dict(layer.named_buffers()))
        for name, value in step["state_after"].items():
            if names(name) in buffers:
                own = layer.get_buffer(names(name))
                near(own, value.reshape(own.shape), f"after {what}: {name}", tolerance)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    parameter -= case["config"]["lr"] * parameter.grad
        after(number)
    layer.eval()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
