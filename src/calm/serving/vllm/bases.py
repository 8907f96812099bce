"""The bases in vLLM: built from their configurations, augmenting models cut, and their layers hooked."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import PPMissingLayer

from calm import backbones
from calm.config import depth_of, text_config
from calm.errors import UnsupportedModelError
from calm.serving.vllm.checks import prepared
from calm.serving.vllm.connection import PaddedAttention


def build_anchor(config: PreTrainedConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """VLLM's model of a base, whole.

    Args:
        config: The base's configuration.
        vllm_config: Of the composition.
        prefix: Of the names of its layers.
    """
    return _build(prepared(config), vllm_config, prefix)


def build_augmenting(config: PreTrainedConfig, depth: int, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """VLLM's model of a base, cut after its last connected layer and without its head.

    What is cut off takes no memory and no time, and has no part of the cache.

    Args:
        config: The base's configuration, of the whole model.
        depth: How many layers are wanted.
        vllm_config: Of the composition.
        prefix: Of the names of its layers.
    """
    config = prepared(config)
    backbones.truncate_config(config, depth)
    model = _build(config, vllm_config, prefix)
    for name, child in model.named_children():
        if isinstance(child, ParallelLMHead):
            setattr(model, name, PPMissingLayer())
    return model


def _build(config: PreTrainedConfig, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    own = vllm_config.with_hf_config(config)
    text = own.model_config.hf_text_config = text_config(config)
    own.model_config.model_arch_config = own.model_config.get_model_arch_config()
    kinds = getattr(text, "layer_types", None) or ("sliding_attention",)  # of mixed ones, vLLM's layers know their own
    window = getattr(text, "sliding_window", None) if set(kinds) == {"sliding_attention"} else None
    own.cache_config = cache_config(vllm_config, window)
    model = initialize_model(own, prefix=prefix)
    layers = own.compilation_config.static_forward_context
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention) and not module.attn_backend.supports_head_size(module.head_size):
            del layers[module.layer_name]
            model.set_submodule(name, PaddedAttention(module, own.cache_config))
    return model


def cache_config(vllm_config: VllmConfig, sliding_window: int | None) -> CacheConfig:
    """The composition's cache settings, with the sliding window of one of its parts: vLLM derives the anchor's."""
    own = copy.copy(vllm_config.cache_config)
    own.sliding_window = sliding_window
    return own


def layers_of(model: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    """The layers of vLLM's model of a base.

    Args:
        model: The model.
        config: Its configuration, of the model as it was built.

    Raises:
        UnsupportedModelError: If there is not exactly one list of as many layers as it should have.
    """
    depth = depth_of(config)
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"vLLM's {type(model).__name__} has {len(found)} lists of {depth} layers, expected exactly one."
        )
    return found[0]


def residual_of(output: Any) -> torch.Tensor:
    """The residual stream in what a layer puts out, `[tokens, width]`.

    Args:
        output: Of vLLM's own layers the last sublayer's output and the stream it is yet to be added to; of others, and
            of transformers' layers in vLLM, the stream itself (the latter with a batch dimension).
    """
    if isinstance(output, tuple):
        hidden, residual = output
        return hidden + residual
    return output.flatten(0, -2)


def add_to_residual(output: Any, injection: torch.Tensor) -> Any:
    """What a layer puts out, with something added to the residual stream.

    Args:
        output: As for `residual_of`.
        injection: `[tokens, width]`.

    Returns:
        The same structure as `output`.
    """
    if isinstance(output, tuple):
        return injection, residual_of(output)  # the next norm adds the two
    return output + injection.view_as(output)
