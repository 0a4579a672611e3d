"""The second moment of every layer at initialisation: as mean-field theory has it, and as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput, Refused
from regauge.nn.init import gaussian
from regauge.nn.init.gaussian import Function
from regauge.nn.init.weights import is_convolution, is_linear, linear_weight


@dataclass(frozen=True)
class Linear:
    """y = W x + b with independent entries of mean zero: E y² = n · Var W · E x² + Var b, and y is normal.

    Attributes:
        inputs: n, summands of one output: in · ∏ kernel.
        variance: Var W.
        bias: Var b.
    """

    inputs: int
    variance: float
    bias: float = 0.0


@dataclass(frozen=True)
class Pointwise:
    """y = f(x), entry by entry: E y² = E f(z)², z ~ N(0, E x²)."""

    function: Function


@dataclass(frozen=True)
class Scale:
    """y = s · x."""

    factor: float


@dataclass(frozen=True)
class Residual:
    """y = s · x + a · f(x), f independent of x and of mean zero: E y² = s² E x² + a² E f².

    Attributes:
        branch: the steps of f; the last one that is not a scale must be linear.
        skip: s.
        weight: a.
    """

    branch: tuple[Step, ...]
    skip: float = 1.0
    weight: float = 1.0


Step = Linear | Pointwise | Scale | Residual


def predict(steps: Sequence[Step], square: float, *, normal: bool = False) -> tuple[float, ...]:
    """E y² after every step, from E x² of the input, in the limit of wide layers.

    Source: Poole et al., Exponential Expressivity in Deep Neural Networks through Transient Chaos (arXiv
    1606.05340, equation 3), with a sum for residual branches.

    Args:
        steps: in order; the inside of a residual branch is not listed in the result.
        square: E x² of the input.
        normal: whether the input is normal with mean zero, which a pointwise function needs.

    Raises:
        Refused: a pointwise function of something not normal, or a branch that does not end linear.
        BadInput: a negative or infinite moment.
    """
    if not (math.isfinite(square) and square >= 0):
        raise BadInput("no such second moment", expected="E x² ≥ 0", found=str(square))
    found: list[float] = []
    for step in steps:
        square, normal = _after(step, square, normal)
        found.append(square)
    return tuple(found)


def _after(step: Step, square: float, normal: bool) -> tuple[float, bool]:
    if isinstance(step, Linear):
        return step.inputs * step.variance * square + step.bias, True
    if isinstance(step, Scale):
        return step.factor**2 * square, normal
    if isinstance(step, Pointwise):
        if not normal:
            raise Refused(
                "the distribution before this function is not known",
                expected="a linear layer, or a sum after one, before it",
                found="the input, or another function",
            )
        function = step.function
        if square == 0:
            return float(function(torch.zeros(1, dtype=torch.float64)).square()), False
        return gaussian.mean(lambda z: function(z).square(), math.sqrt(square)), False
    inner, ends = square, normal
    for part in step.branch:
        inner, ends = _after(part, inner, ends)
    linear = [part for part in step.branch if not isinstance(part, Scale)][-1:]
    if not linear or not isinstance(linear[0], Linear):
        raise Refused(
            "the branch is not independent of what it is added to",
            expected="a linear layer with weights of mean zero at its end",
            found="another step",
        )
    return step.skip**2 * square + step.weight**2 * inner, normal


def steps_of(chain: nn.Sequential) -> tuple[Step, ...]:
    """One step for each module of a chain, with Var W and Var b as the mean squares of what is drawn.

    Linear maps and convolutions are known by the function they run; a module without parameters is a
    pointwise function if each of its outputs depends on the entry at its own place only, in the same way for
    all.

    Raises:
        Refused: another module; or a convolution padded with zeros, whose border has less variance.
    """
    return tuple(_step(name, module) for name, module in chain.named_children())


def _step(name: str, module: nn.Module) -> Step:
    if is_linear(module) or is_convolution(module):
        if is_convolution(module) and getattr(module, "padding_mode", "") == "zeros" and _padded(module):
            raise Refused(
                "positions at the border have less variance than others",
                node=name,
                expected="no padding, or a circular one",
                found="padding with zeros",
            )
        weight, bias = linear_weight(module)
        exact = weight.detach().to(torch.float64)
        shift = 0.0 if bias is None else float(bias.detach().to(torch.float64).square().mean())
        return Linear(exact[0].numel(), float(exact.square().mean()), shift)
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        function = _pointwise(module)
        if function is not None:
            return Pointwise(function)
    raise Refused(
        "this module is neither linear nor a function of single entries",
        node=name,
        expected="nn.Linear, nn.Conv1d to nn.Conv3d, or an activation function",
        found=type(module).__name__,
        way_out="write the steps yourself",
    )


def _padded(module: nn.Module) -> bool:
    padding = getattr(module, "padding", 0)
    return padding != "valid" and any(padding) if not isinstance(padding, int) else bool(padding)


def _pointwise(module: nn.Module) -> Function | None:
    """The module as a function, if a number gives the same alone, elsewhere, and among others."""
    x = torch.linspace(-3, 3, 24, dtype=torch.float64)
    try:
        whole, again = module(x.reshape(2, 3, 4)), module(x.reshape(2, 3, 4))
        moved = module(x.flip(0).reshape(2, 3, 4)).reshape(-1).flip(0)
        alone = torch.cat([module(value.reshape(1, 1, 1)).reshape(-1) for value in x])
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    parts = (whole.reshape(-1), again.reshape(-1), moved)
    same = whole.shape == (2, 3, 4) and all(torch.equal(part, alone) for part in parts)
    return (lambda z: module(z)) if same else None


@dataclass(frozen=True)
class Moments:
    """Of all entries of what a module gave, over all its calls, in float64.

    Attributes:
        mean: E y.
        square: E y².
        variance: E y² − (E y)².
        count: entries.
    """

    mean: float
    square: float
    variance: float
    count: int


def measure(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, Moments]:
    """Path of a module -> moments of its output, for every module that returns one floating tensor.

    The model is run once, without gradients, in the mode it is in; it is left as it is, apart from buffers it
    updates itself. The model's own output has the path "".

    Args:
        model: any module.
        inputs, options: what it is called with.
    """
    sums: dict[str, list[float]] = {}

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                y = output.detach().to(torch.float64)
                entry = sums.setdefault(path, [0.0, 0.0, 0.0])
                parts = float(y.sum()), float(y.square().sum()), float(y.numel())
                sums[path] = [a + b for a, b in zip(entry, parts, strict=True)]

        return add

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Moments] = {}
    for path, (total, squares, count) in sums.items():
        mean, square = total / count, squares / count
        found[path] = Moments(mean, square, square - mean**2, int(count))
    return found
