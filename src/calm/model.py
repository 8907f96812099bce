"""CalmForCausalLM: runs the augmenting models, hooks the connections into the anchor, behaves like its anchor."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.import_utils import is_tracing

from calm import backbones, checkpoint, loss
from calm.alignment import Alignment, align, align_causal, document_lengths, visible_same_tokenizer
from calm.attention import Connection, alibi_slopes
from calm.cache import CalmCache
from calm.config import CalmConfig, width_of
from calm.errors import CalmError
from calm.freezing import CompositionFreezing
from calm.generation import CompositionGeneration
from calm.headless import Headless
from calm.inputs import CompositionInputs, output_key, prompt_before
from calm.saving import CompositionSaving
from calm.switches import CompositionSwitches

_TRAINED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that connections can have


@dataclass
class _Pass:
    """What the hooks need during one forward pass."""

    model: CalmForCausalLM
    captured: dict[str, Tensor] = field(default_factory=dict)  # by `output_key`
    alignment: Alignment | None = None
    cross: Cache | None = None


# Hooks have no argument for it. One for each thread, so that several may run one model at the same time, under the same
# switches: those of `composition_disabled()` and its like are the model's, and hold for all threads.
_thread = threading.local()


# GenerationMixin is named although it is inherited: transformers looks for it among the bases themselves
class CalmForCausalLM(
    CompositionSwitches,
    CompositionFreezing,
    CompositionSaving,
    CompositionInputs,
    CompositionGeneration,
    GenerationMixin,
):
    """A frozen anchor composed with frozen augmenting models through trained connections (paper, section 3).

    Make one with `calm.compose` or `CalmForCausalLM.from_pretrained`. Only `connections` is trained and saved.

    Args:
        config: The composition.
        anchor: The anchor, a causal language model; built with random weights from the configuration if `None`.
        augmenting: Truncated augmenting decoders by name; built likewise if `None`. With `{}` there are none, and
            `forward` has to be given their outputs.

    Attributes:
        anchor: The frozen anchor.
        augmenting: `nn.ModuleDict` of the frozen, truncated augmenting decoders; empty after
            `release_augmenting()`.
        connections: `nn.ModuleList` of `Connection`, in the order of `config.layer_pairs`.
        context_length: The smallest context of the composed models in tokens, `None` where none states a limit.
        known_tokens: The smallest vocabulary of the composed models where they differ (models of one tokenizer may pad
            their embeddings differently), else `None`. `generate` produces no larger ids.
    """

    config_class = CalmConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: CalmConfig,
        anchor: PreTrainedModel | None = None,
        augmenting: Mapping[str, PreTrainedModel] | None = None,
    ):
        # transformers changes the attention implementation on the configurations of a model that it initialises:
        # the live configurations of the bases must not be among them
        super().__init__(config)
        self.anchor = anchor if anchor is not None else _random_anchor(config)
        self.augmenting = nn.ModuleDict(dict(augmenting) if augmenting is not None else _random_augmenting(config))
        backbones.freeze(self.anchor)
        self.augmenting.requires_grad_(False).eval()

        pairs = self._pairs = config.layer_pairs
        anchor_layers = backbones.layers_of(self.anchor)
        self.connections = nn.ModuleList()
        for pair in pairs:
            connection = Connection(
                width_of(config.augmenting_configs[pair.augmenting]),
                width_of(config.anchor_config),
                cast(int, config.num_heads),
                config.attention,
            )
            reference = next(anchor_layers[pair.anchor_layer].parameters())
            candidates = (reference, *self.anchor.parameters())  # codes, and floats of 8 bits, train nothing
            dtype = next((weight.dtype for weight in candidates if weight.dtype in _TRAINED), torch.float32)
            device = backbones.runs_on(self.anchor) if reference.is_meta else reference.device
            self.connections.append(connection.to(device=device, dtype=dtype))

        self._anchor_parameters = backbones.forward_parameters(self.anchor)
        self._augmenting_parameters = {n: backbones.forward_parameters(m) for n, m in self.augmenting.items()}
        bases = config.anchor_config, config.augmenting_configs
        self.context_length, self._context_of = backbones.smallest_context(*bases)
        self.known_tokens = backbones.known_tokens(*bases)
        self._vocabulary = backbones.smallest_vocabulary(*bases)
        for layer_index in sorted({pair.anchor_layer for pair in pairs}):
            here = [i for i, pair in enumerate(pairs) if pair.anchor_layer == layer_index]
            hook = backbones.CompositionHook(self, "_inject", here)
            # before those that the anchor has already, such as transformers' that record hidden states: whoever looks
            # at a layer's output sees what the layer passes on, no matter when they began
            anchor_layers[layer_index].register_forward_hook(hook, prepend=True)
        for name, layer_index in sorted({(pair.augmenting, pair.augmenting_layer) for pair in pairs}):
            if name in self.augmenting:
                layer = backbones.layers_of(self.augmenting[name])[layer_index]
                layer.register_forward_hook(backbones.CompositionHook(self, "_capture", name, layer_index))
        if isinstance(head := self.anchor.get_output_embeddings(), nn.Module):
            head.register_forward_pre_hook(backbones.contiguous_input)

        placed = {f"anchor.{name}": place for name, place in backbones.device_map_of(self.anchor).items()}
        for key, base in self.augmenting.items():
            placed |= {f"augmenting.{key}.{name}": place for name, place in backbones.device_map_of(base).items()}
        if placed:  # whoever trains the model leaves it where it is
            self.hf_device_map = placed
        self._no_split_modules = [Connection.__name__]  # post_init adds the bases'
        self.accepts_loss_kwargs = "**" in self._anchor_parameters
        self._is_stateful = any(base._is_stateful for base in (self.anchor, *self.augmenting.values()))
        self._keys_to_ignore_on_save: set[str] | None = None
        self.generation_config = copy.deepcopy(self.anchor.generation_config)
        self.post_init()
        self._list_what_is_there()

    def _list_what_is_there(self) -> None:
        """Say what FSDP shards one by one, which has to be there, and which exact keys no checkpoint has."""
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(classes & set(self._no_split_modules))
        self._keys_to_ignore_on_save = {k for k in self.state_dict() if not k.startswith(checkpoint.CONNECTIONS_PREFIX)}

    def release_augmenting(self) -> None:
        """Let the augmenting models go, for training on `augmenting_outputs` that were kept."""
        self.augmenting = nn.ModuleDict()
        self._list_what_is_there()

    @cached_property
    def base_model(self) -> Headless:
        """Both models and the connections without the anchor's head; called, it returns the last hidden state."""
        return Headless(self)

    def init_weights(self) -> None:
        """Nothing to do: connections initialise themselves, and the bases (with adapters on them) are as loaded."""

    # -- one forward pass ---------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CalmCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Tensor | None = None,
        skip_logits: bool = False,
        augmenting_outputs: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the augmenting models up to their last connected layer, then the anchor with the connections.

        Args:
            input_ids: Int64 `[batch, length]`, the new tokens; all models read them.
            attention_mask: `[batch, past + length]`, 1 for a token and 0 for padding (longer, up to the cache's length,
                with a static cache).
            position_ids: Int64 `[batch or 1, length]`. Without it the anchor counts as it does on its own; models with
                absolute positions want it for left-padded rows (`generate` passes it). Without a mask and a
                cache, positions that restart mark packed documents, which do not see one another.
            past_key_values: The cache of earlier tokens.
            labels: Int64 `[batch, length]`, -100 where no loss is wanted.
            use_cache: Return a cache; by default outside of training and without labels, and in no case while training
                with activation checkpointing.
            logits_to_keep: Compute logits for the last so many positions only (0: all).
            prompt_length: For `attend="prompt"`: leading columns that are prompt, padding included, one number or
                `[batch]`. By default what precedes the first label, which must not be nothing, or the whole input of
                the first call.
            skip_logits: With labels, compute the loss at labelled positions only, in chunks, and return no logits
                (issue 3: those of the whole vocabulary are a training step's largest tensors). An anchor whose loss
                is not the usual one, or whose head is trained, computes them nevertheless.
            augmenting_outputs: What `augmenting_outputs()` returned for these tokens, kept since; the augmenting models
                then do not run (issue 3). Not together with a cache.
            kwargs: Passed to the anchor.

        Returns:
            The anchor's loss and logits; `past_key_values` is a `CalmCache`.

        Raises:
            CalmError: On empty input, embeddings instead of tokens, tokens or a mask that are not two-dimensional, a
                mask that is too short, a cache that is not a `CalmCache`, that an earlier pass left half written or
                that comes with activation checkpointing, tokens that one of the models does not have (on a GPU looked
                for only where vocabularies differ, since to look is to wait for it; `generate` looks in any case), more
                tokens than the smaller of the models' contexts, a `prompt_length` or kept outputs that do not fit the
                input, or augmenting models that are needed and were not loaded; with `attend="prompt"`, on labels from
                the first token on, packed rows, and training without labels or a `prompt_length`.
        """
        if self._disabled:
            return self._forward_anchor_alone(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                labels,
                use_cache,
                logits_to_keep,
                kwargs,
            )
        input_ids = self._check_inputs(input_ids, attention_mask, past_key_values, kwargs)
        self._check_prompt_length(prompt_length, len(input_ids))
        position_ids = _for_all_rows(position_ids, len(input_ids))
        if past_key_values is not None:
            self._check_cache(past_key_values)
        if augmenting_outputs is not None:
            self._check_augmenting_outputs(augmenting_outputs, input_ids, use_cache, past_key_values)
        if use_cache is None:
            use_cache = not self.training and labels is None and augmenting_outputs is None
        cache = past_key_values
        if cache is None and use_cache and not (self.training and self.is_gradient_checkpointing):
            cache = self._new_cache()  # activation checkpointing would fill it a second time in the backward pass
        length = input_ids.shape[1]
        past_length = cache.get_seq_length() if cache is not None else 0
        if isinstance(past_length, int):
            packed = cache is None and attention_mask is None  # its documents' positions count, not the row's length
            self._check_length(past_length + length, position_ids if packed else None)
        self._check_mask_length(attention_mask, past_length, length)
        if self._is_stateful and length > 1 and past_length > 0:
            raise CalmError(
                f"{length} new tokens after {int(past_length)} in the cache: a recurrent base can take one at a time "
                "only (in transformers it would start anew). Pass single tokens, or everything without a cache."
            )

        alignment = self._align(
            length,
            past_length,
            attention_mask,
            cache,
            position_ids,
            prompt_length,
            labels,
            input_ids.device,
        )
        if cache is not None:
            cache.is_being_written = True  # an error would leave the augmenting models' part ahead of the others
        if augmenting_outputs is None:
            augmenting_outputs = self._run_augmenting(input_ids, attention_mask, position_ids, cache)
        cross = cache.cross if cache is not None else None
        _thread.running = _Pass(self, dict(augmenting_outputs), alignment, cross)
        try:
            arguments = self._base_arguments(
                self.anchor,
                self._anchor_parameters,
                input_ids,
                attention_mask,
                position_ids,
                cache.anchor if cache is not None else None,
            )
            if skip_logits and labels is not None and loss.can_skip_logits(self.anchor, kwargs):
                items = kwargs.pop("num_items_in_batch", None)
                with loss.without_head(self.anchor) as decoded:
                    outputs = self.anchor(**arguments, **self._anchor_kwargs(**kwargs))
                outputs["logits"] = None
                outputs["loss"] = loss.loss_without_logits(self.anchor, decoded, labels, items)
            else:
                outputs = self.anchor(
                    **arguments, **self._anchor_kwargs(labels=labels, logits_to_keep=logits_to_keep, **kwargs)
                )
        finally:
            _thread.running = None
        if cache is not None:
            cache.is_being_written = False
        return CausalLMOutputWithPast(
            loss=outputs.get("loss"),
            logits=outputs.get("logits"),
            past_key_values=cache,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def augmenting_outputs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the augmenting models alone, for outputs to look at or to keep: frozen models give the same each time.

        Args:
            input_ids: As for `forward`, like the other two.
            attention_mask: `[batch, length]`.
            position_ids: Int64 `[batch, length]`.

        Returns:
            The outputs of the connected augmenting layers, `[batch, length, D_A]` by `"NAME.LAYER"`.

        Raises:
            CalmError: As `forward`.
        """
        input_ids = self._check_inputs(input_ids, attention_mask, None, {})
        self._check_length(input_ids.shape[1], position_ids if attention_mask is None else None)
        self._check_mask_length(attention_mask, 0, input_ids.shape[1])
        return self._run_augmenting(input_ids, attention_mask, position_ids, None)

    def _run_augmenting(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: CalmCache | None,
    ) -> dict[str, Tensor]:
        if missing := sorted(set(self.config.augmenting_configs) - set(self.augmenting)):
            raise CalmError(
                f"The augmenting models {missing} were not loaded: pass their augmenting_outputs, or load the "
                "composition with them."
            )
        if position_ids is None and attention_mask is not None:
            past = cache.get_seq_length() if cache is not None else 0  # the mask may be longer than past and length
            columns = torch.arange(input_ids.shape[1], device=attention_mask.device) + past
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, columns]
        state = _thread.running = _Pass(self)
        try:
            for name, model in self.augmenting.items():
                arguments = self._base_arguments(
                    model,
                    self._augmenting_parameters[name],
                    input_ids,
                    attention_mask,
                    position_ids,
                    cache.augmenting[name] if cache is not None else None,
                )
                with torch.no_grad():
                    model(**arguments)
        finally:
            _thread.running = None
        return state.captured

    @staticmethod
    def _base_arguments(
        base: PreTrainedModel,
        parameters: frozenset[str],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        if attention_mask is not None and base.config.model_type in backbones.MASK_OF_CACHE_LENGTH:
            missing = cache.get_max_length() - attention_mask.shape[1] if cache is not None else 0
            attention_mask = nn.functional.pad(attention_mask, (0, max(missing, 0)))
        arguments: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": cache is not None,
            "return_dict": True,
        }
        if "past_key_values" in parameters:
            arguments["past_key_values"] = cache
        else:  # a recurrent model, which multiplies the new tokens with its mask; a single new one is no padding
            arguments["cache_params"] = cache
            if input_ids.shape[1] == 1:
                arguments["attention_mask"] = None
        if "position_ids" in parameters:
            offset = backbones.position_offset(base.config)
            arguments["position_ids"] = position_ids + offset if offset and position_ids is not None else position_ids
        return arguments

    def _anchor_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        takes_all = "**" in self._anchor_parameters
        return {key: value for key, value in kwargs.items() if takes_all or key in self._anchor_parameters}

    def _forward_anchor_alone(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        labels: Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        if isinstance(past_key_values, CalmCache):
            raise CalmError(
                "The composition is disabled, but past_key_values was made by the composed model: its keys and values "
                "hold what the connections added. Start without it."
            )
        optional = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        given = {key: value for key, value in optional.items() if value is not None}
        return self.anchor(input_ids=input_ids, attention_mask=attention_mask, **self._anchor_kwargs(**given, **kwargs))

    def _align(
        self,
        length: int,
        past_length: int | Tensor,
        padding_mask: Tensor | None,
        cache: CalmCache | None,
        position_ids: Tensor | None,
        prompt_length: int | Tensor | None,
        labels: Tensor | None,
        device: torch.device,
    ) -> Alignment:
        """Say what each new position sees (see `calm.alignment`)."""
        if self.config.attend == "prompt":
            if prompt_length is None and cache is not None:
                prompt_length = cache.prompt_length
            if prompt_length is None and labels is not None:
                prompt_length = prompt_before(labels, padding_mask)
            if prompt_length is None and self.training and cache is None:
                raise CalmError(
                    'attend="prompt": in training the composition has to know where the prompt ends. Pass labels with '
                    "-100 for it (a Trainer with label_smoothing_factor or a loss of its own takes them away), or "
                    "prompt_length=."
                )
            if prompt_length is None:
                prompt_length = length
            if cache is not None and cache.prompt_length is None:  # what comes later belongs to the same prompt
                cache.prompt_length = prompt_length
        else:
            prompt_length = None
        documents = None
        if cache is None and padding_mask is None and position_ids is not None:
            documents = find_packed_sequence_indices(position_ids)
            if documents is not None and prompt_length is not None and not is_tracing(documents):
                raise CalmError(
                    'attend="prompt" and packed rows (positions that start again): each document would have a prompt '
                    "of its own. Pass one document a row."
                )
        key_length = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        slopes = alibi_slopes(cast(int, self.config.num_heads), device) if self.config.attention != "paper" else None
        starts_here = isinstance(past_length, int) and past_length == 0 and key_length == length
        if starts_here and prompt_length is None and _is_right_padded(padding_mask):
            if documents is None:
                return align_causal(length, slopes, device)
            if not is_tracing(documents):
                return align_causal(length, slopes, device, document_lengths(documents))
        return align(
            visible_same_tokenizer(length, past_length, prompt_length, device),
            key_length,
            padding_mask,
            documents,
            slopes,
            may_be_blind=prompt_length is not None,
        )

    def _capture(self, name: str, layer: int, output: Any) -> None:
        if (state := self._running()) is not None:
            state.captured[output_key(name, layer)] = backbones.residual_of(output, self.augmenting[name].config)

    def _inject(self, indices: list[int], output: Any) -> Any:
        state = self._running()
        if state is None or state.alignment is None:
            return None
        hidden = backbones.residual_of(output, self.anchor.config)
        alignment = state.alignment.to(hidden.device)
        pairs = self._pairs
        # all connections of a layer ask with the same hidden state, so that their order does not matter
        injections = []
        for i in indices:
            context = state.captured[output_key(pairs[i].augmenting, pairs[i].augmenting_layer)]
            cache_layer = state.cross.layers[i] if state.cross is not None else None
            injection = self.connections[i](hidden, context.to(hidden.device), alignment, cache_layer)
            if i not in self._switched_off:  # it has run nevertheless, so that its keys and values are in the cache
                injections.append(injection)
        if not injections:
            return None
        return backbones.add_to_residual(output, sum(injections[1:], injections[0]), self.anchor.config)

    def _running(self) -> _Pass | None:
        """This thread's pass, if it is this composition's (others may have hooks on the same anchor)."""
        state: _Pass | None = getattr(_thread, "running", None)
        return state if state is not None and state.model is self else None


def _for_all_rows(position_ids: Tensor | None, rows: int) -> Tensor | None:
    """Positions, of which one row stands for all."""
    if position_ids is not None and position_ids.dim() == 2 and len(position_ids) == 1:
        return position_ids.expand(rows, -1)
    return position_ids


def _is_right_padded(mask: Tensor | None) -> bool:
    """Whether padding, if any, is on the right, where causal order hides it from every token anyway."""
    return mask is None or (not is_tracing(mask) and not (mask[:, 1:] > mask[:, :-1]).any())


def _random_anchor(config: CalmConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(copy.deepcopy(config.anchor_config))


def _random_augmenting(config: CalmConfig) -> dict[str, PreTrainedModel]:
    models = {}
    for name, base in config.augmenting_configs.items():
        base = copy.deepcopy(base)
        backbones.truncate_config(base, config.augmenting_depth(name))
        models[name] = backbones.decoder_of(AutoModel.from_config(base))
    return models
