"""Example inputs for a Hugging Face model: derived from its forward signature and the sizes in its config.

Sizes in the config say how large an input must be, never what the model computes with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regauge.errors import TraceError

DECODER_LENGTH = 5


def example_inputs(
    model: nn.Module,
    config: Any,
    *,
    batch: int = 3,
    length: int = 7,
    device: str | torch.device = "meta",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Keyword inputs for ``model``.

    Args:
        model: a Hugging Face model; its forward signature and ``main_input_name`` are read.
        config: its configuration; only sizes and special token ids are read.
        batch: size of the batch axis.
        length: number of tokens of a text input; capped by the positions the model has. Fixed-size
            inputs (images, spectrograms) take their size from the config.
        device: ``meta`` gives tensors without values, ``cpu`` gives real ones: token ids drawn below
            the vocabulary size, avoiding special tokens; features drawn from a normal distribution.
        seed: the values depend on it and on nothing else.

    Returns:
        name -> tensor: int64 ids ``(batch, length)``, features in the model's dtype.

    Raises:
        TraceError: an input the model requires is of an unknown sort, or its size is not in the config.
    """
    builder = _Builder(
        model, config, batch, length, torch.device(device), torch.Generator().manual_seed(seed)
    )
    return {name: builder.build(name) for name in _names(model, config)}


def _names(model: nn.Module, config: Any) -> tuple[str, ...]:
    """Names of the inputs to give: the main one, the required ones, and the decoder's."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if not isinstance(main, str) or main not in parameters:
        raise TraceError(
            "the model does not say what its main input is",
            expected="main_input_name, one of: " + ", ".join(parameters),
            found=repr(main),
            way_out="trace the module yourself with regauge.trace.trace and example inputs",
        )
    encoder_decoder = "decoder_input_ids" in parameters and _is_encoder_decoder(config)
    names = [main]
    if main != "input_ids" and "input_ids" in parameters and not encoder_decoder:
        # A model of text and something else: text alone when it generates text, both when it compares.
        names = ["input_ids"] if _generates(model) else ["input_ids", main]
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if required and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            names.append(name)
    if encoder_decoder:
        names.append("decoder_input_ids")
    return tuple(dict.fromkeys(names))


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _generates(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False


@dataclass
class _Builder:
    model: nn.Module
    config: Any
    batch: int
    length: int
    device: torch.device
    generator: torch.Generator

    def build(self, name: str) -> torch.Tensor:
        builders: dict[str, Callable[[str], torch.Tensor]] = {
            "input_ids": self._ids,
            "decoder_input_ids": self._decoder_ids,
            "attention_mask": self._ones,
            "decoder_attention_mask": self._ones,
            "token_type_ids": self._zeros,
            "position_ids": self._positions,
            "pixel_values": self._pixels,
            "input_features": self._features,
            "input_values": self._values,
            "inputs_embeds": self._embeds,
            "past_values": self._past_values,
        }
        if name not in builders:
            raise self._missing(name, "no rule gives this input its shape")
        return builders[name](name)

    def _missing(self, name: str, why: str) -> TraceError:
        return TraceError(
            f"cannot make an example for the input '{name}' of {type(self.model).__name__}",
            expected="an input whose size the config states",
            found=why,
            way_out="trace the module yourself with regauge.trace.trace and example inputs",
        )

    def _size(self, name: str, *fields: str) -> int:
        """The first of these config fields that is a positive number."""
        for field in fields:
            for section in _sections(self.config):
                value = getattr(section, field, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        raise self._missing(name, "the config has none of: " + ", ".join(fields))

    def _normal(self, *shape: int) -> torch.Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def _random_ids(self, rows: int, columns: int, vocabulary: int) -> torch.Tensor:
        if self.device.type == "meta":
            return torch.zeros((rows, columns), dtype=torch.int64, device="meta")
        special = set(_special_ids(self.config))
        plain = torch.tensor([index for index in range(vocabulary) if index not in special] or [0])
        drawn = torch.randint(len(plain), (rows, columns), generator=self.generator)
        return plain[drawn].to(self.device)

    def _tokens(self, name: str) -> int:
        try:
            return min(
                self.length,
                self._size(name, "max_position_embeddings", "n_positions", "max_target_positions"),
            )
        except TraceError:
            return self.length

    def _ids(self, name: str) -> torch.Tensor:
        return self._random_ids(self.batch, self._tokens(name), self._vocabulary(name, decoder=False))

    def _decoder_ids(self, name: str) -> torch.Tensor:
        length = self._tokens(name) if self.length > 2 * DECODER_LENGTH else DECODER_LENGTH
        return self._random_ids(self.batch, length, self._vocabulary(name, decoder=True))

    def _vocabulary(self, name: str, *, decoder: bool) -> int:
        try:
            text = self.config.get_text_config(decoder=True) if decoder else self.config.get_text_config()
        except (ValueError, AttributeError):
            text = self.config
        size = getattr(text, "vocab_size", None)
        return size if isinstance(size, int) else self._size(name, "vocab_size", "decoder_vocab_size")

    def _ones(self, name: str) -> torch.Tensor:
        return torch.ones((self.batch, self._tokens(name)), dtype=torch.int64, device=self.device)

    def _zeros(self, name: str) -> torch.Tensor:
        return torch.zeros((self.batch, self._tokens(name)), dtype=torch.int64, device=self.device)

    def _positions(self, name: str) -> torch.Tensor:
        length = self._tokens(name)
        return torch.arange(length, device=self.device).expand(self.batch, length)

    def _embeds(self, name: str) -> torch.Tensor:
        return self._normal(
            self.batch, self._tokens(name), self._size(name, "hidden_size", "d_model", "n_embd")
        )

    def _past_values(self, name: str) -> torch.Tensor:
        return self._normal(
            self.batch, self._size(name, "context_length"), self._size(name, "num_input_channels")
        )

    def _pixels(self, name: str) -> torch.Tensor:
        channels = next(
            (
                value
                for section in _sections(self.config)
                for value in [getattr(section, "num_channels", None)]
                if isinstance(value, int)
            ),
            3,
        )
        count = getattr(self.config, "num_frames", None)
        frames = (count,) if isinstance(count, int) else ()  # a video
        for section in _sections(self.config):
            size = getattr(section, "image_size", None)
            if isinstance(size, int):
                return self._normal(self.batch, *frames, channels, size, size)
            if isinstance(size, (list, tuple)) and len(size) == 2:
                return self._normal(self.batch, *frames, channels, int(size[0]), int(size[1]))
        # A network without a size for its images takes any; 64 leaves two positions after five halvings.
        return self._normal(self.batch, *frames, channels, 64, 64)

    def _features(self, name: str) -> torch.Tensor:
        bins = [getattr(section, "num_mel_bins", None) for section in _sections(self.config)]
        positions = [getattr(section, "max_source_positions", None) for section in _sections(self.config)]
        if isinstance(bins[0], int) and isinstance(positions[0], int):
            # A spectrogram (bins, frames) whose frames are halved once by the stem.
            return self._normal(self.batch, bins[0], 2 * positions[0])
        width = self._size(name, "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
        return self._normal(self.batch, 8 * self.length, width)

    def _values(self, name: str) -> torch.Tensor:
        kernels = getattr(self.config, "conv_kernel", None)
        strides = getattr(self.config, "conv_stride", None)
        if isinstance(kernels, (list, tuple)) and isinstance(strides, (list, tuple)):
            # Samples of a waveform, enough for ``length`` frames after the convolutional stem.
            samples = self.length
            for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
                samples = (samples - 1) * int(stride) + int(kernel)
            return self._normal(self.batch, samples)
        return self._normal(self.batch, self._size(name, "max_length"), self._size(name, "num_mel_bins"))


def _sections(config: Any) -> Iterator[Any]:
    """The config itself, then its nested configs, in the order the class lists them."""
    yield config
    for key in getattr(config, "sub_configs", None) or {}:
        section = getattr(config, key, None)
        if section is not None and not isinstance(section, Mapping):
            yield from _sections(section)


def _special_ids(config: Any) -> Iterator[int]:
    """Ids of tokens with a meaning of their own: padding, end of text, image placeholders."""
    for section in _sections(config):
        for field, value in sorted(vars(section).items()):
            if field.endswith(("_token_id", "_token_index")):
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(item, int):
                        yield item
