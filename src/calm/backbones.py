"""Bases: load, freeze, truncate and fingerprint them, and find their layers."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file, logging

from calm.config import CalmConfig, depth_of, text_config, width_of
from calm.errors import CheckpointError, TokenizerMismatchError, UnsupportedModelError

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

# Their own masks take the length of the cache for that of the sequence.
NO_STATIC_CACHE = {"gpt_neo"}

# They count ALiBi distances on the mask, and so want it as long as a static cache.
MASK_OF_CACHE_LENGTH = {"bloom"}

# Causal whatever their configuration's `is_decoder` says (it is False by default).
CAUSAL_ANYWAY = {"git", "gpt_neox", "gpt_neox_japanese", "trocr"}

FINGERPRINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_KWARGS = ("token", "cache_dir", "force_download", "local_files_only", "trust_remote_code")
_FLOATS = set(FINGERPRINT_DTYPES.values())


class _IncompleteError(CheckpointError):
    """Weights that a model needs are not among a checkpoint's."""


@dataclass(frozen=True)
class Source:
    """Where a base comes from, as a user wrote it: a hub name, a folder, or a GGUF file.

    Attributes:
        name_or_path: What transformers' `from_pretrained` takes.
        gguf_file: File within it, for GGUF.
        revision: Branch, tag or commit of a hub repository.
    """

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str | os.PathLike[str], revision: str | None = None) -> Source:
        """Read `folder/model.gguf` (a file) and `owner/repository/model.gguf` (on a hub) apart from names and folders.

        Raises:
            CheckpointError: If a path that can only be local does not exist.
        """
        text = os.fspath(name)
        if text.endswith(".gguf"):
            path = Path(text)
            if path.is_file():
                return cls(str(path.parent), path.name, revision)
            parts = text.split("/")
            if len(parts) == 3 and not text.startswith((".", "~")):
                return cls("/".join(parts[:2]), parts[2], revision)
            raise CheckpointError(f"{text!r}: no such GGUF file. Give its path, or OWNER/REPOSITORY/FILE.gguf.")
        if not Path(text).is_dir() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
            raise CheckpointError(f"{text!r}: no such folder. Give the folder that holds config.json, or a hub name.")
        return cls(text, None, revision)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`."""
        return {key: value for key, value in (("gguf_file", self.gguf_file), ("revision", self.revision)) if value}


def load_config(source: Source, **load_kwargs: Any) -> PreTrainedConfig:
    """Load a base's configuration.

    Args:
        source: Where it is.
        load_kwargs: Those of the weights; the ones that concern finding files are used.

    Raises:
        CheckpointError: If there is none, or its architecture is unknown to the installed transformers.
    """
    hub_kwargs = {key: load_kwargs[key] for key in HUB_KWARGS if key in load_kwargs}
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **source.arguments(), **hub_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"No usable configuration for {source.name_or_path!r}: {error}") from error


def load_anchor(source: Source, config: PreTrainedConfig, **load_kwargs: Any) -> PreTrainedModel:
    """Load a whole causal language model.

    Args:
        source: Where it is.
        config: From `load_config`.
        load_kwargs: For `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

    Raises:
        CheckpointError: If it is missing, unreadable or incomplete.
    """
    return freeze(_load(AutoModelForCausalLM, source, config, **load_kwargs))


def load_augmenting(source: Source, config: PreTrainedConfig, depth: int, **load_kwargs: Any) -> PreTrainedModel:
    """Load the first `depth` layers of a decoder; later layers and the head are never built.

    Args:
        source: Where it is.
        config: From `load_config`.
        depth: How many layers to keep.
        load_kwargs: For `from_pretrained`.

    Returns:
        The frozen, truncated decoder.

    Raises:
        CheckpointError: If it is missing, unreadable or incomplete.
    """
    if source.gguf_file is not None:  # the names of a GGUF file's weights are mapped by the whole configuration
        return truncated(load_anchor(source, config, **load_kwargs), depth)
    config = copy.deepcopy(config)
    truncate_config(config, depth)
    if type(config) in MODEL_MAPPING:
        try:
            return freeze(decoder_of(_load(AutoModel, source, config, **load_kwargs)))
        except _IncompleteError:
            pass  # the plain model has parts that a causal language model's checkpoint has not: poolers, encoders
    return freeze(decoder_of(_load(AutoModelForCausalLM, source, config, **load_kwargs)))


def _load(auto_class: Any, source: Source, config: PreTrainedConfig, **load_kwargs: Any) -> PreTrainedModel:
    try:
        with _quiet():  # the later layers' weights are unexpected on purpose
            model, info = auto_class.from_pretrained(
                source.name_or_path, config=config, output_loading_info=True, **source.arguments(), **load_kwargs
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot load {source.name_or_path!r}: {error}") from error
    if missing := sorted(info.get("missing_keys", ())):
        raise _IncompleteError(
            f"{source.name_or_path!r} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]!r} among "
            "them: its files are incomplete, or of another architecture."
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(source: Source, **load_kwargs: Any) -> PreTrainedTokenizerBase | None:
    """Load a base's tokenizer, `None` where it has none beside its weights."""
    hub_kwargs = {key: load_kwargs[key] for key in HUB_KWARGS if key in load_kwargs}
    arguments = source.arguments() | hub_kwargs
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **arguments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None
    if source.gguf_file is None:  # where there are no files, transformers makes up an empty tokenizer
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if not any(cached_file(source.name_or_path, file, **arguments, **lenient) for file in sorted(files)):
            return None
    return tokenizer


def check_same_tokenizer(
    anchor: PreTrainedTokenizerBase | None,
    augmenting: PreTrainedTokenizerBase | None,
    anchor_config: PreTrainedConfig,
    augmenting_config: PreTrainedConfig,
    names: tuple[str, str],
) -> None:
    """Refuse two bases whose tokens do not line up; without tokenizers, ask for equal vocabulary sizes.

    Args:
        anchor: The anchor's tokenizer, if known.
        augmenting: The augmenting model's tokenizer, if known.
        anchor_config: For the vocabulary size.
        augmenting_config: The same.
        names: What to call the two in the error.

    Raises:
        TokenizerMismatchError: Naming both.
    """
    advice = "Compose models that share a tokenizer; different tokenizers are not supported yet."
    if anchor is not None and augmenting is not None:
        ours, theirs = anchor.get_vocab(), augmenting.get_vocab()
        if ours != theirs:
            shared = len(ours.items() & theirs.items())
            raise TokenizerMismatchError(
                f"The anchor {names[0]} and the augmenting model {names[1]} have different tokenizers "
                f"({type(anchor).__name__} with {len(ours)} tokens, {type(augmenting).__name__} with {len(theirs)}; "
                f"{shared} tokens have the same id in both). {advice}"
            )
        return
    ours, theirs = (getattr(text_config(c), "vocab_size", None) for c in (anchor_config, augmenting_config))
    if ours != theirs:
        raise TokenizerMismatchError(
            f"The anchor {names[0]} has {ours} tokens and the augmenting model {names[1]} has {theirs}, so their "
            f"tokenizers seem to differ. {advice} If they do share one (only padding the embedding differently), pass "
            "anchor_tokenizer= and augmenting_tokenizer=."
        )


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


class CompositionHook(partial[Any]):
    """A forward hook of a composition on its anchor or augmenting model; a copy of the base leaves it behind."""


def _no_hook(*args: Any) -> None:
    """Stand for a `CompositionHook` in a copy."""


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
    hooks = (hook for module in decoder.modules() for hook in module._forward_hooks.values())
    shared |= {id(hook): _no_hook for hook in hooks if isinstance(hook, CompositionHook)}
    copied: PreTrainedModel = copy.deepcopy(decoder, shared)
    del layers_of(copied)[kept_depth(copied.config, depth) :]
    truncate_config(copied.config, depth)
    return freeze(copied)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Switch off gradients of all weights."""
    return model.requires_grad_(False)


def cache_argument(model: nn.Module) -> str:
    """The name under which a model's forward takes its cache."""
    return "past_key_values" if "past_key_values" in forward_parameters(model) else "cache_params"


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names of a model's forward parameters, `**` for arbitrary further ones."""
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


def position_offset(config: PreTrainedConfig) -> int:
    """The position of a model's first token, in the way it counts when it is given no positions."""
    text = text_config(config)
    return text.pad_token_id + 1 if text.model_type in _OFFSET_POSITIONS else 0


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a base with a NaN or an infinity among its weights: everything downstream would be NaN.

    Raises:
        CheckpointError: Naming the weight.
    """
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not torch.isfinite(weight).all():
            raise CheckpointError(
                f"The weight {key!r} of {name} holds NaN or infinite values: the base is damaged, load it anew."
            )


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digest every weight of a base, so that another one is told apart at loading.

    Integer checksums of the raw bits, which do not depend on device or order of summation. One digest for each dtype
    that the weights may be loaded in, because casting to a lower precision is deterministic.

    Args:
        model: The base.

    Returns:
        Digests by dtype name; a single one under `"stored"` for weights that are not plain floats (quantized); empty
        for weights that are not materialised.
    """
    weights = dict(model.named_parameters())
    if any(weight.is_meta for weight in weights.values()):
        return {}
    if not all(weight.dtype in _FLOATS for weight in weights.values()):
        return {"stored": _digest(weights, None)}
    return {name: _digest(weights, dtype) for name, dtype in FINGERPRINT_DTYPES.items()}


def _digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        data = weight.detach() if dtype is None else weight.detach().to(dtype)
        data = data.contiguous()
        bits = data.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()])
        bits = bits.reshape(-1, bits.shape[-1] if bits.dim() else 1)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        for sums in (bits.sum(-1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)):  # of rows and of columns, placed
            digest.update(f"{int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())},".encode())
    return digest.hexdigest()[:32]


def check_fingerprint(model: nn.Module, recorded: dict[str, str], name: str) -> None:
    """Refuse a base that is not the one a composition was trained against.

    Args:
        model: The base as loaded.
        recorded: From the checkpoint's reference; nothing is checked when it is empty.
        name: What to call the base in the error.

    Raises:
        CheckpointError: If its weights differ.
    """
    dtypes = {weight.dtype for weight in model.parameters()}
    if not recorded or any(weight.is_meta for weight in model.parameters()):
        return
    # with mixed dtypes the lowest precision decides, since casting down gives the same bits from either
    keys = [k for k, dtype in FINGERPRINT_DTYPES.items() if dtype in dtypes] if dtypes <= _FLOATS else []
    key = keys[-1] if keys else "stored"
    if keys and "stored" not in recorded:
        found = _digest(dict(model.named_parameters()), FINGERPRINT_DTYPES[key])
    else:
        found = _digest(dict(model.named_parameters()), None)
    if found != recorded.get(key):
        raise CheckpointError(
            f"The weights of {name} are not those that this composition was trained against (fingerprint {found}, "
            f"recorded {recorded.get(key)}). Load the right base, or pass verify_bases=False if the change is meant "
            "(for example another quantization of the same model)."
        )


def load_bases(
    config: CalmConfig,
    anchor: PreTrainedModel | str | os.PathLike[str] | None = None,
    augmenting: Any = None,
    verify: bool = True,
    **load_kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Load a composition's bases by their recorded references, or take those given by hand.

    Args:
        config: The composition.
        anchor: The anchor, or where it is now.
        augmenting: The augmenting model(s), or where they are now: one, or by name.
        verify: Compare fingerprints.
        load_kwargs: For `from_pretrained` of every base.

    Returns:
        The anchor, and the truncated augmenting models by name.

    Raises:
        CheckpointError: If one is missing, unreadable, or not the base that was trained against.
    """
    given: dict[str, Any] = {}
    if augmenting is not None:
        given = dict(augmenting) if isinstance(augmenting, Mapping) else {"": augmenting}
        if "" in given and len(config.augmenting_configs) == 1:
            given = {next(iter(config.augmenting_configs)): given[""]}
        if unknown := sorted(set(given) - set(config.augmenting_configs)):
            raise CheckpointError(
                f"augmenting={unknown or list(given)}: this composition has the augmenting models "
                f"{sorted(config.augmenting_configs)}; give them by name."
            )

    anchor_source = (
        None if isinstance(anchor, PreTrainedModel) else _find("the anchor", anchor, config.anchor_reference)
    )
    anchor_model = _take("the anchor", anchor, anchor_source, config.anchor_config, **load_kwargs)
    models = {}
    for name, expected in config.augmenting_configs.items():
        role = f"the augmenting model {name!r}"
        base, depth = given.get(name), config.augmenting_depth(name)
        source = None
        if not isinstance(base, PreTrainedModel):
            source = _find(role, base, config.augmenting_references.get(name, {}))
        if source is not None and source == anchor_source:  # one set of weights serves as both
            base, source = anchor_model, None
        models[name] = _take(role, base, source, expected, depth, **load_kwargs)
    if verify:
        check_fingerprint(anchor_model, config.anchor_reference.get("fingerprint", {}), "the anchor")
        for name, model in models.items():
            recorded = config.augmenting_references.get(name, {}).get("fingerprint", {})
            check_fingerprint(model, recorded, f"the augmenting model {name!r}")
    return anchor_model, models


def _take(
    role: str,
    base: Any,
    source: Source | None,
    expected: PreTrainedConfig,
    depth: int | None = None,
    **load_kwargs: Any,
) -> PreTrainedModel:
    if source is None:
        _check_shape(base.config, expected, role)
        return freeze(base) if depth is None else truncated(base, depth)
    found = load_config(source, **load_kwargs)
    _check_shape(found, expected, role)
    if depth is None:
        return load_anchor(source, found, **load_kwargs)
    return load_augmenting(source, found, depth, **load_kwargs)


def _find(role: str, base: Any, reference: dict[str, Any]) -> Source:
    if base is not None:
        return Source.parse(base)
    name = reference.get("name_or_path")
    argument = "anchor=" if role == "the anchor" else "augmenting="
    if not name:
        raise CheckpointError(
            f"{role} was given as a loaded model when this composition was made, so there is no reference to load it "
            f"by: pass {argument} with the model or where it is."
        )
    source = Source(name, reference.get("gguf_file"), reference.get("revision"))
    if Path(name).is_absolute() and not Path(name, source.gguf_file or "config.json").is_file():
        raise CheckpointError(
            f"{role} is recorded as {name!r}, which is not there: pass {argument} with where it is now."
        )
    return source


def _check_shape(found: PreTrainedConfig, expected: PreTrainedConfig, role: str) -> None:
    for what, value in (
        ("architecture", lambda c: text_config(c).model_type),
        ("width", width_of),
        ("depth", depth_of),
    ):
        if value(found) != value(expected):
            raise CheckpointError(
                f"{role} has {what} {value(found)!r}; this composition was trained against {value(expected)!r}. Give "
                "the base that it was made with."
            )
