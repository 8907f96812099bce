"""Bases: which architectures can be composed, where their layers and residual streams are, and how to cut them."""

from __future__ import annotations

import copy
import inspect
import json
import re
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from calm.config import depth_of, text_config
from calm.errors import CalmError, UnsupportedModelError

# Architectures that the rules below accept or cannot judge, but that break an invariant. Found by
# docs/support_matrix.py, which tries every causal language model of the installed transformers.
_OWN_CACHE = "it keeps a cache of its own kind, which transformers' caches cannot stand for"
_NO_CACHE = "it keeps no cache, so it cannot decode token by token"
_DRAFTER = "it drafts for one larger model, whose states it reads, and does not run on its own"
UNSUPPORTED: dict[str, str] = {
    "blt": "its layers run over patches of bytes, which do not line up with the other model's tokens",
    "cpmant": "it puts prompt tokens of its own before the input, so its positions do not line up",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "hrm_text": "it runs its layers several times a token",
    "longcat_flash": "each of its layers counts as two in its configuration and in its cache",
    "minimax": _OWN_CACHE,
    "mllama": "its cross-attention layers run on images only, so that a connection there would do nothing",
    "openai-gpt": _NO_CACHE,
    "prophetnet": "it predicts several tokens at once, with several streams of positions",
    "reformer": "it hashes positions into buckets, so that a token changes what earlier ones see",
    "rwkv": _OWN_CACHE,
    "xlm": _NO_CACHE,
    "xlnet": "it attends in both directions",
    "xlstm": _OWN_CACHE,
}
UNSUPPORTED_AS_ANCHOR: dict[str, str] = {
    "git": "its loss counts image tokens, so it cannot be trained through on text",
}

# Augmenting models that are run whole: what a layer computes depends on how many there are.
_UNCUTTABLE = {"gpt_neox_japanese", "minicpm3", "zamba"}

# Layers put out several residual streams, and the field of the configuration that says how many: copies of the width
# side by side or stacked (hyper-connections).
_STREAMS = {"deepseek_v4": "hc_mult", "hy_v4": "hc_mult", "qwen4_exp_text": "hc_count"}

# Positions start after the padding token's index; those that transformers' generation passes start at 0, which is not
# how these models count in training.
_OFFSET_POSITIONS = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}

# Fields of a configuration that leave a model's logits as they are. What quantization changes, the weights show.
_NOT_COMPUTED = re.compile(
    "_name_or_path|architectures|dtype|transformers_version|quantization_config|id2label|label2id|problem_type|"
    "output_(attentions|hidden_states|router_logits)|return_dict|use_cache|.*_implementation|initializer_range|"
    ".*(dropout|dropout_prob|dropout_p|pdrop|layerdrop)|(bos|eos|pad)_token_id"
)

# Their own masks take the length of the cache for that of the sequence.
NO_STATIC_CACHE = {"gpt_neo"}

# They count ALiBi distances on the mask, and so want it as long as a static cache.
MASK_OF_CACHE_LENGTH = {"bloom"}

# Causal whatever their configuration's `is_decoder` says (it is False by default).
CAUSAL_ANYWAY = {"git", "gpt_neox", "gpt_neox_japanese", "trocr"}


def check_supported(config: PreTrainedConfig, role: str) -> None:
    """Refuse an architecture that cannot be composed, by name and with the reason.

    Args:
        config: The base's configuration.
        role: What to call it in the error, "anchor" or "augmenting model".

    Raises:
        UnsupportedModelError: With the architecture and the reason.
    """
    text = text_config(config)
    reasons = UNSUPPORTED | (UNSUPPORTED_AS_ANCHOR if role == "anchor" else {})
    reason = reasons.get(config.model_type) or reasons.get(text.model_type)
    if reason is None and config.model_type not in CONFIG_MAPPING:
        reason = (
            "transformers knows it only by code from its repository (trust_remote_code), without which the saved "
            "composition could not be read; register its classes with AutoConfig and AutoModelForCausalLM wherever it "
            "is composed and loaded"
        )
    if reason is None and config.is_encoder_decoder:
        reason = "it is an encoder-decoder; only decoder-only models are supported"
    both_ways = getattr(text, "is_causal", True) is False or (
        getattr(text, "use_bidirectional_attention", None) in (True, "all")
    )
    if reason is None and both_ways:
        reason = "its configuration makes it attend in both directions, so a composition would see future tokens"
    if reason is None and getattr(text, "is_decoder", True) is False and text.model_type not in CAUSAL_ANYWAY:
        reason = "it attends in both directions (is_decoder=False), so a composition would see future tokens"
    if reason is not None:
        raise UnsupportedModelError(f"The {role} has the architecture {config.model_type!r}: {reason}.")


def computation_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of its decoder's computation: with it and the weights, the logits are given.

    Args:
        config: A base's configuration.

    Returns:
        JSON values by field, without names, dtypes, quantization, dropout, kernels, special tokens.
    """
    text = text_config(config)
    kept = "pad_token_id" if text.model_type in _OFFSET_POSITIONS else None

    def computed(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: computed(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if key == kept or not _NOT_COMPUTED.fullmatch(key)
        }

    return computed(json.loads(text.to_json_string(use_diff=False)))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder stack of a model: embeddings and layers, without a language-model head."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model  # some heads are called `decoder`


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Find a model's decoder layers.

    The rule (transformers keeps no list): inside the decoder, the one `ModuleList` with as many entries as the
    configuration says there are layers; where several have that length, the one whose entries are of the class that
    the model records hidden states of, or else checkpointing layers.

    Raises:
        UnsupportedModelError: If there is not exactly one.
    """
    depth = depth_of(model.config)
    lists = [m for m in decoder_of(model).modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("hidden_states")
    recorded = getattr(recorded, "target_class", recorded)
    for layer_class in (recorded, GradientCheckpointingLayer):
        if isinstance(layer_class, type) and len(lists) != 1:
            lists = [entry for entry in lists if all(isinstance(layer, layer_class) for layer in entry)] or lists
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type!r}): found {len(lists)} lists of {depth} layers in its "
            "decoder, expected exactly one."
        )
    return lists[0]


def residual_of(output: Any, config: PreTrainedConfig) -> Tensor:
    """The residual stream in what a layer of a decoder puts out.

    Args:
        output: A tensor, or a tuple that starts with one.
        config: The model's configuration. Of several residual streams (hyper-connections) the mean is taken, of
            Gemma 3n's the one that is not a prediction.

    Returns:
        `[batch, length, width]`.
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    text = text_config(config)
    if text.model_type == "gemma3n_text":
        return hidden[text.altup_active_idx]
    if (field := _STREAMS.get(text.model_type)) is not None:
        return hidden.reshape(*hidden.shape[:2], getattr(text, field), -1).mean(2)
    return hidden


def add_to_residual(output: Any, injection: Tensor, config: PreTrainedConfig) -> Any:
    """What a layer puts out, with something added to the residual stream (to each of several) of `residual_of`.

    Args:
        output: As for `residual_of`.
        injection: `[batch, length, width]`.
        config: The model's configuration.

    Returns:
        The same structure as `output`.
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    text = text_config(config)
    if text.model_type == "gemma3n_text":
        active = torch.arange(len(hidden), device=hidden.device) == text.altup_active_idx
        hidden = hidden + injection * active.view(-1, 1, 1, 1)
    elif (field := _STREAMS.get(text.model_type)) is not None:
        streams = hidden.reshape(*hidden.shape[:2], getattr(text, field), -1)
        hidden = (streams + injection.unsqueeze(2)).reshape(hidden.shape)
    else:
        hidden = hidden + injection
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def runs_whole(config: PreTrainedConfig) -> bool:
    """Whether an augmenting model cannot be cut after a layer: what its layers compute depends on how many there are.

    They share keys and values, or have embeddings of their own, or the architecture is known for it.
    """
    text = text_config(config)
    fields = ("num_kv_shared_layers", "hidden_size_per_layer_input")
    return text.model_type in _UNCUTTABLE or any(getattr(text, field, None) for field in fields)


def kept_depth(config: PreTrainedConfig, depth: int) -> int:
    """How many layers an augmenting model keeps when it is wanted up to layer `depth`.

    Mostly `depth`. All, if it `runs_whole`. A few more, where all layers with attention, or all without, would be cut
    off from a model that has both: its forward pass asks the cache of either kind for its state.

    Args:
        config: The whole model's configuration.
        depth: Number of layers up to the last connected one.

    Returns:
        A number from `depth` to the whole model's.
    """
    text = text_config(config)
    full = depth_of(config)
    if runs_whole(config):
        return full
    layers = DynamicCache(config=text).layers
    for kind in (CacheLayerMixin, LinearAttentionCacheLayerMixin):
        first = next((i for i, layer in enumerate(layers) if isinstance(layer, kind)), 0)
        depth = max(depth, first + 1)
    return min(depth, full)


def truncate_config(config: PreTrainedConfig, depth: int) -> None:
    """Change a configuration, in place, to that of a model that ends after `kept_depth(config, depth)` layers."""
    text = text_config(config)
    full, depth = depth_of(config), kept_depth(config, depth)
    for key, value in list(vars(text).items()):
        per_layer = "layer" in key or key.endswith(("_types", "_pattern"))
        if per_layer and isinstance(value, list | tuple) and len(value) == full:
            setattr(text, key, value[:depth])
    text.num_hidden_layers = depth
    if "decoder_layers" in vars(text):  # the decoder of an encoder-decoder, on its own
        text.decoder_layers = depth


class CompositionHook:
    """A forward hook that a composition has on a layer of a base.

    It does not keep the composition alive, and a copy of the base alone leaves the composition behind.

    Args:
        model: The composed model.
        method: Name of its method that is called with `arguments` and the layer's output.
        arguments: First arguments of the method.
    """

    def __init__(self, model: nn.Module | None, method: str, *arguments: Any):
        self.model = weakref.ref(model) if model is not None else None
        self.method, self.arguments = method, arguments

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Return the layer's output with what the composition makes of it; `None` leaves it as it is."""
        model = self.model() if self.model is not None else None
        return getattr(model, self.method)(*self.arguments, output) if model is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> CompositionHook:
        model = self.model() if self.model is not None else None
        return CompositionHook(memo.get(id(model)) if model is not None else None, self.method, *self.arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return CompositionHook, (self.model() if self.model is not None else None, self.method, *self.arguments)


def contiguous_input(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook on a frozen head, which gets a view where only some positions' logits are wanted.

    Of a view, torch on a CPU multiplies each row of a batch by a copy of its own of weights that need no gradient: a
    third of the time of short answers (docs/dev/LOG.md, "copies of the head").
    """
    return (args[0].contiguous(), *args[1:]) if args else None


def truncated(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The first layers of a loaded model's decoder: new modules around the same weights, frozen.

    The given model is not changed (but for `requires_grad`), and hooks on the result do not touch it.

    Args:
        model: A loaded model, with or without a head.
        depth: How many layers are wanted; `kept_depth` says how many are kept.

    Returns:
        The decoder, truncated.
    """
    decoder = decoder_of(model)
    shared: dict[int, Any] = {id(t): t for t in (*decoder.parameters(), *decoder.buffers())}
    copied: PreTrainedModel = copy.deepcopy(decoder, shared)
    del layers_of(copied)[kept_depth(copied.config, depth) :]
    truncate_config(copied.config, depth)
    return freeze(copied)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off gradients of all weights, and keep a quantized model differentiable with respect to its input.

    On CPUs that multiply in bfloat16, bitsandbytes packs 4-bit weights anew in the first evaluation, for a kernel that
    has no gradient; training after an evaluation would stop there, with no more than a warning.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False)


def device_map_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where the parts of a model are that was spread over devices while it was loaded; else empty."""
    return dict(getattr(model, "hf_device_map", {}))


def runs_on(model: PreTrainedModel) -> torch.device:
    """Where the parts of a model run that are offloaded: on its first other device, or on the CPU.

    Args:
        model: A model with weights on the meta device; if it was not offloaded, that is where it is.
    """
    places = device_map_of(model)
    if not places:
        return torch.device("meta")
    return torch.device(next((place for place in places.values() if place not in ("cpu", "disk")), "cpu"))


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names of a model's forward parameters, `**` for arbitrary further ones."""
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


def position_offset(config: PreTrainedConfig) -> int:
    """The position of a model's first token, in the way it counts when it is given no positions."""
    text = text_config(config)
    return text.pad_token_id + 1 if text.model_type in _OFFSET_POSITIONS else 0


def context_of(config: PreTrainedConfig) -> int | None:
    """Longest sequence the model is made for, in tokens; `None` where the configuration states no limit.

    Scaled rotary positions reach further than `max_position_embeddings` where that states the length before scaling,
    as it does in linear and dynamic scaling, and may in YaRN. Scaling by kind of layer (Gemma 3) is included in it.
    """
    text = text_config(config)
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(limit * factor)
    if rope.get("rope_type") == "yarn":
        return max(limit, int((rope.get("original_max_position_embeddings") or limit) * factor))
    return limit - position_offset(config)


def smallest_context(anchor: PreTrainedConfig, augmenting: Mapping[str, PreTrainedConfig]) -> tuple[int | None, str]:
    """The smallest context of several models in tokens, `None` where none states a limit, and whose it is.

    Args:
        anchor: The anchor's configuration.
        augmenting: Those of the augmenting models, by name.

    Returns:
        The context, and what to call that model in an error.
    """
    bases = {"the anchor": anchor, **{f"the augmenting model {name!r}": base for name, base in augmenting.items()}}
    contexts = [(limit, role) for role, base in bases.items() if (limit := context_of(base)) is not None]
    return min(contexts, default=(None, ""))


def known_tokens(anchor: PreTrainedConfig, augmenting: Mapping[str, PreTrainedConfig]) -> int | None:
    """The smallest vocabulary of several models, `None` if all are alike.

    Those of one tokenizer may have embeddings that are padded differently (Qwen2.5-7B and -0.5B).
    """
    sizes = _vocabularies(anchor, augmenting)
    return min(sizes) if len(sizes) > 1 else None


def smallest_vocabulary(anchor: PreTrainedConfig, augmenting: Mapping[str, PreTrainedConfig]) -> int | None:
    """The smallest vocabulary of several models, `None` if none states its size."""
    return min(_vocabularies(anchor, augmenting), default=None)


def _vocabularies(anchor: PreTrainedConfig, augmenting: Mapping[str, PreTrainedConfig]) -> set[int]:
    stated = (getattr(text_config(base), "vocab_size", None) for base in (anchor, *augmenting.values()))
    return {size for size in stated if size is not None}


def check_documents_apart(anchor: PreTrainedModel, augmenting: nn.ModuleDict) -> None:
    """Refuse rows that hold several documents for bases that let a document see the ones before it.

    Some architectures ignore positions that start anew. Tried on the bases at hand: whether a document's states are
    the same behind another document as they are alone.

    Args:
        anchor: The anchor.
        augmenting: The augmenting decoders by name.

    Raises:
        CalmError: Naming the base.
    """
    bases = {"the anchor": decoder_of(anchor)}
    bases |= {f"the augmenting model {name!r}": cast(PreTrainedModel, base) for name, base in augmenting.items()}
    for name, base in bases.items():
        if not _keeps_documents_apart(base):
            raise CalmError(
                f"packing = True: {name} (architecture {base.config.model_type!r}) does not keep the examples of a "
                "packed row apart; train with packing: false (a recipe's batches then hold examples of about equal "
                "length; packing=False and padding_free=False in TRL)"
            )


def _keeps_documents_apart(decoder: PreTrainedModel) -> bool:
    if "position_ids" not in forward_parameters(decoder):
        return False
    ids = torch.arange(2, 18, device=decoder.device).remainder(text_config(decoder.config).vocab_size).unsqueeze(0)
    positions = torch.arange(8, device=decoder.device).repeat(2).unsqueeze(0)
    training = decoder.training
    decoder.eval()  # no dropout
    try:
        with torch.no_grad(), torch.autocast(decoder.device.type, enabled=False):
            packed = decoder(input_ids=ids, position_ids=positions, use_cache=False)[0][:, 8:].float()
            alone = decoder(input_ids=ids[:, 8:], position_ids=positions[:, 8:], use_cache=False)[0].float()
    finally:
        decoder.train(training)
    return bool((packed - alone).norm() < (1e-3 if decoder.dtype == torch.float32 else 3e-2) * alone.norm())
