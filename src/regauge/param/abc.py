"""The abc-parametrisation, and the gauge that moves scale between multiplier, initialisation and rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Adam, AdamW, Optimizer

from regauge.errors import BadInput, Refused

_SGD_STATE = {"momentum_buffer": 1}
_ADAM_STATE = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@dataclass(frozen=True)
class Abc:
    """W = n^{−a} w, w ~ N(0, n^{−2b}), learning rate η n^{−c}, n the width.

    Source: Yang, Hu, Tensor Programs IV (arXiv 2011.14522, section 3.1); for Adam, Yang et al., Tensor
    Programs V (arXiv 2203.03466, section J.2.1).
    """

    a: float
    b: float
    c: float

    def shift(self, theta: float, optimizer: Literal["sgd", "adam"]) -> Abc:
        """(a + θ, b − θ, c − 2θ) for SGD, (a + θ, b − θ, c − θ) for Adam: the same training.

        Raises:
            BadInput: another optimizer.
        """
        if optimizer not in ("sgd", "adam"):
            raise BadInput("no gauge is known", expected="sgd or adam", found=repr(optimizer))
        return Abc(self.a + theta, self.b - theta, self.c - (2 if optimizer == "sgd" else 1) * theta)


class Multiplier(nn.Module):
    """W = s · w."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return original * self.factor

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value / self.factor

    def extra_repr(self) -> str:
        return f"{self.factor}"


def shift(
    model: nn.Module, optimizer: Optimizer, theta: Mapping[str, float], width: float
) -> tuple[nn.Module, Optimizer]:
    """W = w → W = s · w', w' = w/s, s = n^{−θ}: the same function now and after every step of training.

    SGD: η/s², λ s², momentum × s. Adam: η/s, ε s, first moments × s, second × s², λ s² where decay is part of
    the gradient and λ s where it is decoupled (AdamW; the step is −η λ w). All else is homogeneous. Clipping
    of gradients is not: it sees gradients × s. Schedulers hold rates of their own: build them from the
    result.

    Source: as of :class:`Abc`; decay, ε and the state by the same algebra.

    Args:
        model: left as it is.
        optimizer: torch.optim.SGD, Adam or AdamW of its parameters, at any moment of a run; left as it is.
        theta: name of a parameter -> θ, which adds to earlier ones; other parameters stay.
        width: n.

    Returns:
        copies. A shifted parameter is parametrised (torch.nn.utils.parametrize), and has a group of its own
        if others of its group have another θ.

    Raises:
        Refused: another optimizer or unknown state of it, a name that is none, a parameter that is tied, not
            trained by the optimizer, or parametrised otherwise.
        BadInput: the width or an exponent is not finite, or the width not positive.
    """
    if not (math.isfinite(width) and width > 0 and all(math.isfinite(value) for value in theta.values())):
        raise BadInput("no such shift", expected="a positive width, finite exponents", found=str(width))
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise Refused(
            "the gauge of this optimizer is not known",
            expected="torch.optim.SGD, Adam or AdamW",
            found=type(optimizer).__name__,
        )
    model, optimizer = copy.deepcopy((model, optimizer))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors: dict[int, float] = {}
    for name, value in theta.items():
        factor = width**-value
        parameter = _scaled(model, name, factor, trained)
        factors[id(parameter)] = factor
        _scale_state(optimizer, parameter, name, factor)
    optimizer.param_groups[:] = [
        part for group in optimizer.param_groups for part in _split(optimizer, group, factors)
    ]
    return model, optimizer


def _scaled(model: nn.Module, name: str, factor: float, trained: set[int]) -> nn.Parameter:
    """The parameter that is trained for a name, divided by the factor, behind a multiplier."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise Refused("there is no such parameter", parameter=name) from error
    shifted = parametrize.is_parametrized(owner, leaf)
    known: Any = owner.parametrizations[leaf] if shifted else None  # type: ignore[index, union-attr]
    own = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
    if known is not None and (len(known) != 1 or not isinstance(known[0], Multiplier)):
        raise Refused("this parameter is parametrised otherwise", parameter=name, found=str(known[0]))
    parameter: Any = own.get(leaf) if known is None else known.original
    if not isinstance(parameter, nn.Parameter):
        raise Refused("there is no such parameter", parameter=name)
    uses = sum(other is parameter for _, other in model.named_parameters(remove_duplicate=False))
    if uses > 1 or id(parameter) not in trained:
        raise Refused(
            "this parameter cannot be shifted",
            parameter=name,
            expected="a parameter of one layer, which the optimizer trains",
            found=f"{uses} uses" if uses > 1 else "not in the optimizer",
        )
    if known is None:
        parametrize.register_parametrization(owner, leaf, Multiplier(factor), unsafe=True)
        original = owner.parametrizations[leaf].original  # type: ignore[index, union-attr]
        assert original is parameter
        return parameter
    with torch.no_grad():
        parameter /= factor
    known[0].factor *= factor
    return parameter


def _scale_state(optimizer: Optimizer, parameter: nn.Parameter, name: str, factor: float) -> None:
    powers = _SGD_STATE if type(optimizer) is SGD else _ADAM_STATE
    for key, value in optimizer.state.get(parameter, {}).items():
        if key not in powers:
            raise Refused("the optimizer keeps something unknown", parameter=name, found=key)
        if isinstance(value, torch.Tensor) and powers[key]:
            value *= factor ** powers[key]


def _split(optimizer: Optimizer, group: dict[str, Any], factors: Mapping[int, float]) -> list[dict[str, Any]]:
    """One group for each factor, in the order in which they occur."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    found: list[dict[str, Any]] = []
    for factor, parameters in parts.items():
        sgd = type(optimizer) is SGD
        decoupled = not sgd and (type(optimizer) is AdamW or bool(group.get("decoupled_weight_decay")))
        rate = factor**-2 if sgd else 1 / factor
        part = {**group, "params": parameters, "lr": group["lr"] * rate}
        if "initial_lr" in group:
            part["initial_lr"] = group["initial_lr"] * rate
        part["weight_decay"] = group["weight_decay"] * (factor if decoupled else factor**2)
        if not sgd:
            part["eps"] = group["eps"] * factor
        found.append(part)
    return found
