"""The families of models: how each is built, what it learns, and where its hidden neurons are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from regauge.lab import build, parse_model

CONTEXT, SYMBOLS = 48, 64
Place = tuple[str, int]


@dataclass(frozen=True)
class Hidden:
    """One layer of hidden neurons.

    Attributes:
        writers: (parameter or buffer, axis) that has one entry for each neuron and makes it.
        readers: (parameter, axis) that reads it.
    """

    writers: tuple[Place, ...]
    readers: tuple[Place, ...]


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: of the family.
        task: ``digits`` (images [batch, 1, 8, 8]) or ``text`` (symbols [batch, positions]).
        build: (seed, wide, activation) -> a new model. ``wide`` has half as many neurons more; the
            activation is the usual one or ``other``.
        hidden: the layers of neurons.
        layers: paths of modules whose outputs are the hidden activations.
        steps, rate, decay: of AdamW; weights of two and more axes decay.
        stored: whether models of it are directories of transformers.
        sizes: keys of the configuration that say how many neurons a layer has.
        stream: where the residual stream is, for a family whose wide models have a wider one.
    """

    name: str
    task: str
    build: Callable[[int, bool, bool], nn.Module]
    hidden: tuple[Hidden, ...]
    layers: tuple[str, ...]
    steps: int
    rate: float
    decay: float
    stored: bool = False
    sizes: tuple[str, ...] = ()
    stream: Hidden | None = None

    def logits(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """[batch, classes], or [batch, positions, symbols]."""
        return model(input_ids=x, use_cache=False).logits if self.stored else model(x)

    def inputs(self, x: torch.Tensor) -> tuple[Any, ...] | Mapping[str, Any]:
        """Example inputs as :func:`regauge.inspect` takes them."""
        return {"input_ids": x} if self.stored else (x,)


class MLP(nn.Module):
    """Logits [batch, 10] of images [batch, 1, 8, 8]; two hidden layers with biases."""

    def __init__(self, neurons: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, neurons), nn.Linear(neurons, neurons)
        self.act_first, self.act_second = activation(), activation()
        self.head = nn.Linear(neurons, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act_first(self.first(images.flatten(1)))
        return self.head(self.act_second(self.second(x)))


def _mlp(seed: int, wide: bool, other: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(96 if wide else 64, nn.GELU if other else nn.ReLU)


def _lab(
    config: Mapping[str, Any], activations: tuple[str, str], seed: int, wide: bool, other: bool
) -> nn.Module:
    expansion = 6 if wide else 4
    settings = {**config, "activation": activations[other]}
    if config["kind"] != "cnn":
        settings["expansion"] = expansion
    elif wide:
        settings["width"] = config["width"] * 3 // 2
    return build(parse_model(settings), seed)


def _llama(seed: int, wide: bool, other: bool) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=SYMBOLS, hidden_size=48, intermediate_size=192 if wide else 128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=CONTEXT,
        hidden_act="gelu" if other else "silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"], initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def _gpt2(seed: int, wide: bool, other: bool) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=SYMBOLS, n_embd=48, n_inner=288 if wide else 192, n_layer=2, n_head=4, n_positions=CONTEXT,
        activation_function="relu" if other else "gelu_new", bos_token_id=1, eos_token_id=2,
        architectures=["GPT2LMHeadModel"], initializer_range=0.1, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(config)


def _linear(first: str, second: str, bias: bool) -> Hidden:
    writers = ((f"{first}.weight", 0), *(((f"{first}.bias", 0),) if bias else ()))
    return Hidden(writers, ((f"{second}.weight", 1),))


def _blocks(depth: int, bias: bool) -> tuple[Hidden, ...]:
    paths = (f"layers.{i}.mlp.sublayer" for i in range(depth))
    return tuple(_linear(f"{path}.up", f"{path}.down", bias) for path in paths)


def _norm(path: str) -> tuple[Place, ...]:
    return tuple((f"{path}.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var"))


def _stream(depth: int) -> Hidden:
    paths = [f"layers.{i}" for i in range(depth)]
    writers = [("embedding.weight", 0), *((f"{path}.sublayer.second.weight", 0) for path in paths)]
    norms = [place for path in (*(f"{path}.before" for path in paths), "last") for place in _norm(path)]
    readers = [*((f"{path}.sublayer.first.weight", 1) for path in paths), ("head.weight", 1)]
    return Hidden((*writers, *norms), tuple(readers))


def _branches(depth: int) -> tuple[Hidden, ...]:
    found = []
    for i in range(depth):
        path = f"layers.{i}.sublayer"
        writers = ((f"{path}.first.weight", 0), *_norm(f"{path}.norm"))
        found.append(Hidden(writers, ((f"{path}.second.weight", 1),)))
    return tuple(found)


def _of_llama(depth: int) -> tuple[Hidden, ...]:
    paths = (f"model.layers.{i}.mlp" for i in range(depth))
    return tuple(
        Hidden(((f"{p}.up_proj.weight", 0), (f"{p}.gate_proj.weight", 0)), ((f"{p}.down_proj.weight", 1),))
        for p in paths
    )


def _of_gpt2(depth: int) -> tuple[Hidden, ...]:
    paths = (f"transformer.h.{i}.mlp" for i in range(depth))
    return tuple(
        Hidden(((f"{p}.c_fc.weight", 1), (f"{p}.c_fc.bias", 0)), ((f"{p}.c_proj.weight", 0),)) for p in paths
    )


def _numbered(path: str, depth: int) -> tuple[str, ...]:
    return tuple(f"{path}.{i}" for i in range(depth))


_TEXT = {"kind": "decoder", "width": 48, "depth": 2, "heads": 4, "context": CONTEXT, "vocabulary": SYMBOLS}
_LAYERNORM = {**_TEXT, "norm": "layernorm", "positions": "learned", "bias": True}
_VIT = {"kind": "vit", "width": 32, "depth": 2, "heads": 4, "norm": "layernorm", "bias": True}
_CNN = {"kind": "cnn", "width": 16, "depth": 3, "norm": "batch"}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mlp", "digits", _mlp,
            (_linear("first", "second", True), _linear("second", "head", True)),
            ("act_first", "act_second"), 2000, 5e-3, 2.0,
        ),
        Family(
            "cnn", "digits", partial(_lab, _CNN, ("relu", "gelu")), _branches(3),
            _numbered("layers", 3), 800, 1e-2, 4.0, stream=_stream(3),
        ),
        Family(
            "vit", "digits", partial(_lab, _VIT, ("gelu", "silu")), _blocks(2, True),
            _numbered("layers", 2), 1000, 5e-3, 3.0,
        ),
        Family(
            "decoder-rms", "text", partial(_lab, _TEXT, ("gelu", "silu")), _blocks(2, False),
            _numbered("layers", 2), 1000, 5e-3, 3.0,
        ),
        Family(
            "decoder-ln", "text", partial(_lab, _LAYERNORM, ("relu", "gelu")), _blocks(2, True),
            _numbered("layers", 2), 1000, 5e-3, 3.0,
        ),
        Family(
            "llama", "text", _llama, _of_llama(2), _numbered("model.layers", 2), 1000, 5e-3, 3.0,
            True, ("intermediate_size",),
        ),
        Family(
            "gpt2", "text", _gpt2, _of_gpt2(2), _numbered("transformer.h", 2), 1000, 5e-3, 3.0,
            True, ("n_inner",),
        ),
    )
}  # fmt: skip
"""Name -> family."""
