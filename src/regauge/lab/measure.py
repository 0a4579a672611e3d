"""What is looked at while a model trains."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def part(name: str) -> str:
    """The part of a model a parameter belongs to: the first component of its name, with its number if there
    is one."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def norms(named: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, float]:
    """Part -> Euclidean length of all its tensors together."""
    squares: dict[str, list[torch.Tensor]] = {}
    for name, tensor in named:
        if tensor is not None:
            squares.setdefault(part(name), []).append(tensor.detach().float().square().sum())
    totals = torch.stack([torch.stack(items).sum() for items in squares.values()]).sqrt().tolist()
    return dict(zip(squares, totals, strict=True))


def weight_norms(model: nn.Module) -> dict[str, float]:
    """Part -> length of its parameters with two or more axes."""
    return norms((name, p) for name, p in model.named_parameters() if p.dim() > 1)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Part -> length of the gradient."""
    return norms((name, p.grad) for name, p in model.named_parameters())


@contextmanager
def variances(layers: nn.ModuleList, wanted: bool = True) -> Generator[dict[str, float]]:
    """Layer -> variance of all entries of what it gives, filled by the calls inside the context."""
    found: dict[str, float] = {}

    def hook(index: int) -> Any:
        def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            del module, args
            found[f"layers.{index}"] = float(output.detach().float().var(correction=0))

        return note

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)] if wanted else []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Moments:
    """How much the second moment of a norm's input changes from batch to batch.

    m_t[c] is the mean of x[..., c]² over batch t. Reported for every norm is the mean over c of
    Var_t(m_t[c]) / (mean_t m_t[c])², over the batches since the last report.

    Args:
        model: its norms are watched while it is in training mode, until :meth:`close`.
        kinds: their classes.
        axis: of c.
    """

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...], axis: int) -> None:
        self.axis = axis
        self.count: dict[str, int] = {}
        self.mean: dict[str, torch.Tensor] = {}
        self.square: dict[str, torch.Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in model.named_modules()
            if isinstance(module, kinds)
        ]

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if module.training:
                x = args[0].detach().double().movedim(self.axis, -1)
                self._add(name, x.square().flatten(0, -2).mean(0))

        return note

    def _add(self, name: str, moment: torch.Tensor) -> None:
        """Welford's update."""
        count = self.count.get(name, 0) + 1
        mean = self.mean.get(name, torch.zeros_like(moment))
        square = self.square.get(name, torch.zeros_like(moment))
        apart = moment - mean
        mean = mean + apart / count
        self.count[name], self.mean[name] = count, mean
        self.square[name] = square + apart * (moment - mean)

    def report(self) -> dict[str, float]:
        """The figures since the last report, from two batches on; begins anew."""
        found: dict[str, float] = {}
        for name, count in self.count.items():
            if count > 1:
                ratio = self.square[name] / (count - 1) / self.mean[name].square()
                found[name] = float(ratio.mean())
        self.load_state_dict({"count": {}, "mean": {}, "square": {}})
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"count": dict(self.count), "mean": dict(self.mean), "square": dict(self.square)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.square = (dict(state[key]) for key in ("count", "mean", "square"))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def plain(value: Any) -> Any:
    """Plain data without numbers that JSON does not have: those become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
