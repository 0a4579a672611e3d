"""Optimizers by name, their parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput
from regauge.lab.config import OptimizerConfig
from regauge.lab.nearest import nearest
from regauge.lab.norms import check_options
from regauge.optim import SGDP, SWAN, AdamP, DoG, LDoG, SinkGD, groups, scale_invariant, with_adam

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamp": AdamP,
    "sgdp": SGDP,
    "dog": DoG,
    "ldog": LDoG,
    "sinkgd": SinkGD,
    "swan": SWAN,
}
_PROJECTED = ("adamp", "sgdp")
_MATRICES = ("sinkgd", "swan")


def optimizer_of(config: OptimizerConfig, model: nn.Module, inputs: torch.Tensor) -> torch.optim.Optimizer:
    """The optimizer for a model.

    AdamP and SGDP get the scale-invariant weights from the operations of the model
    (:func:`regauge.optim.scale_invariant`) unless ``options`` has ``views: cosine``. SinkGD and SWAN leave
    what is no matrix to AdamW, with the rate ``options.adam_lr``, by default the same. DoG and LDoG find
    their own step: ``lr: 1`` is theirs.

    Args:
        config: which, and its options.
        model: whose parameters it steps.
        inputs: one batch, to trace the model with where that is needed.

    Raises:
        BadInput: an unknown name or option; TraceError: the model cannot be traced.
    """
    kind, options = check_optimizer(config)
    matrices = config.name in _MATRICES
    adam_lr = float(options.pop("adam_lr", config.lr))
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if config.name in _PROJECTED:
        views = options.get("views", "derived")
        options["views"] = scale_invariant(model, (inputs,)) if views == "derived" else views
    if config.name in ("adam", "adamw"):
        options = {"fused": True, **options}
    if matrices:
        params: Any = with_adam(model, (inputs,), lr=config.lr, adam_lr=adam_lr)
    elif config.weight_decay > 0:
        params = groups(model, (inputs,), config.weight_decay)
    else:
        params = list(model.named_parameters())
    if matrices or not config.weight_decay:
        options["weight_decay"] = config.weight_decay
    return kind(params, lr=config.lr, **options)


def check_optimizer(config: OptimizerConfig) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Class and options.

    Raises:
        BadInput: an unknown name or option.
    """
    name, options = config.name, dict(config.options)
    if name not in OPTIMIZERS:
        raise BadInput(
            f"there is no optimizer {name!r}{nearest(name, OPTIMIZERS)}",
            expected=", ".join(OPTIMIZERS),
            found=repr(name),
        )
    known = {key: value for key, value in options.items() if key != "adam_lr" or name not in _MATRICES}
    check_options(OPTIMIZERS[name], known, f"the optimizer {name!r}")
    if name in _PROJECTED and options.get("views", "derived") not in ("derived", "cosine"):
        raise BadInput("no such views", expected="derived or cosine", found=repr(options["views"]))
    return OPTIMIZERS[name], options


def factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """lr of step 0, 1, … over the peak: linear up during warm-up, then constant or a cosine down to
    ``final``."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
