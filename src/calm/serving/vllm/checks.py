"""What the plugin serves and what it refuses, each with the reason and the way out (issue 5)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calm import backbones, checkpoint, sources
from calm.config import CalmConfig, text_config
from calm.errors import CalmError, CheckpointError, UnsupportedModelError
from calm.serving.vllm import plugin
from calm.sources import Source

FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "olmo",
    "olmo2",
    "olmo3",
    "qwen2",
    "qwen3",
)
"""Architectures (`model_type`) of which the tests show that vLLM's layers hand on what connections read and add to."""

ALIBI_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""vLLM's attention backends that apply ALiBi slopes: FLEX_ATTENTION refuses them, FLASHINFER takes no notice.

FLASH_ATTN does not always, see `connection.backend_and_size`.
"""

PLACE = ("name_or_path", "revision", "gguf_file", "folder")
"""What of a base's reference says where it is."""

LOAD_FORMATS = ("auto", "hf", "safetensors")

_OTHERWISE = "Or serve it with transformers: calm serve MODEL --engine transformers"


def check_version() -> None:
    """Refuse a vLLM that the plugin was not tested with.

    Raises:
        CalmError: Naming the version found and those supported.
    """
    if not plugin.is_supported():
        import vllm

        raise CalmError(
            f"vLLM {vllm.__version__} is installed; compositions are served by vLLM {plugin.SUPPORTED_VLLM}. Install "
            f"such a version, or the calm-lm that goes with this one. {_OTHERWISE}"
        )


def complete_references(model_config: Any) -> None:
    """Keep what `--hf-overrides` says nothing of: vLLM has it replace a reference, and all augmenting ones, whole.

    A base that was moved is so compared with its fingerprint, as any.

    Args:
        model_config: vLLM's `ModelConfig`, changed in place.

    Raises:
        CalmError: If an override is not that of a base's reference.
    """
    overrides = model_config.hf_overrides
    if not isinstance(overrides, Mapping):  # in Python a function, which gives a whole configuration
        return
    anchor, augmenting = (overrides.get(field) for field in ("anchor_reference", "augmenting_references"))
    if anchor is None and augmenting is None:
        return
    config: CalmConfig = model_config.hf_config
    where = model_config.hf_config_path or model_config.model
    recorded = checkpoint.read_config(where, revision=model_config.revision)
    if anchor is not None:
        config.anchor_reference = _moved(recorded.anchor_reference, anchor, None)
    if augmenting is not None:
        names = list(config.augmenting_configs)
        if not isinstance(augmenting, Mapping) or not augmenting.keys() <= set(names):
            raise CalmError(
                f"--hf-overrides: augmenting_references={augmenting!r}: expected references by the augmenting models' "
                f"names, which are {names}. Write {_override(names[0])}"
            )
        references = recorded.augmenting_references
        given = {name: _moved(references.get(name, {}), one, name) for name, one in augmenting.items()}
        config.augmenting_references = references | given


def _moved(recorded: Mapping[str, Any], given: Any, name: str | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise CalmError(f"--hf-overrides: {given!r}: expected a reference of a base. Write {_override(name)}")
    other_place = "name_or_path" in given
    return {key: value for key, value in recorded.items() if not (other_place and key in PLACE)} | dict(given)


def _override(name: str | None) -> str:
    """How vLLM is told where a base is now."""
    place = {"name_or_path": "PATH"}
    override = {"anchor_reference": place} if name is None else {"augmenting_references": {name: place}}
    return f"--hf-overrides '{json.dumps(override)}'"


def default_tokenizer(model_config: Any) -> None:
    """Take the anchor's tokenizer where the user names none and the composition has none.

    Args:
        model_config: vLLM's `ModelConfig`, changed in place.
    """
    config: CalmConfig = model_config.hf_config
    where = Source(model_config.model, revision=model_config.revision)
    anchor = config.anchor_reference.get("name_or_path")
    if model_config.tokenizer != model_config.model or not anchor or sources.load_tokenizer(where) is not None:
        return
    model_config.tokenizer = anchor
    model_config.tokenizer_revision = config.anchor_reference.get("revision")


def check(vllm_config: Any) -> None:
    """Refuse what cannot be served, before weights are loaded.

    Args:
        vllm_config: vLLM's `VllmConfig` for a composition.

    Raises:
        CalmError: With the reason and the way out.
    """
    config: CalmConfig = vllm_config.model_config.hf_config
    if config.attend != "causal":
        raise CalmError(
            f"attend={config.attend!r}: a position that sees the prompt only is no causal attention, which is what "
            f"vLLM computes. Compose with attend='causal', the default. {_OTHERWISE}"
        )
    for role, base in bases(config).items():
        _check_base(role, base, vllm_config)
    _check_engine(config, vllm_config)
    _check_tokenizers(config)


def bases(config: CalmConfig) -> dict[str, PreTrainedConfig]:
    """The bases' configurations by what to call them in an error, the anchor's first."""
    augmenting = {f"the augmenting model {name!r}": base for name, base in config.augmenting_configs.items()}
    return {"the anchor": config.anchor_config, **augmenting}


def _check_base(role: str, base: PreTrainedConfig, vllm_config: Any) -> None:
    text = text_config(base)
    backbones.check_supported(base, role.removeprefix("the "))
    if base.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{role} has the architecture {base.model_type!r}; in vLLM compositions of {', '.join(FAMILIES)} are "
            f"served. {_OTHERWISE}"
        )
    if getattr(base, "quantization_config", None) is not None:
        raise CalmError(f"{role} is quantized, which the plugin does not load yet. Give it unquantized. {_OTHERWISE}")
    ranks = vllm_config.parallel_config.tensor_parallel_size
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or (shared % ranks and ranks % shared):
        raise CalmError(
            f"{role} has {heads} attention heads ({shared} for keys and values), which tensor_parallel_size={ranks} "
            "does not divide. Take a number that divides those of all models, or 1."
        )
    limit, wanted = backbones.context_of(base), vllm_config.model_config.max_model_len
    if limit is not None and wanted > limit:
        raise CalmError(
            f"max_model_len={wanted} is beyond the context of {role}, {limit} tokens. Pass --max-model-len {limit} (in "
            "Python max_model_len) or less."
        )


def _check_engine(config: CalmConfig, vllm_config: Any) -> None:
    parallel, load_format = vllm_config.parallel_config, vllm_config.load_config.load_format
    if parallel.pipeline_parallel_size > 1:
        raise CalmError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: the connections tie the layers of all models "
            "together, which cannot be spread over stages. Use tensor_parallel_size."
        )
    if config.num_heads is None or config.num_heads % parallel.tensor_parallel_size:
        raise CalmError(
            f"The connections have {config.num_heads} heads, which tensor_parallel_size="
            f"{parallel.tensor_parallel_size} does not divide. Take a number that divides those of all models, or 1."
        )
    for given, what in (
        (vllm_config.model_config.quantization, "quantization"),
        (vllm_config.lora_config, "LoRA adapters"),
        (vllm_config.speculative_config, "speculative decoding"),
        (vllm_config.scheduler_config.scheduler_cls, "a scheduler class of your own"),
        (parallel.use_ubatching or None, "dual batch overlap"),
        (parallel.prefill_context_parallel_size > 1 or None, "prefill context parallelism"),
        (parallel.decode_context_parallel_size > 1 or None, "decode context parallelism"),
        (vllm_config.model_config.enable_prompt_embeds or None, "prompts as embeddings (--enable-prompt-embeds)"),
    ):
        if given is not None:
            raise CalmError(f"{what} was asked for, which the plugin does not serve compositions with. Leave it out.")
    if load_format not in LOAD_FORMATS:
        raise CalmError(
            f"load_format={load_format!r}: a composition and its bases are read from safetensors files, with "
            f"load_format {' or '.join(map(repr, LOAD_FORMATS))}."
        )


def _check_tokenizers(config: CalmConfig) -> None:
    """Look at the bases where they are now: are they the ones composed, and do their tokens line up?"""
    anchor, anchor_config = locate(config, None)
    anchor_tokenizer = sources.load_tokenizer(anchor)
    for name in config.augmenting_configs:
        source, found = locate(config, name)
        if source == anchor:
            continue
        sources.check_same_tokenizer(
            anchor_tokenizer,
            sources.load_tokenizer(source),
            anchor_config,
            found,
            (repr(anchor.name_or_path), repr(source.name_or_path)),
        )


def locate(config: CalmConfig, name: str | None) -> tuple[Source, PreTrainedConfig]:
    """Where a base is, and its configuration there, checked against the one composed.

    Args:
        config: The composition.
        name: An augmenting model's name, or `None` for the anchor.

    Returns:
        The base's source and configuration.

    Raises:
        CheckpointError: If it has no reference, is not there, is not the one composed, or is no safetensors folder.
    """
    reference = config.anchor_reference if name is None else config.augmenting_references.get(name, {})
    role = "the anchor" if name is None else f"the augmenting model {name!r}"
    if reference.get("gguf_file"):
        raise CheckpointError(
            f"{role} is the GGUF file {reference['gguf_file']!r}, which the plugin does not load. Compose with the "
            f"model's safetensors files. {_OTHERWISE}"
        )
    if reference.get("loaded_with"):
        raise CheckpointError(
            f"{role} was quantized while it was loaded, which the plugin cannot do. Compose with it as it is stored. "
            f"{_OTHERWISE}"
        )
    expected = config.anchor_config if name is None else config.augmenting_configs[name]
    try:
        return sources.locate(role, reference, expected)
    except CheckpointError as error:
        raise CheckpointError(f"{error} With vLLM another place is written {_override(name)}") from error


def prepared(base: PreTrainedConfig) -> PreTrainedConfig:
    """A base's configuration as vLLM wants it, a copy: with the causal language model's name.

    Args:
        base: The configuration.
    """
    from vllm.transformers_utils.config import patch_rope_parameters

    base = copy.deepcopy(base)
    base.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.model_type]]
    patch_rope_parameters(base)
    return base
