"""What a report says of activations: both models run in float32 on the same random inputs, with hooks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from regauge.api import load
from regauge.errors import BadInput
from regauge.hf import load_meta
from regauge.report.figures import Spread, gram_error, relative_error, spread_of

BATCH, LENGTH = 2, 48
POSITIONS = 128
"""Positions of a module's output that are kept for the errors, evenly chosen; of outputs of the model all."""


@dataclass(frozen=True)
class Activation:
    """What one module returned (the first tensor of it).

    Attributes:
        name: path of the module; of a further call with ``#2`` and so on behind it.
        shape: shape of the tensor.
        before, after: how its entries spread, over all entries; ``before`` is None without a source, or
            if the source has no such module.
        error: ``‖before − after‖ / ‖before‖``; None where shapes differ.
        turned: the same up to an orthogonal map along one axis, the smallest over the axes; see
            :func:`regauge.report.figures.gram_error`.
    """

    name: str
    shape: tuple[int, ...]
    before: Spread | None
    after: Spread
    error: float | None
    turned: float | None


@dataclass(frozen=True)
class Output:
    """One output of the model.

    Attributes:
        name: its field.
        shape: its shape.
        function: whether it is part of the function that the certificate is about; coordinates of other
            outputs (hidden states) may move.
        error: ``‖before − after‖ / ‖before‖`` over all entries, run in float32; None without a source.
    """

    name: str
    shape: tuple[int, ...]
    function: bool
    error: float | None


@dataclass
class _Run:
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    samples: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def activations(
    after: Path, before: Path | None, seed: int, tell: Callable[[int, int], None]
) -> tuple[tuple[Activation, ...], tuple[Output, ...], dict[str, tuple[int, ...]]]:
    """Run the models and compare every module with the one at the same path.

    Args:
        after, before: directories; ``before`` may be None.
        seed: of the inputs.
        tell: called with (models run, models to run).

    Returns:
        modules in the order they return, outputs, and the shapes of the inputs by name.

    Raises:
        BadInput: a directory that transformers cannot load or run.
    """
    meta = load_meta(after, batch=BATCH, length=LENGTH)
    inputs = {
        name: value.float() if value.is_floating_point() else value
        for name, value in meta.real_inputs(batch=BATCH, length=LENGTH, seed=seed).items()
    }
    tell(0, 1 + (before is not None))
    new = _run(after, inputs)
    old = None
    if before is not None:
        tell(1, 2)
        old = _run(before, inputs)
    modules = tuple(
        Activation(
            name,
            new.shapes[name],
            None if old is None else old.spreads.get(name),
            new.spreads[name],
            *_errors(old, new, name),
        )
        for name in new.spreads
    )
    outputs = tuple(
        Output(
            name,
            tuple(value.shape),
            name == "logits" or "logits" not in new.outputs,
            relative_error(old.outputs[name], value)
            if old is not None and name in old.outputs and old.outputs[name].shape == value.shape
            else None,
        )
        for name, value in new.outputs.items()
    )
    return modules, outputs, {name: tuple(value.shape) for name, value in inputs.items()}


def _errors(old: _Run | None, new: _Run, name: str) -> tuple[float | None, float | None]:
    if old is None or name not in old.samples:
        return None, None
    a, b = old.samples[name], new.samples[name]
    last = len(new.shapes[name]) - 1
    same = old.shapes[name] == new.shapes[name]
    error = relative_error(a[last], b[last]) if same else None
    turned = [gram_error(a[axis], b[axis]) for axis in a if axis in b and len(a[axis]) == len(b[axis])]
    return error, min((value for value in turned if value is not None), default=None)


def _run(directory: Path, inputs: Mapping[str, torch.Tensor]) -> _Run:
    found, calls = _Run(), dict[str, int]()

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def record(_module: Any, _args: Any, value: Any) -> None:
            tensor = _first(value)
            if tensor is None or tensor.dim() == 0 or tensor.numel() == 0:
                return
            calls[name] = calls.get(name, 0) + 1
            key = name if calls[name] == 1 else f"{name}#{calls[name]}"
            found.shapes[key] = tuple(tensor.shape)
            found.spreads[key] = spread_of(tensor)
            found.samples[key] = sampled(tensor)

        return record

    try:
        with _quiet(), torch.no_grad():
            model: nn.Module = load(directory, dtype=torch.float32).train(False)
            handles = [
                module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name
            ]
            uncached = (
                {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
            )
            value = model(**inputs, **uncached)
            for handle in handles:
                handle.remove()
    except (ImportError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise BadInput(
            f"{directory} cannot be loaded and run",
            found=f"{type(error).__name__}: {first}",
            way_out="check that transformers loads it; leave out what was changed by hand",
        ) from error
    found.outputs = {name: tensor for name, tensor in _fields(value) if tensor.is_floating_point()}
    return found


@contextmanager
def _quiet() -> Generator[None]:
    """No warnings, log lines and progress bars of transformers; as before afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _fields(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    items = value.items() if isinstance(value, Mapping) else [("output", _first(value))]
    return ((str(name), item) for name, item in items if isinstance(item, torch.Tensor))


def _first(value: Any) -> torch.Tensor | None:
    """The value itself, or the first tensor of a tuple; a module that returns a mapping is no layer."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def sampled(tensor: torch.Tensor) -> dict[int, torch.Tensor]:
    """Axis -> (at most 128 positions, features along that axis), for every axis but the batch."""
    found: dict[int, torch.Tensor] = {}
    for axis in range(min(1, tensor.dim() - 1), tensor.dim()):
        rows = tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])
        count = min(len(rows), POSITIONS)
        index = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()
        found[axis] = rows[index].clone()
    return found
