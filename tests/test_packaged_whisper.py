"""CTranslate2's model.bin and Whisper: files written here are read back, and the real one is whole."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from regauge import packaged
from regauge.errors import CheckpointError
from regauge.packaged import whisper
from regauge.packaged.cache import RECORD
from regauge.packaged.ctranslate2 import ModelBin, read_model_bin

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def model_bin(
    variables: list[tuple[str, np.ndarray[Any, Any]]], aliases: list[tuple[str, str]], version: int = 6
) -> bytes:
    """An independent writer of the format."""

    def string(text: str) -> bytes:
        raw = text.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    out = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables:
        out += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", CODES[value.dtype.name], value.nbytes) + value.tobytes()
    return out + struct.pack("<I", len(aliases)) + b"".join(string(a) + string(b) for a, b in aliases)


SMALL = [
    ("a/weight", np.arange(6, dtype=np.float32).reshape(2, 3)),
    ("a/heads", np.array(7, dtype=np.int16)),
    ("b", np.array([0.1, -2], dtype=np.float16)),
    ("c", np.array([-1], dtype=np.int8)),
    ("d", np.array([2**30], dtype=np.int32)),
]


def test_model_bin_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bin(SMALL, [("z", "b")]))
    read = read_model_bin(path)
    assert (read.specification, read.revision, read.aliases) == ("WhisperSpec", 3, {"z": "b"})
    assert list(read.variables) == [name for name, _ in SMALL]
    for name, value in SMALL:
        assert read.variables[name].dtype == value.dtype
        np.testing.assert_array_equal(read.variables[name], value, strict=True)


def test_every_damaged_model_bin_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "model.bin", model_bin(SMALL, [("z", "b")])
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [whole + b"\0", model_bin(SMALL, [], version=5), model_bin([SMALL[0], SMALL[0]], [])]
    damaged += [model_bin(SMALL, [("z", "nothing")]), model_bin(SMALL, [("b", "c")])]
    place = whole.index(np.float32(0).tobytes() + np.float32(1).tobytes())
    damaged += [
        whole[: place - 5] + bytes([9]) + whole[place - 4 :],  # element type
        whole[: place - 4] + struct.pack("<I", 20) + whole[place:],  # byte count
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="expected"):
            read_model_bin(path)


def stacked(state: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """CTranslate2 variables of a Hugging Face Whisper state dict."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for flag, value in (("activation", 3), ("alibi", 0), ("pre_norm", 1), ("scale_embeddings", 0)):
        out[f"decoder/{flag}"] = np.array(value, dtype=np.int8)
    for name in ("start_from_zero_embedding", "alignment_heads", "alignment_layer"):
        out[f"decoder/{name}"] = np.array(0, dtype=np.int8)
    out["encoder/num_heads"] = out["decoder/num_heads"] = np.array(2, dtype=np.int16)
    kinds = {"self_attn": ("self_attention", [["q", "k", "v"], ["out"]])}
    kinds["encoder_attn"] = ("attention", [["q"], ["k", "v"], ["out"]])
    for name, value in state.items():
        parts = name.removeprefix("model.").split(".")
        kind, last = parts[-2], parts[-1]
        if parts[-3] in kinds or name.endswith("proj_out.weight"):
            continue
        if "norm" in kind:
            last = {"weight": "gamma", "bias": "beta"}[last]
        where = "/".join(parts[:1] + ([f"layer_{parts[2]}"] if len(parts) > 3 else []))
        names = {"fc1": "ffn/linear_0", "fc2": "ffn/linear_1", "final_layer_norm": "ffn/layer_norm"}
        names |= {"embed_tokens": "embeddings", "embed_positions": "position_encodings"}
        names |= {f"{a}_layer_norm": f"{b}/layer_norm" for a, (b, _) in kinds.items()}
        last = "encodings" if kind == "embed_positions" else last
        out[f"{where}/{names.get(kind, kind)}/{last}"] = value
    for side, attentions in (("encoder", ["self_attn"]), ("decoder", list(kinds))):
        for attention in attentions:
            for index, group in enumerate(kinds[attention][1]):
                head = f"model.{side}.layers.0.{attention}"
                for part in ("weight", "bias"):
                    zero = np.zeros(state[f"{head}.q_proj.bias"].shape, dtype=np.float32)
                    blocks = [state.get(f"{head}.{x}_proj.{part}", zero) for x in group]
                    name = f"{side}/layer_0/{kinds[attention][0]}/linear_{index}/{part}"
                    out[name] = np.concatenate(blocks)
    return out


@pytest.fixture(scope="module")
def small_whisper() -> tuple[dict[str, np.ndarray[Any, Any]], ModelBin]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4,
        max_source_positions=6, max_target_positions=5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    state = {name: torch.randn_like(value).numpy() for name, value in model.state_dict().items()}
    del state["proj_out.weight"]
    head = {"decoder/projection/weight": "decoder/embeddings/weight"}
    return state, ModelBin("WhisperSpec", 3, stacked(state), head)


def test_whisper_tensors_find_their_places(small_whisper: tuple[dict[str, Any], ModelBin]) -> None:
    state, model = small_whisper
    arrays, sizes = whisper.whisper_arrays(model)
    assert set(arrays) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(arrays[name], value, strict=True)
    assert sizes["encoder_ffn_dim"] == 12
    assert (sizes["max_source_positions"], sizes["max_target_positions"], sizes["vocab_size"]) == (6, 5, 20)


def test_whisper_that_is_not_understood_is_refused(small_whisper: tuple[dict[str, Any], ModelBin]) -> None:
    _, model = small_whisper
    ones = np.ones(24, dtype=np.float32)
    changes = [
        {"decoder/activation": np.array(0)},
        {"decoder/pre_norm": np.array(0)},
        {"decoder/scale_embeddings": np.array(1)},
        {"encoder/layer_0/self_attention/linear_0/bias": ones},
        {"encoder/something/new": ones},
    ]
    wrong = [replace(model, variables={**model.variables, **change}) for change in changes]
    less = {name: value for name, value in model.variables.items() if name != "encoder/conv2/bias"}
    wrong += [
        replace(model, variables=less),
        replace(model, aliases={}),
        replace(model, specification="Other"),
    ]
    for each in wrong:
        with pytest.raises(CheckpointError, match="expected"):
            whisper.whisper_arrays(each)


def test_whisper_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whisper.SOURCE.installed:
        pytest.skip(f"{whisper.SOURCE.package} is not installed: {whisper.SOURCE.install}")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("REGAUGE_CACHE", str(tmp_path))
    place = packaged.directory("whisper-tiny.en")
    assert json.loads((place / RECORD).read_text())["licence"] == "MIT"
    model, report = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(place, output_loading_info=True)
    assert not any(report.values())
    assert type(model).__name__ == "WhisperForConditionalGeneration"
    assert model.dtype == torch.float32
    # the encoder's positions are sinusoids, by the paper's formula
    rates = np.exp(-np.log(10000) / 191 * np.arange(192))
    angles = np.arange(1500)[:, None] * rates
    table = model.model.encoder.embed_positions.weight.detach().numpy()
    np.testing.assert_allclose(table, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-3)
    processor = transformers.WhisperProcessor.from_pretrained(place)
    heard = processor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt")
    assert heard.input_features.shape == (1, 80, 3000)
    ids = processor.tokenizer("Hello world.").input_ids
    assert ids[:2] == [50257, 50362]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "Hello world."
    # heard nothing, the decoder is a language model: words in order are likelier than the same words reversed
    start, *words, end = processor.tokenizer(" Thank you very much, and have a good day.").input_ids[1:]
    sentences = torch.tensor([[50257, start, *words, end], [50257, start, *words[::-1], end]])
    with torch.no_grad():
        features = heard.input_features.expand(2, -1, -1)
        logits = model(input_features=features, decoder_input_ids=sentences[:, :-1]).logits
        example = model(**packaged.example("whisper-tiny.en")).logits
    losses = functional.cross_entropy(logits.mT, sentences[:, 1:], reduction="none").mean(1)
    assert losses[0] < losses[1] / 2
    assert bool(example.isfinite().all())
