"""Tiny random models of every causal-LM architecture of the installed transformers, by rules instead of one by one."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calm import backbones

VOCAB = 64
CONTEXT = 64
WINDOW = 4  # of sliding-window attention: shorter than any sequence of the checks


def architectures() -> list[str]:
    """Model types of every configuration class that the installed transformers maps to a causal language model."""
    classes = {CONFIG_MAPPING[name].model_type: CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return sorted(classes)


# Fields of configurations by name, first match counts; a value may be a function of (width, layers, heads).
RULES: list[tuple[str, Any]] = [
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|(shape|pronunciation)_vocab_size", VOCAB),
    (r"pad_token_id", 0),
    (r".*_(token_id|index)", 1),
    (r"encoder_layers|num_encoder_layers", 1),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers|num_blocks", lambda w, n, h: n),
    (r"num_key_value_heads|num_kv_heads|num_query_groups|swa_num_key_value_heads", lambda w, n, h: h // 2),
    (r"(swa_)?num_attention_heads|n_heads?|num_heads|((num_)?(en|de)coder_)?attention_heads", lambda w, n, h: h),
    (r"num_(en|de)coder_attention_heads|linear_num_(value_)?heads|index_n_heads", lambda w, n, h: h),
    (r"linear_num_key_heads", lambda w, n, h: h // 2),
    (r"hidden_size|d_model|n_embd|embedding_(dim|size)|emb_dim|word_embed_proj_dim", lambda w, n, h: w),
    (r"lru_width|(pronunciation|shape)_embed_dim|.*put_embedding_size", lambda w, n, h: w),
    (
        r".*intermediate_size(_mlp)?|(.*_)?ffn_dim|.*ffn_hidden_size|dim_ff|dff|feed_forward_size|d_inner",
        lambda w, n, h: 2 * w,
    ),
    (r"(swa_)?head_dim|dim_head|d_head|kv_channels|v_head_dim|qk_(nope|rope)_head_dim", lambda w, n, h: w // h),
    (r"index_head_dim|attention_head_(size|dim)|linear_(key_|value_)?head_dim", lambda w, n, h: w // h),
    (r"qk_head_dim", lambda w, n, h: 2 * (w // h)),
    (r"rotary_dim", lambda w, n, h: w // h // 2),
    (r"query_pre_attn_scalar|index_topk|hidden_size_per_layer_input|.*_rank", 8),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"n_group|num_expert_group|topk_group|n_shared_experts|(moe_)?num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(original_)?max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(source|target)_positions", CONTEXT),
    (r"context_length|model_max_length", CONTEXT),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size", WINDOW),
    (r"state_size|mamba_d_state|ssm_state_size", 4),
    (r"(mamba_)?chunk_size", WINDOW),
    (r"initializer_range|init_std", 0.2),
    (r".*drop(out|_prob|_rate)?|.*_pdrop|layerdrop", 0.0),
]
# Lists with one entry a layer: the tiny model gets every kind of entry, in order of appearance.
PER_LAYER = r"layer_types|.*_layer_types|layers_block_type|block_types|indexer_types|attn_layers"

# What the rules cannot know, by model type: (width, layers, heads) -> fields. Kinds of layers are put where a model
# that is cut after its second layer still has each of them.
_MAMBA2 = lambda w, n, h: {"mamba_n_heads": h, "mamba_d_head": 2 * w // h}  # noqa: E731
_QWEN4 = lambda w, n, h: {  # noqa: E731
    "layer_types": _cover(["linear_attention", "indexed_attention"], n),
    "indexer_n_heads": h,
    "indexer_kv_heads": 1,
    "indexer_head_dim": w // h,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 101,
    "split_ngram_parts": 1,
}
_SHARING = lambda w, n, h: {  # noqa: E731
    "layer_types": ["sliding_attention"] + ["full_attention"] * (n - 1),
    "num_kv_shared_layers": 1,
}
_NO_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
# Without these a configuration cannot be made at all.
NEEDED: dict[str, dict[str, Any]] = {"gemma4_assistant": {"text_config": {"model_type": "gemma4_text"} | _NO_INPUT}}
OVERRIDES: dict[str, Any] = {
    "bamba": lambda w, n, h: _MAMBA2(w, n, h) | {"attn_layer_indices": list(range(1, n, 2))},
    "cohere_compass_text": lambda w, n, h: {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": lambda w, n, h: {
        "attn_config": {"kv_n_heads": h // 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 2 * w, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": lambda w, n, h: {"num_experts_per_tok": 2},
    "dots1": lambda w, n, h: {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": lambda w, n, h: {"adapter_input_size": w, "adapter_out_dim": w},
    "dots3_note_vision_encoder": lambda w, n, h: {"adapter_in_dim": w, "adapter_out_dim": w},
    "dots3_note_text": lambda w, n, h: {
        "num_key_value_heads": h,
        "swa_num_attention_heads": h,
        "swa_num_key_value_heads": h,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 2 * (w // h),
        "swa_qk_nope_head_dim": w // h,
        "swa_v_head_dim": w // h,
    },
    "falcon_h1": lambda w, n, h: {"mamba_n_heads": h, "mamba_d_ssm": 2 * w},
    # a small image tower: the usual one has 300M parameters
    "gemma3n": lambda w, n, h: {"vision_config": {"model_type": "gemma3n_vision", "architecture": "test_resnet"}},
    "gemma3n_text": _SHARING,
    "gemma4_assistant": lambda w, n, h: NEEDED["gemma4_assistant"],
    "gemma4_unified_text": lambda w, n, h: {"layer_types": _cover(["full_attention", "sliding_attention"], n)},
    "gemma4_text": _SHARING,
    "gpt_neo": lambda w, n, h: {"attention_types": [[["global", "local"], n // 2], [["global"], n % 2]]},
    "granitemoehybrid": lambda w, n, h: (
        _MAMBA2(w, n, h) | {"layer_types": _cover(["linear_attention", "full_attention"], n)}
    ),
    "jamba": lambda w, n, h: {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": lambda w, n, h: {"layer_types": _cover(["conv", "full_attention"], n)},
    "lfm2_moe": lambda w, n, h: {"layer_types": _cover(["conv", "full_attention"], n)},
    "mamba2": lambda w, n, h: {"num_heads": h, "head_dim": 2 * w // h, "n_groups": 1},
    "modernbert-decoder": lambda w, n, h: {"layer_types": _cover(["full_attention", "sliding_attention"], n)},
    "mpt": lambda w, n, h: {"attn_config": {"attn_pdrop": 0}},
    "nemotron_h": lambda w, n, h: {"mamba_num_heads": h, "mamba_head_dim": 2 * w // h, "n_groups": 1},
    "qwen4_exp_text": _QWEN4,
    "reformer": lambda w, n, h: {
        "is_decoder": True,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (w // 2, w // 2),
        "attn_layers": ["local", "lsh", "local"][:n],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xlm": lambda w, n, h: {"causal": True},
    "xlstm": lambda w, n, h: {"hidden_size": 128, "embedding_dim": 128, "num_heads": h // 2},
    "xmod": lambda w, n, h: {"default_language": "en_XX"},
    "zamba": lambda w, n, h: {"layers_block_type": ["linear_attention"] + ["hybrid"] * (n - 1)},
    "zaya": lambda w, n, h: {"num_experts_per_tok": 1},
}


def _cover(values: list[Any], length: int) -> list[Any]:
    kinds = list(dict.fromkeys(values))
    return [kinds[i % len(kinds)] for i in range(length)]


def _fields(config: PreTrainedConfig, width: int, layers: int, heads: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) or key in config.sub_configs:
            if isinstance(value, PreTrainedConfig):
                depth = layers if "text" in key or "decoder" in key else 1
                fields[key] = {"model_type": value.model_type} | _fields(value, width, depth, heads)
            continue
        if re.fullmatch(PER_LAYER, key) and isinstance(value, list | tuple) and value:
            fields[key] = _cover(list(value), layers)
            continue
        if isinstance(value, bool) or not isinstance(value, int | float | list | None):
            continue
        for pattern, new in RULES:
            if re.fullmatch(pattern, key):
                # None means "derived" for shapes and "off" for most else
                if value is not None or callable(new) or key == "pad_token_id":
                    fields[key] = new(width, layers, heads) if callable(new) else new
                break
    if "kv_lora_rank" in fields:  # multi-head latent attention has as many key as query heads
        fields["num_key_value_heads"] = heads
    if config.is_encoder_decoder:
        fields |= {key: layers for key in fields if key.endswith("encoder_layers")}
    if config.model_type in CONFIG_MAPPING:
        fields |= as_decoder(config.model_type)
    override = OVERRIDES.get(config.model_type)
    return fields | (override(width, layers, heads) if override else {})


def as_decoder(model_type: str) -> dict[str, bool]:
    """What a configuration has to say beside its defaults for the model to be a causal decoder."""
    config = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
    fields = vars(config)
    if config.is_encoder_decoder and any(key.endswith("decoder_layers") for key in fields):
        return {"is_encoder_decoder": False, "is_decoder": True}  # its decoder also exists on its own
    if fields.get("is_decoder") is False and model_type not in backbones.CAUSAL_ANYWAY:
        return {"is_decoder": True}
    return {}


def tiny_config(model_type: str, width: int = 32, layers: int = 3, heads: int = 4) -> PreTrainedConfig:
    """The configuration of a tiny model.

    Args:
        model_type: As transformers names it.
        width: Hidden size.
        layers: Number of decoder layers.
        heads: Number of attention heads.
    """
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_fields(config_class(**NEEDED.get(model_type, {})), width, layers, heads))


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32 and evaluation mode, whose weights are large enough to tell its tokens apart."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                weight += 0.1 * torch.randn_like(weight)
    return model.eval()
