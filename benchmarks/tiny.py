"""Tiny configurations of any model type: a generic shrinker over the fields a configuration has.

Nothing here says what a model computes; a field is recognised by its name and gets a small value, lists
keep their length, nested configurations are shrunk alike. Several variants are offered, as some types
need their sizes to agree in one way and some in another.
"""

# ruff: noqa: E501
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The numbers of one variant."""

    hidden: int = 32
    heads: int = 4
    kv: int = 2
    head: int | None = 8
    inner: int = 56
    layers: int = 2
    vocab: int = 97
    image: int = 32
    patch: int = 8
    rope: int = 4
    lists: bool = True
    types: bool = True
    fill: bool = False


VARIANTS = (
    Sizes(),
    Sizes(types=False),
    Sizes(fill=True),
    Sizes(head=None),
    Sizes(kv=4, rope=8),
    Sizes(kv=4, rope=8, fill=True),
    Sizes(kv=4, head=None, types=False),
    Sizes(hidden=64, inner=128, layers=4, image=64, patch=16),
    Sizes(hidden=64, inner=128, kv=4, layers=4, head=None, lists=False, types=False),
    Sizes(hidden=64, heads=4, head=16, inner=64, image=64, patch=4),
    Sizes(hidden=128, heads=4, head=32, inner=128, layers=3, image=128, patch=16, lists=False),
)

_INTS: tuple[tuple[str, str], ...] = (
    (r"(^|_)vocab_size", "vocab"),
    (r"num_feat_extract_layers$", "keep"),
    (r"(^|_)(num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|n_head_kv|num_attention_groups)$", "kv"),
    (r"(num_experts_per_tok|top_k_experts|moe_topk|moe_top_k|moe_k|topk|top_k|num_selected_experts|router_topk)$", "two"),
    (r"(n_group|topk_group|num_expert_group|n_groups_moe)$", "one"),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts|n_experts)$", "four"),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace|moe_layer_start_index)$", "one"),
    (r"(q_lora_rank|kv_lora_rank|low_rank|lora_rank|o_lora_rank)$", "sixteen"),
    (r"(qk_rope_head_dim|rotary_dim|rope_head_dim)$", "rope"),
    (r"qk_head_dim$", "query"),
    (r"num_kv_shared_layers$", "none"),
    (r"(head_dim|d_kv|qk_nope_head_dim|v_head_dim|kv_channels|attention_head_size|head_size|global_head_dim"
     r"|key_length|attn_head_dim|d_head|linear_key_head_dim|linear_value_head_dim|head_width)$", "head"),
    (r"(linear_num_key_heads|linear_num_value_heads)$", "kv"),
    (r"(num_attention_heads|n_head|n_heads|num_heads|attention_heads|num_head|nhead|attn_heads)$", "heads"),
    (r"(moe_intermediate_size|shared_expert_intermediate_size|moe_ffn_hidden_size|expert_dim)$", "moe"),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|dim_feedforward|feed_forward_proj_dim|mlp_dim"
     r"|intermediate_size_mlp|inner_dim|d_inner|ff_dim|mlp_hidden_size|mlp_size)$", "inner"),
    (r"(num_hidden_layers|n_layer|num_layers|encoder_layers|decoder_layers|n_layers|num_encoder_layers"
     r"|num_decoder_layers|num_blocks|depth|num_hidden_groups_|layers)$", "layers"),
    (r"(hidden_size|d_model|n_embd|n_embed|embed_dim|hidden_dim|embedding_size|model_dim|emb_dim|d_embed"
     r"|word_embed_proj_dim|decoder_hidden_size|encoder_hidden_size|projection_dim|hidden_size_per_layer_input"
     r"|lru_width|attention_hidden_size|output_hidden_size|output_dim|proj_size|decoder_hidden_dim|dim|width"
     r"|num_channels_latents|hidden_channels|out_hidden_size|attention_dim|embed_size|d_embedding)$", "hidden"),
    (r"(max_position_embeddings|n_positions|max_target_positions|max_sequence_length|max_seq_len|context_length"
     r"|n_ctx|max_length_embeddings|seq_length|block_size|max_text_len)$", "positions"),
    (r"(max_source_positions|max_bert_positions)$", "ten"),
    (r"(image_size|img_size|input_size|crop_size)$", "image"),
    (r"(patch_size|decoder_patch)$", "patch"),
    (r"(num_mel_bins|feature_size|input_feat_per_channel|feature_projection_input_dim)$", "sixteen"),
    (r"(state_size|ssm_state_size|mamba_d_state|time_step_rank|mamba_dt_rank|d_state)$", "four"),
    (r"(num_conv_pos_embeddings)$", "head_or_eight"),
    (r"(num_conv_pos_embedding_groups|mamba_n_groups|n_groups)$", "two"),
    (r"(mamba_n_heads|mamba_num_heads)$", "eight"),
    (r"(mamba_d_head|mamba_head_dim)$", "eight"),
    (r"(conv_depthwise_kernel_size)$", "three"),
    (r"(codevector_dim|tdnn_dim|adapter_size|conv_channels|classifier_proj_size|xvector_output_dim)$", "sixteen"),
    (r"(type_vocab_size)$", "two"),
    (r"(num_groups|norm_groups|num_frames)$", "four"),
    (r"(window_size|sliding_window|local_window_size|attention_window_size)$", "four"),
    (r"(chunk_size|attention_chunk_size)$", "keep_small"),
    (r"(num_queries|num_query_tokens|num_latents|num_register_tokens|num_cls_tokens)$", "three_at_most"),
)  # fmt: skip

_WIDTHS = re.compile(
    r"(hidden_sizes|embed_dims|embed_dim|encoder_hidden_sizes|dims|channels|neck_hidden_sizes|widths|encoder_channels|decoder_hidden_sizes|conv_dim|stage_channels|hidden_dims|layer_channels|head_hidden_sizes|out_channels|in_channels|num_channels|mid_channels|decoder_channels|upsampling_channels|stem_channels)$"
)
_HEADS = re.compile(r"(num_heads|num_attention_heads|num_head|encoder_num_heads)$")
_DEPTHS = re.compile(
    r"(depths|layers_per_block|num_layers|block_depths|encoder_depths|stage_numb_of_layers|stage_num_blocks|num_block_repeats_|layer_depths|depth|block_repeats)$"
)


def tiny_configs(config_class: type[Any]) -> Iterator[Any]:
    """Small configurations of the class, the most preferred first; those that cannot be made are left out.

    Raises:
        Exception: whatever the class raises when none can be made.
    """
    default = config_class()
    last: Exception | None = None
    made = 0
    seen: set[str] = set()
    for sizes in VARIANTS:
        try:
            config = config_class(**_fields(default, sizes))
            text = repr(sorted(config.to_dict().items(), key=lambda kv: str(kv[0])))
        except Exception as error:
            last = error
            continue
        if text in seen:
            continue
        seen.add(text)
        made += 1
        yield config
    if not made and last is not None:
        raise last


def _fields(config: Any, sizes: Sizes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    nested = getattr(config, "sub_configs", None) or {}
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    layers = next((values[k] for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if isinstance(values.get(k), int)), None)  # fmt: skip
    special = 0
    count = sizes.layers
    kinds = values.get("layer_types")
    if sizes.types and isinstance(kinds, (list, tuple)) and kinds:
        chosen = list(dict.fromkeys(kinds))[:3]
        while len(chosen) < count:
            chosen.append(chosen[-1])
        count = len(chosen)
        fields["layer_types"] = chosen
    for name, value in values.items():
        if name in nested:
            inner = value if hasattr(value, "to_dict") else None
            if inner is not None:
                fields[name] = {"model_type": inner.model_type, **_fields(inner, sizes)}
            continue
        if name in fields or name in ("transformers_version", "architectures", "num_labels"):
            continue
        if re.search(r"(_token_id|_token_index|_token_ids)$", name):
            if isinstance(value, int) and not isinstance(value, bool):
                fields[name] = special % 8
                special += 1
            elif isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
                fields[name] = [special % 8]
                special += 1
            continue
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            number = _number(name, value, sizes, count)
            if number is not None and number != value:
                fields[name] = number
        elif isinstance(value, (list, tuple)) and value and sizes.lists:
            items = _items(name, value, sizes, layers, count)
            if items is not None:
                fields[name] = type(value)(items)
        elif isinstance(value, Mapping) and name in ("backbone_config",):
            continue
    heads = {"expand", "num_heads", "head_dim", "state_size"}
    if heads <= set(values) and isinstance(values["expand"], int) and sizes.head:
        fields["num_heads"] = sizes.hidden * values["expand"] // sizes.head
    if values.get("languages") and values.get("default_language", "") is None:
        fields["default_language"] = values["languages"][0]
    for name, number in (("head_dim", sizes.head), ("num_key_value_heads", sizes.kv), ("vocab_size", sizes.vocab),
                         ("mask_token_id", 4), ("pad_token_id", 0), ("n_routed_experts", 4), ("num_experts", 4),
                         ("n_shared_experts", 1), ("n_group", 1), ("topk_group", 1), ("num_experts_per_tok", 2)):  # fmt: skip
        if name in values and values[name] is None and number is not None and sizes.fill:
            fields[name] = number
    if "attention_types" in fields or "attention_types" in values:
        fields["attention_types"] = [[["global", "local"], 1]]
    return fields


def _number(name: str, value: int, sizes: Sizes, layers: int) -> int | None:
    if value <= 0:
        return None
    role = next((role for pattern, role in _INTS if re.search(pattern, name)), None)
    if role is None:
        return min(value, 64) if value > 512 and "id" not in name.split("_") else None
    if role == "layers":
        return min(value, layers)
    if role == "heads":
        return min(value, sizes.heads) if value > 1 else 1
    if role == "kv":
        return min(value, sizes.kv) if value > 1 else 1
    if role == "head":
        return sizes.head
    if role == "query":
        return None if sizes.head is None else sizes.head + sizes.rope
    if role == "keep":
        return None
    if role == "none":
        return 0
    if role == "positions":
        return min(value, 64)
    if role == "three_at_most":
        return min(value, 3)
    if role == "keep_small":
        return min(value, 16)
    fixed = {"one": 1, "two": 2, "three": 3, "four": 4, "eight": 8, "ten": 10, "sixteen": 16, "moe": 24,
             "head_or_eight": 8}  # fmt: skip
    if role in fixed:
        return min(value, fixed[role])
    return min(value, int(getattr(sizes, role)))


def _items(name: str, value: Any, sizes: Sizes, layers: int | None, count: int) -> list[Any] | None:
    if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if name in ("image_size", "img_size"):
            return [sizes.image] * len(value)
        if _DEPTHS.search(name):
            return [1] * len(value)
        if _HEADS.search(name):
            return [2**i for i in range(len(value))]
        if _WIDTHS.search(name) and len(value) > 1 and min(value) > 3:
            rising = value[-1] > value[0]
            falling = value[-1] < value[0]
            base = sizes.hidden // 2
            if rising:
                return [base * 2**i for i in range(len(value))]
            if falling:
                return [base * 2 ** (len(value) - 1 - i) for i in range(len(value))]
            return [base] * len(value)
    if layers is not None and len(value) == layers and layers > count:
        return list(value[:count])
    return None
