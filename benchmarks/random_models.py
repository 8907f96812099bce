"""Models with random weights, of any size, for what does not depend on what a model has learnt."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel


def llama_config(
    width: int,
    layers: int,
    heads: int,
    vocabulary: int,
    context: int,
    inner: int | None = None,
    groups: int | None = None,
) -> PreTrainedConfig:
    """Describe a llama.

    Args:
        width: Of the residual stream.
        layers: Number of layers.
        heads: Attention heads.
        vocabulary: Number of tokens; embeddings and head share their weights.
        context: Positions.
        inner: Width of the MLP, four times `width` by default.
        groups: Heads of keys and values, as many as heads by default.
    """
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups or heads,
        intermediate_size=inner or 4 * width,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )


def llama(**sizes: Any) -> PreTrainedModel:
    """A llama with the sizes of `llama_config`, in float32."""
    return AutoModelForCausalLM.from_config(llama_config(**sizes))


def gpt2(width: int, layers: int, heads: int, vocabulary: int, context: int) -> PreTrainedModel:
    """A GPT-2 as near as it gets to x-transformers' defaults: exact GELU, no dropout, a head of its own."""
    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=context,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config)
