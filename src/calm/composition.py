"""compose(): two or more frozen models in, one composed model out."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from calm import backbones, fingerprints, sources
from calm.config import CalmConfig, depth_of
from calm.connections import choose_pairs
from calm.errors import CalmError, UnsupportedModelError
from calm.model import CalmForCausalLM
from calm.sources import Source

Base: TypeAlias = PreTrainedModel | str | os.PathLike[str]


def compose(
    anchor: Base,
    augmenting: Base | Mapping[str, Base],
    connections: int | Iterable[tuple[int, int]] | Mapping[str, int | Iterable[tuple[int, int]]] = 4,
    *,
    num_heads: int | None = None,
    attention: str = "gated",
    attend: str = "causal",
    load_augmenting: bool = True,
    anchor_tokenizer: PreTrainedTokenizerBase | None = None,
    augmenting_tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
    **load_kwargs: Any,
) -> CalmForCausalLM:
    """Compose a frozen anchor with frozen augmenting models (paper, section 3).

    The result is the anchor, bit for bit, until its connections are trained. Everything that can be wrong with the
    choice of models and layers is checked on their configurations, before any weight is loaded.

    Args:
        anchor: The anchor `m_B`: a causal language model, or its hub name (`NAME@REVISION` for
            one of its revisions), folder or GGUF file.
        augmenting: The augmenting model `m_A` likewise, or several by name; cost is linear in their number.
        connections: How many connections at a uniform gap (per augmenting model), or `(augmenting layer, anchor
            layer)` pairs, 0-based, or either by the augmenting model's name.
        num_heads: Heads of a connection; the anchor's number by default.
        attention: `"gated"`, `"normalized"` (without the gate), or `"paper"` for the paper's formula to the letter.
        attend: `"causal"`, or `"prompt"` for the paper's ablation of the augmenting model as an encoder.
        load_augmenting: False leaves the augmenting models where they are, for training on outputs that were kept:
            `forward` has to be given `augmenting_outputs`.
        anchor_tokenizer: The tokenizer of an anchor given as a loaded model; by default the one in the folder (or
            cached repository) that the model came from.
        augmenting_tokenizer: The tokenizer(s) of augmenting models given as loaded models, likewise.
        load_kwargs: For `from_pretrained` of bases given by name (`dtype`, `device_map`, `quantization_config`,
            `revision` of all of them, `token`, ...). A base that is quantized while it is loaded will be so again with
            the saved composition.

    Returns:
        The composed model in evaluation mode. Its connections have the anchor's devices and are float32 whatever the
        bases are, as PEFT's adapters: they are there to be trained, and small updates vanish in half precision.
        (`from_pretrained` gives trained ones the anchor's dtype.)

    Raises:
        CalmError: If connections, heads or modes do not fit the models, or if an argument is unknown.
        UnsupportedModelError: If an architecture cannot be composed.
        TokenizerMismatchError: If an augmenting model has another tokenizer than the anchor.
        CheckpointError: If a base cannot be loaded or holds NaN.
    """
    bases = dict(augmenting) if isinstance(augmenting, Mapping) else {"augmenting": augmenting}
    if not bases:
        raise CalmError("augmenting={}: expected at least one augmenting model.")
    for name in bases:
        if not isinstance(name, str) or not name.isidentifier() or name in dir(nn.ModuleDict()):
            raise CalmError(
                f"The augmenting model's name {name!r}: expected letters, digits and underscores, and no word that "
                "torch.nn.ModuleDict uses."
            )
        if name in ("anchor", "composed"):  # what commands call the other parts (`--part`)
            raise CalmError(f"The augmenting model's name {name!r} means another part of a composition: give another.")

    anchor, anchor_config, anchor_source = _look_at(anchor, "anchor", load_kwargs)
    if isinstance(anchor, PreTrainedModel) and not anchor.can_generate():
        raise UnsupportedModelError(
            f"The anchor is a {type(anchor).__name__}, which has no language-model head: pass a ...ForCausalLM."
        )
    looked_at = {name: _look_at(base, "augmenting model", load_kwargs) for name, base in bases.items()}
    if load_kwargs and anchor_source is None and all(source is None for _, _, source in looked_at.values()):
        raise CalmError(
            f"compose() got {', '.join(f'{key}={value!r}' for key, value in load_kwargs.items())}, which would be for "
            "loading the bases, but all of them are loaded models. Leave it out, or pass names or folders; compose()'s "
            "own arguments are connections, num_heads, attention, attend and the tokenizers."
        )
    hub_kwargs = {key: value for key, value in load_kwargs.items() if key != "revision"}
    others = {
        name: (base, config, source)
        for name, (base, config, source) in looked_at.items()
        if (base is not anchor if source is None else source != anchor_source)
    }
    if others and anchor_tokenizer is None:
        anchor_tokenizer = _tokenizer(anchor, anchor_source, hub_kwargs)
    for name, (base, config, source) in others.items():
        if isinstance(augmenting_tokenizer, Mapping):
            tokenizer = augmenting_tokenizer.get(name)
        else:
            tokenizer = augmenting_tokenizer
        if tokenizer is None:
            tokenizer = _tokenizer(base, source, hub_kwargs)
        sources.check_same_tokenizer(
            anchor_tokenizer, tokenizer, anchor_config, config, (_name(anchor, anchor_source), _name(base, source))
        )

    anchor_quantization = _quantization(anchor, anchor_config, anchor_source, load_kwargs)
    quantizations = {name: _quantization(*found, load_kwargs) for name, found in looked_at.items()}
    config = CalmConfig(
        anchor_config=_snapshot(anchor_config, anchor_quantization),
        augmenting_configs={n: _snapshot(config, quantizations[n]) for n, (_, config, _) in looked_at.items()},
        connections=[
            pair.to_dict()
            for pair in choose_pairs(
                connections,
                {name: depth_of(config) for name, (_, config, _) in looked_at.items()},
                depth_of(anchor_config),
            )
        ],
        num_heads=num_heads,
        attention=attention,
        attend=attend,
    )

    load_kwargs.pop("revision", None)  # it is part of the sources
    anchor_model = anchor if anchor_source is None else sources.load_anchor(anchor_source, anchor_config, **load_kwargs)
    augmenting_models = {}
    for name, (base, base_config, source) in looked_at.items() if load_augmenting else ():
        depth = config.augmenting_depth(name)
        if source is None:
            augmenting_models[name] = backbones.truncated(base, depth)
        elif source == anchor_source:  # one set of weights serves as both
            augmenting_models[name] = backbones.truncated(anchor_model, depth)
        else:
            augmenting_models[name] = sources.load_augmenting(source, base_config, depth, **load_kwargs)
    fingerprints.check_finite(anchor_model, f"the anchor {_name(anchor, anchor_source)}")
    config.anchor_reference = _reference(anchor, anchor_source, anchor_model, anchor_quantization)
    for name, (base, _, source) in looked_at.items():
        model = augmenting_models.get(name)
        if model is not None:
            fingerprints.check_finite(model, f"the augmenting model {_name(base, source)}")
        config.augmenting_references[name] = _reference(base, source, model, quantizations[name])
    model = CalmForCausalLM(config, anchor_model, augmenting_models).eval()
    model.connections.float()
    return model


def _look_at(base: Any, role: str, load_kwargs: Mapping[str, Any]) -> tuple[Any, PreTrainedConfig, Source | None]:
    """Tell a loaded model from a name, and check that its architecture can be composed."""
    base = sources.unwrapped(base)
    if isinstance(base, PreTrainedModel):
        source, config = None, base.config
    elif isinstance(base, str | os.PathLike):
        source = Source.parse(base, load_kwargs.get("revision"))
        config = sources.load_config(source, **load_kwargs)
    else:
        raise CalmError(
            f"The {role} is a {type(base).__name__}: expected a transformers model, or a hub name, folder or GGUF file."
        )
    if isinstance(base, CalmForCausalLM) or isinstance(config, CalmConfig):
        raise UnsupportedModelError(f"The {role} is itself a composed model; compose its bases together instead.")
    backbones.check_supported(config, role)
    return base, config, source


def _tokenizer(base: Any, source: Source | None, hub_kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a base's weights; of a loaded model only if the place that it came from is at hand."""
    if source is not None:
        return sources.load_tokenizer(source, **hub_kwargs)
    if not base.name_or_path:
        return None
    return sources.load_tokenizer(Source(base.name_or_path), local_files_only=True, trust_remote_code=False)


def _quantization(
    base: Any, config: PreTrainedConfig, source: Source | None, load_kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The configuration by which a base is quantized while it is loaded; `None` for one that is stored as it is."""
    if source is None:
        quantizer = getattr(base, "hf_quantizer", None)  # there is one if loading quantized the model
        quantization = None if quantizer is None or quantizer.pre_quantized else quantizer.quantization_config
    else:
        quantization = load_kwargs.get("quantization_config")
        if quantization is not None and source.gguf_file is not None:
            raise CalmError(
                f"{_name(base, source)} cannot be quantized while it is loaded: transformers reads a GGUF file's "
                "weights as they are, or dequantizes them. Leave quantization_config out, or take the model's "
                "safetensors files."
            )
        if getattr(config, "quantization_config", None) is not None:
            quantization = None
    if quantization is None or isinstance(quantization, dict):
        return quantization
    return cast(dict[str, Any], json.loads(quantization.to_json_string(use_diff=False)))


def _snapshot(config: PreTrainedConfig, quantization: dict[str, Any] | None) -> PreTrainedConfig:
    """A copy that says nothing of how this one instance was read (quantized; a GGUF file is dequantized)."""
    config = copy.deepcopy(config)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None and (quantization or "gguf" in str(getattr(quantized, "quant_method", "")).lower()):
        del config.quantization_config
    return config


def _reference(
    base: Any, source: Source | None, model: PreTrainedModel | None, quantization: dict[str, Any] | None
) -> dict[str, Any]:
    reference = (source or Source.of(base)).reference()
    reference["fingerprint"] = fingerprints.fingerprint(model) if model is not None else {}
    if model is not None:  # rounded or quantized, the same weights come of it in the same dtype only
        reference["dtype"] = fingerprints.precision_of(model)
        if quantization is not None:
            reference["loaded_with"] = {"quantization_config": quantization}
        if source is None and sources.has_adapter(base):  # a name says nothing of it
            reference["adapter"] = True
    return reference


def _name(base: Any, source: Source | None) -> str:
    if source is None:
        return repr(base.name_or_path or type(base).__name__)
    return repr(f"{source.name_or_path}/{source.gguf_file}" if source.gguf_file else source.name_or_path)
