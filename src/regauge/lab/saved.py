"""Lab models: built from a configuration, written to a directory, read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from regauge.errors import BadInput, CheckpointError
from regauge.lab.cnn import CNN
from regauge.lab.config import ModelConfig, parse_model
from regauge.lab.decoder import Decoder
from regauge.lab.norms import IMAGES, TOKENS, check_options, maker
from regauge.lab.start import Model, check_init, initialise
from regauge.lab.vit import ViT
from regauge.nn.placement import placements

KINDS: Mapping[str, type[Model]] = {"decoder": Decoder, "vit": ViT, "cnn": CNN}


def build(config: ModelConfig | Mapping[str, Any], seed: int = 0) -> Model:
    """A new model with its first weights, in training mode and float32.

    Args:
        config: a :class:`ModelConfig`, or its keys.
        seed: of everything drawn.

    Raises:
        BadInput: an unknown key, norm, placement, init or option.
    """
    config = config if isinstance(config, ModelConfig) else parse_model(config)
    check_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[config.kind](config)
        initialise(model, seed)
    return model


def check_model(config: ModelConfig) -> None:
    """Refuse names and options that do not exist; nothing is built but one norm.

    Raises:
        BadInput: one of them.
    """
    table = IMAGES if config.kind == "cnn" else TOKENS
    maker(table, config.norm, config.width, config.norm_options)()
    check_options(placements, config.placement_options, f"the placement {config.placement!r}")
    placements(config.placement, config.depth, **config.placement_options)
    check_init(config)


def save(model: Model, directory: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json``.

    Raises:
        BadInput: not a lab model.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise BadInput("this is not a lab model", expected="Decoder, ViT or CNN", found=type(model).__name__)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config.model_dump(), indent=2) + "\n", encoding="utf-8")


def load(directory: str | Path) -> Model:
    """The model that :func:`save` wrote, in evaluation mode, with the dtype it had.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the configuration.
    """
    path = Path(directory)
    try:
        config = parse_model(json.loads((path / "config.json").read_text(encoding="utf-8")))
        tensors = load_file(path / "model.safetensors")
    except Exception as error:
        if isinstance(error, BadInput):
            raise
        raise CheckpointError(
            f"{path} holds no lab model", expected="config.json and model.safetensors", found=str(error)[:200]
        ) from error
    model = build(config)
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"the tensors in {path} do not fit its config.json", found=" ".join(str(error).split())[:300]
        ) from error
    return model.eval()
