"""GGUF input: tiny files written here must become the model they were written from, or be refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regauge import gguf as module
from regauge.errors import CheckpointError
from regauge.gguf import llama3_scaling, open_gguf

writing = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

HEADS, WIDTH, HEAD = 2, 32, 16
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(rope: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD, max_position_embeddings=256,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **(rope or {})}, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tensors(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Names of the format; q and k rows interleaved, as llama.cpp wants them."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if "q_proj" in rest or "k_proj" in rest:
                array = array.reshape(HEADS, 2, HEAD // 2, WIDTH).swapaxes(1, 2).reshape(array.shape)
            out[f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"] = np.ascontiguousarray(array)
        else:
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            out[f"{top[name.removesuffix('.weight')]}.weight"] = array
    return out


def write(
    path: Path, content: dict[str, np.ndarray[Any, Any]], architecture: str = "llama", **more: Any
) -> Path:
    writer = writing.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    for key, value in more.items():
        getattr(writer, key)(value)
    for name, value in content.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(200)[None] * 7 % 40).logits


def divisors(model: Any) -> np.ndarray[Any, Any]:
    plain = 10000.0 ** (-torch.arange(0, HEAD, 2).double() / HEAD)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


def test_a_gguf_file_becomes_the_model_it_was_written_from(tmp_path: Path) -> None:
    model = llama()
    path = write(tmp_path / "x.gguf", tensors(model))
    place = open_gguf(path, tmp_path / "cache")
    read = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    torch.testing.assert_close(logits(read), logits(model), atol=1e-5, rtol=1e-5)
    before = (place / "model.safetensors").stat().st_mtime_ns
    os.rename(path, tmp_path / "y.gguf")
    assert open_gguf(tmp_path / "y.gguf", tmp_path / "cache") == place
    assert (place / "model.safetensors").stat().st_mtime_ns == before
    assert {p.name for p in (tmp_path / "cache/gguf").iterdir()} == {place.name}


def test_files_beside_it_take_no_part_and_links_are_followed(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text("not what it seems")
    (tmp_path / "elsewhere").mkdir()
    model = llama()
    path = write(tmp_path / "elsewhere" / "blob", tensors(model))
    (tmp_path / "x.gguf").symlink_to(path)
    place = open_gguf(tmp_path / "x.gguf", tmp_path / "cache")
    read = transformers.AutoModelForCausalLM.from_pretrained(place)
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)


def test_frequency_divisors_are_kept(tmp_path: Path) -> None:
    model = llama(SCALING)
    path = write(tmp_path / "x.gguf", {**tensors(model), "rope_freqs.weight": divisors(model)})
    read = transformers.AutoModelForCausalLM.from_pretrained(open_gguf(path, tmp_path)).eval()
    torch.testing.assert_close(logits(read), logits(model), atol=1e-4, rtol=1e-4)
    plain = llama()
    assert float((logits(plain) - logits(model)).abs().max()) > 0.1  # they matter


@pytest.mark.parametrize(
    ("factor", "low", "high", "context"), [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 8, 1024)]
)
def test_llama3_scaling_is_found_from_its_divisors(
    factor: float, low: float, high: float, context: int
) -> None:
    waves = 5e5 ** (-np.arange(64) / 64) / (2 * np.pi)
    smooth = np.clip((waves * context - low) / (high - low), 0, 1)
    given = 1 / ((1 - smooth) / factor + smooth)
    found = llama3_scaling(given.astype(np.float32).astype(np.float64), 5e5)
    assert found is not None
    assert found["factor"] == factor
    assert found["high_freq_factor"] == pytest.approx(high / low)
    assert found["original_max_position_embeddings"] == context / low
    assert llama3_scaling(given * np.linspace(1, 1.01, 64), 5e5) is None
    assert llama3_scaling(np.ones(64), 5e5) is None


def refused(path: Path, match: str) -> None:
    cache = path.parent / "cache"
    with pytest.raises(CheckpointError, match=match):
        open_gguf(path, cache)
    assert not cache.exists() or not any((cache / "gguf").iterdir())


def test_a_file_that_is_not_gguf_or_not_all_there_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", tensors(llama()))
    whole = path.read_bytes()
    header = whole.index(b"output_norm.weight")
    for length in (*range(4, header, 37), header, len(whole) - 100):
        path.write_bytes(whole[:length])
        refused(path, "cut short")
    for content in (b"", b"PK\x03\x04" + whole[4:], b"GGU"):
        path.write_bytes(content)
        refused(path, "not a GGUF file")
    path.write_bytes(whole[:4] + b"\x00\x00\x00\x03" + whole[8:])
    refused(path, "version")
    refused(tmp_path / "nothing.gguf", "cannot be read")


def test_what_transformers_cannot_read_or_would_lose_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "x.gguf", tensors(llama())
    refused(write(path, content, "unheard-of"), "unheard-of")
    less = {k: v for k, v in content.items() if k != "blk.1.attn_q.weight"}
    refused(write(path, less), "missing keys: model.layers.1.self_attn.q_proj.weight")
    more = {**content, "blk.1.extra.weight": np.ones(5, dtype=np.float32)}
    refused(write(path, more), "would not use")
    bad = {**content, "output_norm.weight": np.full(WIDTH, np.nan, dtype=np.float32)}
    refused(write(path, bad), "not finite")
    linear = {"add_rope_scaling_type": writing.RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0}
    refused(write(path, content, **linear), "scales rotary positions")
    odd = {**content, "rope_freqs.weight": np.linspace(1, 3, HEAD // 2, dtype=np.float32)}
    refused(write(path, odd), "scales rotary positions")


def test_a_missing_extra_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf", tensors(llama()))
    real = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "accelerate" else real(name))
    refused(path, r"no accelerate\n.*pip install regauge\[gguf\]")
