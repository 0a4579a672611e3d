"""The Hugging Face adapter: a model on meta is the model, and names and buffers are the loader's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from regauge import hf
from regauge.errors import BadInput, CheckpointError, Refused, TraceError
from regauge.hf import checkpoint_names, load_meta
from regauge.inputs import example_inputs
from regauge.ties import untied_config
from regauge.trace import trace

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEQUENCE: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma3_text": {
        **TEXT,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": TEXT,
    "bert": TEXT,
    "t5": {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "whisper": {**SEQUENCE, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
    "mixtral": {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4},
    "vit": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    },
    "wav2vec2": {
        **TEXT,
        "conv_dim": [16, 16],
        "conv_kernel": [10, 3],
        "conv_stride": [5, 2],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}


def config(name: str) -> dict[str, Any]:
    return {"model_type": name, **CONFIGS[name]}


def real_model(held: hf.HFModel, seed: int = 0) -> nn.Module:
    """The same class with weights, made in the ordinary way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, held.class_name)(held.config).eval()


@pytest.fixture(autouse=True)
def _quiet_progress() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_on_meta_has_the_names_shapes_ties_and_buffers_of_the_real_one(name: str) -> None:
    held = load_meta(config(name))
    real = real_model(held)
    assert all(t.device.type == "meta" for t in (*held.model.parameters(), *held.model.buffers()))
    assert all(t.device.type == "meta" for t in held.inputs.values())
    assert not any(module.training for module in held.model.modules())
    meta_state, state = held.model.state_dict(keep_vars=True), real.state_dict(keep_vars=True)
    assert {n: (t.shape, t.dtype) for n, t in meta_state.items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    assert _ties(held.model) == _ties(real)
    wanted = {
        n: b
        for n, b in real.named_buffers(remove_duplicate=False)
        if n not in state or not b.is_floating_point()
    }
    buffers = held.buffers()
    assert set(buffers) == set(wanted)
    for key, buffer in wanted.items():
        assert torch.equal(buffers[key], buffer), key


def _ties(model: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_real_inputs_can_be_run_and_have_the_shapes_of_the_example(name: str) -> None:
    held = load_meta(config(name), batch=2, length=5)
    inputs = held.real_inputs(batch=2, length=5, seed=3)
    assert {n: (t.shape, t.dtype) for n, t in inputs.items()} == {
        n: (t.shape, t.dtype) for n, t in held.inputs.items()
    }
    with torch.no_grad():
        result = real_model(held)(**inputs)
    assert torch.isfinite(result[0] if "logits" not in result else result.logits).all()


def test_inputs_depend_on_the_seed_alone_and_avoid_special_tokens() -> None:
    held = load_meta(config("llama"))
    first = held.real_inputs(batch=50, length=7, seed=1)["input_ids"]
    torch.manual_seed(99)
    assert torch.equal(first, held.real_inputs(batch=50, length=7, seed=1)["input_ids"])
    assert not torch.equal(first, held.real_inputs(batch=50, length=7, seed=2)["input_ids"])
    assert int(first.max()) < 61
    assert set(first.unique().tolist()) == set(range(3, 61))


def test_a_text_is_no_longer_than_the_positions_a_model_has() -> None:
    held = load_meta(config("gpt2"), length=100)
    assert held.inputs["input_ids"].shape == (3, 16)


def test_inputs_are_given_in_the_dtype_of_the_model() -> None:
    held = load_meta({**config("vit"), "dtype": "bfloat16"})
    assert held.inputs["pixel_values"].dtype is torch.bfloat16
    assert held.real_inputs(batch=1, length=1, seed=0)["pixel_values"].dtype is torch.bfloat16


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_experts_can_be_traced_without_weights(experts: str) -> None:
    held = load_meta(config("mixtral"), experts=experts)
    traced = trace(held.model, kwargs=held.inputs)
    assert any("experts" in name for name in traced.parameters.values())


def test_nothing_is_left_changed_in_torch_or_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    logging = transformers.utils.logging
    before, drawn = logging.get_verbosity(), torch.rand

    class Drawing(transformers.BertModel):
        def __init__(self, config: Any) -> None:
            drawn(3)
            super().__init__(config)

    monkeypatch.setattr(hf, "model_class_of", lambda config: Drawing)
    logging.set_verbosity(logging.CRITICAL)
    try:
        state = torch.random.get_rng_state()
        load_meta(config("bert"))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert logging.get_verbosity() == logging.CRITICAL
    finally:
        logging.set_verbosity(before)
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.empty(1 << 17).device.type == "cpu"


def test_no_cache_is_part_of_the_function() -> None:
    held = load_meta({**config("llama"), "architectures": ["LlamaModel"]})
    with torch.no_grad():
        result = real_model(held)(**held.real_inputs(batch=1, length=3, seed=0))
    assert set(result) == {"last_hidden_state"}


def test_a_config_object_is_left_as_it_is() -> None:
    given = transformers.LlamaConfig(**CONFIGS["llama"])
    before = given.to_dict()
    load_meta(given)
    assert given.to_dict() == before
    assert given.use_cache is True


def test_large_empty_tensors_are_spared_and_a_buffer_made_of_one_is_still_real(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model(transformers.PreTrainedModel):
        config_class = transformers.ViTConfig
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            table = torch.empty(100)
            table[:] = torch.arange(100.0)
            self.register_buffer("table", table, persistent=False)
            self.register_buffer("again", table, persistent=False)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values

    monkeypatch.setattr(hf, "model_class_of", lambda config: Model)
    monkeypatch.setattr(hf, "LARGE", 10)
    held = load_meta(config("vit"))
    assert torch.equal(held.buffers()["table"], torch.arange(100.0))
    assert torch.equal(held.buffers()["again"], torch.arange(100.0))
    assert held.model.get_buffer("table") is held.model.get_buffer("again")


def test_a_waveform_has_as_many_frames_as_tokens_were_asked_for() -> None:
    held = load_meta(config("wav2vec2"), length=5)
    samples = held.inputs["input_values"].shape[1]
    with torch.no_grad():
        frames = [held.model(torch.empty(1, n, device="meta"))[0].shape[1] for n in (samples - 1, samples)]
    assert frames == [4, 5]


def test_the_dtype_is_the_one_of_the_config_and_otherwise_the_one_given() -> None:
    def dtype(held: hf.HFModel) -> torch.dtype:
        return next(held.model.parameters()).dtype

    assert dtype(load_meta(config("bert"))) is torch.float32
    assert dtype(load_meta(config("bert"), dtype=torch.bfloat16)) is torch.bfloat16
    assert dtype(load_meta({**config("bert"), "dtype": "float16"}, dtype=torch.bfloat16)) is torch.float16


# -- what cannot be used ----------------------------------------------------------------------------


def test_a_directory_needs_a_config_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        load_meta(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config("bert"), "architectures": ["BertModel"]}))
    assert load_meta(tmp_path).class_name == "BertModel"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "no-such-model"}', "cannot read this config"),
        ('{"model_type": "bert", "architectures": ["NoSuchClass"]}', "no model class of this name"),
        ('{"model_type": "bert", "quantization_config": {"bits": 4}}', "quantised"),
    ],
)
def test_an_unusable_config_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        load_meta(tmp_path)


def test_a_config_that_builds_nothing_is_a_trace_error() -> None:
    with pytest.raises(TraceError, match="cannot be built") as caught:
        load_meta({**config("llama"), "hidden_act": "no-such-function"})
    assert "sdpa" in str(caught.value)


def test_an_input_of_unknown_sort_is_named() -> None:
    class Model(nn.Module):
        main_input_name = "smells"

        def forward(self, smells: torch.Tensor) -> torch.Tensor:
            return smells

    with pytest.raises(TraceError, match="smells"):
        example_inputs(Model(), transformers.BertConfig())


# -- names in a checkpoint --------------------------------------------------------------------------


def stored_names(directory: Path) -> list[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "whisper", "vit", "t5", "resnet"])
def test_each_name_leads_to_the_tensor_that_the_loader_puts_there(name: str, tmp_path: Path) -> None:
    real = real_model(load_meta(config(name)))
    with torch.no_grad():
        for index, tensor in enumerate(dict.fromkeys(real.parameters())):
            tensor.fill_(index + 1)
    real.save_pretrained(tmp_path)
    held = load_meta(tmp_path)
    names = checkpoint_names(held, stored_names(tmp_path))
    loaded = getattr(transformers, held.class_name).from_pretrained(tmp_path).state_dict()
    parameters = {n for n, _ in held.model.named_parameters(remove_duplicate=False)}
    assert parameters <= set(names)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for model_name, tensor_name in names.items():
            assert torch.equal(file.get_tensor(tensor_name), loaded[model_name]), model_name


def test_the_base_model_finds_its_tensors_in_the_checkpoint_of_the_full_one(tmp_path: Path) -> None:
    full = real_model(load_meta(config("llama")))
    full.save_pretrained(tmp_path)
    base = load_meta({**config("llama"), "architectures": ["LlamaModel"]})
    names = checkpoint_names(base, stored_names(tmp_path))
    assert names["norm.weight"] == "model.norm.weight"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    held = load_meta({**config("llama"), "tie_word_embeddings": False})
    names = [name for name in held.model.state_dict() if name != "model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        checkpoint_names(held, names)


def test_tensors_that_the_loader_converts_are_refused_and_the_state_dict_is_not(tmp_path: Path) -> None:
    held = load_meta(config("mixtral"))
    real = real_model(held)
    real.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="another layout") as caught:
        checkpoint_names(held, stored_names(tmp_path))
    assert "experts.0" in str(caught.value)
    save_file(dict(real.state_dict()), tmp_path / "model.safetensors")
    names = checkpoint_names(held, stored_names(tmp_path))
    assert all(model_name == tensor_name for model_name, tensor_name in names.items())


# -- untying ----------------------------------------------------------------------------------------


def test_untying_is_found_and_verified() -> None:
    given = config("llama")
    changes = untied_config(given)
    assert changes == {"tie_word_embeddings": False}
    assert all(len(group) == 1 for group in _ties(load_meta({**given, **changes}).model))
    assert given == config("llama")


def test_untying_reaches_a_nested_text_config() -> None:
    nested = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", **CONFIGS["llama"]},
        "vision_config": {"model_type": "clip_vision_model", **CONFIGS["vit"]},
        "image_token_index": 60,
        "tie_word_embeddings": True,
    }
    changes = untied_config(nested)
    assert changes["text_config"]["tie_word_embeddings"] is False
    assert changes["tie_word_embeddings"] is False


def test_a_model_that_is_always_tied_is_refused() -> None:
    with pytest.raises(Refused, match="keeps its parameters tied"):
        untied_config(config("t5"))
