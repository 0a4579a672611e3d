"""Spoken words are written down the same, token for token, by Whisper as it was and with RMSNorms."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from regauge import packaged
from regauge.api import inspect, load, rewrite
from regauge.demo import choose
from regauge.errors import CheckpointError
from regauge.modeling_regauge import Norm
from speech import speak

TEXT = "Please open the window and close the door before you leave the house."


@pytest.fixture(scope="module")
def source() -> Path:
    try:
        return packaged.directory("whisper-tiny.en")
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def changed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whisper") / "out"
    rewrite(source, out, choose(inspect(source)))
    return out


@pytest.fixture(scope="module")
def features(source: Path) -> torch.Tensor:
    """Log-mel features (1, 80, 3000) of the text spoken."""
    if importlib.util.find_spec("espeakng_loader") is None:
        pytest.skip("espeakng-loader is not installed")
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(source)
    return extractor(speak(TEXT), sampling_rate=16000, return_tensors="pt").input_features


def transcribed(model: Any, features: torch.Tensor) -> list[int]:
    """Tokens of greedy decoding; float32."""
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model.eval().generate(features, do_sample=False, num_beams=1)[0].tolist()


def words(text: str) -> set[str]:
    return set("".join(c for c in text.lower() if c.isalpha() or c == " ").split())


def test_the_same_words(source: Path, changed: Path, features: torch.Tensor) -> None:
    wanted = transcribed(transformers.AutoModelForSpeechSeq2Seq.from_pretrained(source), features)
    tokenizer = transformers.AutoTokenizer.from_pretrained(changed)
    heard = words(tokenizer.decode(wanted, skip_special_tokens=True))
    assert len(heard & words(TEXT)) >= 0.8 * len(words(TEXT))
    ours = load(changed)
    norms = [m.form for m in ours.modules() if isinstance(m, Norm)]
    assert set(norms) == {"rms"}
    assert len(norms) == sum(isinstance(m, nn.LayerNorm) for m in load(source).modules())
    assert not any(isinstance(m, nn.LayerNorm) for m in ours.modules())
    assert transcribed(ours, features) == wanted
    remote = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(changed, trust_remote_code=True)
    assert type(remote) is not type(ours)
    assert transcribed(remote, features) == wanted
    # what is heard decides what is written: with another sound the tokens are others
    assert transcribed(ours, features.flip(2)) != wanted
