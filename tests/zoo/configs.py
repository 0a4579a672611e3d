"""Small networks of real architectures, with trained-looking irregularities.

Their eps is large, so that a scale in front of a norm is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.parts import EPS


def _config(cls: str, architecture: str, **fields: Any) -> Any:
    import transformers

    return getattr(transformers, cls)(architectures=[architecture], **fields)


def _text(cls: str, architecture: str, **fields: Any) -> Any:
    common = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 32,
    }
    return _config(cls, architecture, **(common | fields))


def _rms(cls: str, architecture: str, **fields: Any) -> Any:
    return _text(cls, architecture, **({"num_key_value_heads": 2, "rms_norm_eps": EPS} | fields))


def _layer(cls: str, architecture: str, **fields: Any) -> Any:
    return _text(cls, architecture, **({"layer_norm_eps": EPS} | fields))


_GPT = {
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 32,
    "layer_norm_epsilon": EPS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR = {
    "vocab_size": 37,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_OPT = {"ffn_dim": 20, "word_embed_proj_dim": 24}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _rms("LlamaConfig", "LlamaForCausalLM", num_hidden_layers=2),
    "llama-tied": lambda: _rms("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
    "qwen2": lambda: _rms("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": lambda: _rms("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    "phi3": lambda: _rms("Phi3Config", "Phi3ForCausalLM"),
    "gemma3": lambda: _rms("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, num_hidden_layers=2),
    "granite": lambda: _rms("GraniteConfig", "GraniteForCausalLM", embedding_multiplier=12.0),
    "mixtral": lambda: _rms("MixtralConfig", "MixtralForCausalLM", num_local_experts=4),
    "gpt2": lambda: _config("GPT2Config", "GPT2LMHeadModel", **_GPT, n_inner=20),
    "gptj": lambda: _config("GPTJConfig", "GPTJForCausalLM", **_GPT, n_inner=20, rotary_dim=4),
    "neox": lambda: _layer("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "opt": lambda: _text("OPTConfig", "OPTForCausalLM", **_OPT),
    "bloom": lambda: _config(
        "BloomConfig", "BloomForCausalLM", vocab_size=37, hidden_size=24, n_layer=1, n_head=4
    ),
    "falcon": lambda: _text(
        "FalconConfig", "FalconForCausalLM", num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=20
    ),
    "bert": lambda: _layer("BertConfig", "BertForMaskedLM"),
    "vit": lambda: _config(
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        layer_norm_eps=EPS,
    ),
    "whisper": lambda: _config(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        **_PAIR,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
    ),
    "t5": lambda: _config(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=37,
        d_model=24,
        d_kv=5,
        d_ff=20,
        num_layers=1,
        num_heads=4,
        layer_norm_epsilon=EPS,
        decoder_start_token_id=0,
    ),
    "resnet": lambda: _config(
        "ResNetConfig",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
    ),
}
