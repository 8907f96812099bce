"""CalmConfig: which bases are composed, which of their layers are connected, and with which attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from calm.connections import LayerPair, check_pairs
from calm.errors import CalmError, CheckpointError

FORMAT_VERSION = 1
ATTENTIONS = ("gated", "normalized", "paper")
ATTEND_MODES = ("causal", "prompt")


class CalmConfig(PreTrainedConfig):
    """Configuration of a composed model; each attribute is also an argument by name.

    Attributes:
        anchor_config: Configuration of the anchor `m_B` (a `PreTrainedConfig`, or its dictionary).
        augmenting_configs: Configurations of the augmenting models `m_A` by name, untruncated.
        connections: The connections as dictionaries with `augmenting` (name), `augmenting_layer` and `anchor_layer`.
        num_heads: Heads of every connection; the anchor's number of attention heads when `None` (paper, section 3.1).
        attention: `"gated"` (default: the paper's cross-attention with RMS-normalised inputs and ALiBi slopes, behind
            a gate that the anchor's hidden state opens position by position, and in units of that state),
            `"normalized"` (the same without gate and units) or `"paper"` (the paper's formula to the letter).
        attend: `"causal"` (anchor position t sees augmenting positions up to t, prompt and generated) or `"prompt"`
            (of these, only the prompt's; the paper's ablation of the augmenting model as an encoder).
        anchor_reference: Where the anchor's weights are: `name_or_path`, `revision`, `gguf_file`; their `fingerprint`,
            and the `dtype` that they were composed in; `adapter` if there was one on them; uploaded, `folder` instead
            of `name_or_path` if they lay in a folder of this name, and where does not concern others.
        augmenting_references: The same for each augmenting model, by name.
        format_version: Version of the checkpoint format.
        asked_of_bases: Kernels (`attn_implementation`, `experts_implementation`) that were passed to an Auto class and
            are for loading the bases; not saved.

    Raises:
        CheckpointError: If the format is newer than this library's, or if a value is of the wrong type.
        CalmError: If a connection lies outside a model or is given twice, if heads do not divide the anchor's width,
            or if a choice is unknown.
    """

    model_type = "calm"
    auto_map: ClassVar[dict[str, str]] = {}  # no code comes with a checkpoint; TRL asks every configuration for it

    anchor_config: Any = None
    augmenting_configs: Any = None
    connections: Any = None
    num_heads: int | None = None
    attention: str = "gated"
    attend: str = "causal"
    anchor_reference: Any = None
    augmenting_references: Any = None
    format_version: int = FORMAT_VERSION
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for field, kind, expected in (
            ("format_version", int, "a whole number"),
            ("augmenting_configs", Mapping | None, "configurations by name"),
            ("connections", list | tuple | None, "a list"),
            ("anchor_reference", Mapping | None, "a dictionary"),
            ("augmenting_references", Mapping | None, "dictionaries by name"),
        ):
            if not isinstance(getattr(self, field), kind):
                raise CheckpointError(f"{field}={getattr(self, field)!r}: expected {expected}.")
        if self.format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"This composition has format version {self.format_version}; the installed calm-lm reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install -U calm-lm"
            )
        self.augmenting_configs = dict(self.augmenting_configs or {})
        self.connections = list(self.connections or [])
        asked = {key: kwargs.get(key) for key in ("attn_implementation", "experts_implementation")}
        self.asked_of_bases = {key: value for key, value in asked.items() if value is not None}
        self.anchor_reference = dict(self.anchor_reference or {})
        self.augmenting_references = dict(self.augmenting_references or {})
        given = {key: kwargs.pop(key) for key in ("hidden_size", "vocab_size") if key in kwargs}
        super().__post_init__(**kwargs)
        if self.anchor_config is None and not (self.augmenting_configs or self.connections):
            return  # transformers makes default instances to compare against
        self.anchor_config = _as_config(self.anchor_config)
        self.augmenting_configs = {name: _as_config(c) for name, c in self.augmenting_configs.items()}
        if self.num_heads is None:
            self.num_heads = _attention_heads(self.anchor_config)
        for key, value in given.items():
            setattr(self, key, value)
        self._check()

    def _check(self) -> None:
        for value, choices, field in (
            (self.attention, ATTENTIONS, "attention"),
            (self.attend, ATTEND_MODES, "attend"),
        ):
            if value not in choices:
                raise CalmError(f"{field}={value!r}: expected one of {', '.join(map(repr, choices))}.")
        try:
            pairs = self.layer_pairs
            unknown = {pair.augmenting for pair in pairs} - set(self.augmenting_configs)
        except (TypeError, KeyError) as error:
            raise CheckpointError(
                f"connections={self.connections!r}: expected dictionaries with 'augmenting', 'augmenting_layer' and "
                "'anchor_layer'."
            ) from error
        if unknown:
            raise CalmError(
                f"connections name the augmenting models {sorted(unknown)}, which are not among "
                f"{sorted(self.augmenting_configs)}."
            )
        depths = {name: depth_of(config) for name, config in self.augmenting_configs.items()}
        check_pairs(pairs, depths, depth_of(self.anchor_config))
        width, heads = width_of(self.anchor_config), cast(int, self.num_heads)
        if isinstance(heads, bool) or not isinstance(heads, int):
            raise CalmError(f"num_heads={heads!r}: expected a whole number that divides the anchor's width {width}.")
        if heads < 1 or width % heads:
            raise CalmError(
                f"num_heads={heads} does not divide the anchor's width {width}: pass num_heads= with a "
                f"divisor of {width}, for example {_nearest_divisor(width, heads)}."
            )

    @property
    def layer_pairs(self) -> list[LayerPair]:
        """The connections as `LayerPair`s, in the order of `model.connections`."""
        return [LayerPair(c["augmenting"], c["augmenting_layer"], c["anchor_layer"]) for c in self.connections]

    @property
    def hidden_size(self) -> int:
        """The anchor's width, which DeepSpeed's settings that are "auto" follow."""
        return width_of(self.anchor_config)

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self._check_given("hidden_size", value, self.hidden_size)

    @property
    def vocab_size(self) -> int:
        """The anchor's vocabulary, which logits are of; `CalmForCausalLM.known_tokens` says what all models know."""
        size: int = text_config(self.anchor_config).vocab_size
        return size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self._check_given("vocab_size", value, self.vocab_size)

    @staticmethod
    def _check_given(key: str, value: int, own: int) -> None:
        if value != own:
            raise CalmError(f"{key}={value!r}: a composition's is its anchor's, {own}. Leave it out.")

    def augmenting_depth(self, name: str) -> int:
        """How many layers of an augmenting model the composition runs: up to its last connected one."""
        return 1 + max(pair.augmenting_layer for pair in self.layer_pairs if pair.augmenting == name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The anchor's text configuration: a composed model looks like its anchor to generation and to engines."""
        if self.anchor_config is None:
            return self
        return self.anchor_config.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, nested configurations included."""
        output = super().to_dict()
        output["anchor_config"] = _without_place(output["anchor_config"])
        output["augmenting_configs"] = {n: _without_place(c.to_dict()) for n, c in self.augmenting_configs.items()}
        output.pop("asked_of_bases", None)  # how it is loaded this time
        return output


def _without_place(values: Any) -> Any:
    """Without where a configuration was read from, which references say, and which uploads must not."""
    if isinstance(values, dict):
        return {key: _without_place(value) for key, value in values.items() if key != "_name_or_path"}
    return values


def text_config(config: Any) -> PreTrainedConfig:
    """The part of a configuration that describes the decoder."""
    return config.get_text_config(decoder=True)


def depth_of(config: PreTrainedConfig) -> int:
    """Number of decoder layers."""
    return text_config(config).num_hidden_layers


def width_of(config: PreTrainedConfig) -> int:
    """Width of a decoder layer's output."""
    return text_config(config).hidden_size


def _attention_heads(config: PreTrainedConfig) -> int:
    heads = getattr(text_config(config), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise CalmError(
            f"num_heads=None: the anchor ({config.model_type}) states no number of attention heads to take as the "
            f"default; pass num_heads= with a divisor of its width {width_of(config)}."
        )
    return heads


def _nearest_divisor(width: int, wanted: int) -> int:
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: abs(d - wanted))


def _as_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, Mapping):
        raise CheckpointError(f"The configuration of a base is {config!r}: expected a configuration or a dictionary.")
    values = dict(config)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"The configuration of a base names no model type that the installed transformers knows: {error}"
        ) from error
    except StrictDataclassError as error:
        raise CheckpointError(f"The configuration of a base has a value that does not fit: {error}") from error
