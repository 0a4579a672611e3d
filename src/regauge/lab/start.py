"""First weights of a lab model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput
from regauge.lab.blocks import ACTIVATIONS, Layer
from regauge.lab.cnn import CNN, Branch
from regauge.lab.config import ModelConfig
from regauge.lab.decoder import Decoder
from regauge.lab.nearest import nearest
from regauge.lab.norms import check_options
from regauge.lab.vit import ViT
from regauge.nn.init import fixup_, idi_, idiz_, mimetic_query_, mimetic_value_, vi3nr_
from regauge.nn.init.weights import fans, fill, normal
from regauge.nn.placement import Residual, deepnorm_gain

Model = Decoder | ViT | CNN


def initialise(model: Model, seed: int) -> None:
    """Fill all weights by ``model.config.init``; norms keep what they start with.

    ======== ================================================================================================
    init     weights of the layers
    ======== ================================================================================================
    default  N(0, 1 / fan_in)
    small    N(0, std²), std = 0.02, embedding and head too
    deepnorm default, with value, output and both maps of the MLP times (8 · depth)^(−1/4)
    fixup    :func:`regauge.nn.init.fixup_` in the branches (value and output; both maps of an MLP; both
             convolutions), a head of zeros; the scalar biases and factors of Fixup are not added
    idinit   :func:`regauge.nn.init.idi_` everywhere in the branches, idiz_ in their last maps
    vi3nr    :func:`regauge.nn.init.vi3nr_`, E x² = 1 where a map does not read an activation function
    mimetic  default, with :func:`regauge.nn.init.mimetic_query_` and ``mimetic_value_`` in attention
    ======== ================================================================================================

    Where nothing else is said: embeddings of tokens and positions N(0, 1), other maps N(0, 1 / fan_in),
    biases 0.

    Args:
        model: filled in place.
        seed: of the draws.

    Raises:
        BadInput: an unknown name, one that does not apply to this kind of model, or unknown options.
    """
    name, options = model.config.init, model.config.init_options
    check_init(model.config)
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _normal(module.weight, fans(module.weight)[0] ** -0.5, random)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            _normal(module.weight, 1.0, random)
    if isinstance(model, (Decoder, ViT)) and model.positions is not None:
        _normal(model.positions, 1.0, random)
    INITS[name](model, random, **options)


def check_init(config: ModelConfig) -> None:
    """Refuse an init that does not exist or does not apply, and unknown options.

    Raises:
        BadInput: one of these.
    """
    name = config.init
    if name not in INITS:
        raise BadInput(
            f"there is no init {name!r}{nearest(name, INITS)}", expected=", ".join(INITS), found=repr(name)
        )
    if config.kind == "cnn" and name in ("deepnorm", "mimetic"):
        raise BadInput(f"the init {name!r} is for transformers", expected="decoder or vit", found="cnn")
    check_options(INITS[name], config.init_options, f"the init {name!r}")


def _normal(tensor: torch.Tensor, std: float, random: torch.Generator) -> None:
    fill(tensor, std * normal(tensor.shape, random))


def _default(model: Model, random: torch.Generator) -> None:
    del model, random


def _small(model: Model, random: torch.Generator, std: float = 0.02) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            _normal(parameter, std, random)


def _deepnorm(model: Model, random: torch.Generator) -> None:
    del random
    gain = deepnorm_gain(model.config.depth)
    with torch.no_grad():
        for layer in _layers(model):
            for part in _branches(layer):
                for linear in part:
                    linear.weight.mul_(gain)


def _fixup(model: Model, random: torch.Generator, gain: float = math.sqrt(2)) -> None:
    branches = [part for layer in model.layers for part in _branches(layer)]
    fixup_(branches, gain=gain, generator=random)
    nn.init.zeros_(model.head.weight)


def _idinit(model: Model, random: torch.Generator, scale: float = 1.0, last: float = 1e-6) -> None:
    del random
    for layer in model.layers:
        if isinstance(layer, Layer):
            idi_(layer.attention.sublayer.get_parameter("query.weight"), scale)
            idi_(layer.attention.sublayer.get_parameter("key.weight"), scale)
        for part in _branches(layer):
            for linear in part[:-1]:
                idi_(linear.weight, scale)
            idiz_(part[-1].weight, last)


def _vi3nr(model: Model, random: torch.Generator, sigma: float = 1.0) -> None:
    function = ACTIVATIONS[model.config.activation]
    for layer in model.layers:
        for part in _branches(layer):
            for linear in part:
                reads = linear is part[-1] and not _attends(layer, part)
                reads = reads or isinstance(linear, nn.Conv2d)
                vi3nr_(
                    linear.weight,
                    function if reads else None,
                    sigma,
                    square=None if reads else 1.0,
                    generator=random,
                )


def _mimetic(model: Model, random: torch.Generator) -> None:
    for layer in _layers(model):
        held = layer.attention.sublayer
        query, key, value, out = (
            held.get_parameter(f"{name}.weight") for name in ("query", "key", "value", "out")
        )
        mimetic_query_(query, key, model.config.heads, generator=random)
        mimetic_value_(value, out, generator=random)


INITS: Mapping[str, Callable[..., None]] = {
    "default": _default,
    "small": _small,
    "deepnorm": _deepnorm,
    "fixup": _fixup,
    "idinit": _idinit,
    "vi3nr": _vi3nr,
    "mimetic": _mimetic,
}
"""Name -> what is done after the default."""


def _layers(model: Model) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def _branches(layer: nn.Module) -> list[list[Any]]:
    """The linear maps of each residual branch of a layer, in order, without queries and keys."""
    if isinstance(layer, Layer):
        attention, mlp = layer.attention.sublayer, layer.mlp.sublayer
        found = [(attention, ("value", "out")), (mlp, ("up", "down"))]
    else:
        assert isinstance(layer, Residual)
        assert isinstance(layer.sublayer, Branch)
        found = [(layer.sublayer, ("first", "second"))]
    return [[module.get_submodule(name) for name in names] for module, names in found]


def _attends(layer: nn.Module, part: list[Any]) -> bool:
    return isinstance(layer, Layer) and part[-1] is layer.attention.sublayer.get_submodule("out")
