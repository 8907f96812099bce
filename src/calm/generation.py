"""Generation with a composed model: every strategy of transformers on one cache over all of its parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.utils.generic import is_flash_attention_requested

from calm import backbones
from calm.cache import CalmCache
from calm.config import text_config
from calm.errors import CalmError


@contextmanager
def without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate` take what its arguments leave out from transformers, and from the model its special tokens only.

    A model's own generation settings change which tokens are likely, or end an answer early: many instruction-tuned
    models bring a repetition penalty. Fresh settings leave all of them out, also those to come in transformers.

    Args:
        model: Any that generates; nothing else may use its settings meanwhile.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


class StopOnWritten(StoppingCriteria):
    """Ends each row by itself once what was written contains a stop string.

    transformers' own `stop_strings` look at the prompt, too: after one that ends with a line's end, an answer that
    begins with "#" would end there, if a "#" that begins a line is to end it.

    Args:
        tokenizer: Of the model.
        stop: The strings; none ends no row.
        begins: Tokens of the (padded) prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], begins: int) -> None:
        self.tokenizer, self.stop, self.begins = tokenizer, stop, begins

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended: bool [rows]."""
        written = self.tokenizer.batch_decode(input_ids[:, self.begins :])
        ended = [any(string in text for string in self.stop) for text in written]
        return torch.tensor(ended, device=input_ids.device)


class _KnownTokensOnly(SuppressTokensLogitsProcessor):
    """Of a type of its own: transformers lets a processor that is given replace its own one of the same type."""


class CompositionGeneration(GenerationMixin):
    """What `CalmForCausalLM` changes of transformers' generation: its cache, and what cannot work says so."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with any strategy of transformers; the bare anchor's within `composition_disabled()`.

        The settings are those of this model's `generation_config`, either way.
        """
        if self._disabled:
            kwargs.pop("prompt_length", None)  # of the connections, like forward's
            anchor = self.anchor
            if anchor.generation_config != self.generation_config:  # set here, as composed models have them saved
                anchor = copy.copy(anchor)  # the same modules
                anchor.generation_config = self.generation_config
            return anchor.generate(*args, **kwargs)
        input_ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        if isinstance(input_ids, Tensor):
            self._check_inputs(input_ids, None, kwargs.get("past_key_values"), kwargs)
            self._check_tokens(input_ids)
            self._check_prompt_length(kwargs.get("prompt_length"), len(input_ids))
        if isinstance(prompt_length := kwargs.get("prompt_length"), Tensor) and prompt_length.numel() == 1:
            kwargs["prompt_length"] = int(prompt_length)  # of all rows, which transformers would take for one row's
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching of transformers drives attention itself and knows one model only.

        Raises:
            CalmError: Always.
        """
        raise CalmError(
            "generate_batch (continuous batching) cannot run a composed model: it replaces the attention of one "
            "model, and a composition has several. Use generate() with a padded batch, or serve the model with vLLM."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _new_cache(self, max_length: int | None = None, offloading: bool = False) -> CalmCache:
        return CalmCache.build(
            text_config(self.anchor.config),
            {name: text_config(model.config) for name, model in self.augmenting.items()},
            len(self.connections),
            max_length,
            offloading,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        self._check_length(max_cache_length)
        if generation_config.assistant_early_exit is not None:
            raise CalmError(
                f"assistant_early_exit={generation_config.assistant_early_exit}: a composed model cannot draft with "
                "its first layers, since its connections need all of their own. Pass a smaller model that shares "
                "the tokenizer as assistant_model=."
            )
        mask = model_kwargs.get("attention_mask")
        length = mask.shape[1] if mask is not None else generation_config._mask_length
        if generation_config.use_cache is False:
            if self.config.attend == "prompt":
                model_kwargs.setdefault("prompt_length", length)
            return
        cache = model_kwargs.get("past_key_values")
        kind = generation_config.cache_implementation
        if cache is None:
            if kind not in (None, "dynamic", "offloaded", "static", "offloaded_static"):
                raise CalmError(
                    f"cache_implementation={kind!r}: expected 'dynamic', 'static', 'offloaded' or 'offloaded_static' "
                    "for a composed model."
                )
            static_length = None
            if kind in ("static", "offloaded_static"):
                # as transformers does: never shrink from call to call, so that a compiled forward is not compiled anew
                longest = max(max_cache_length, generation_config.max_cache_len or 0)
                self._check_static_cache()
                static_length = self._previous_max_cache_length = max(
                    longest, getattr(self, "_previous_max_cache_length", 0)
                )
            cache = model_kwargs["past_key_values"] = self._new_cache(static_length, "offloaded" in (kind or ""))
        elif kind is not None:
            raise CalmError(f"Pass either past_key_values or cache_implementation={kind!r}, not both.")
        else:
            cache._is_user_defined = True  # as transformers marks it, which then leaves no token too many in it
        bases = (text_config(base.config) for base in (self.anchor, *self.augmenting.values()))
        if mask is None and cache.get_max_length() > 0 and any(map(is_flash_attention_requested, bases)):
            # transformers drops a mask of ones, and keeps it for flash attention on a static cache, whose empty slots
            # would count; but it asks this model's configuration, and not the bases'
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=self.device)
        if self.config.attend == "prompt":  # the cache says it from here on: an assistant model would not know the word
            given = model_kwargs.pop("prompt_length", cache.prompt_length)  # a continued cache keeps its own
            cache.prompt_length = length if given is None else given
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def _get_logits_processor(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        if self.known_tokens is not None:  # before those that are given, which may choose a token themselves
            unknown = range(self.known_tokens, text_config(self.anchor.config).vocab_size)
            logits_processor = LogitsProcessorList([_KnownTokensOnly(unknown), *(logits_processor or ())])
        processors = super()._get_logits_processor(*args, logits_processor=logits_processor, **kwargs)
        if self.config.attend == "prompt":  # guidance asks the model itself, and without a cache for all tokens anew
            negative = kwargs.get("negative_prompt_ids")
            length = 1 if negative is None else negative.shape[1]
            for processor in processors:
                if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                    processor.model = partial(processor.model, prompt_length=length)
        return processors

    def _check_static_cache(self) -> None:
        for base in (self.anchor, *self.augmenting.values()):
            if base.config.model_type in backbones.NO_STATIC_CACHE:
                raise CalmError(
                    f"A {base.config.model_type!r} gives wrong results with a static cache in transformers; use the "
                    "dynamic one, cache_implementation=None."
                )

    def create_masks_for_generate(
        self,
        config: PreTrainedConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: CalmCache,
        **kwargs: Any,
    ) -> Tensor | None:
        """Give the padding mask one length for all decoding steps with a static cache, so that they compile once.

        Every model and the connections make their own masks from it.

        Args:
            config: Unused: the bases' configurations count.
            inputs_embeds: `[batch, length, 0]`, for its length.
            attention_mask: `[batch, past + length]` or `None`.
            past_key_values: The static `CalmCache`.
            kwargs: Unused.

        Returns:
            `[batch, cache length]` when decoding; as given for several new tokens, which are compiled apart anyway
            (recurrent models read the mask's last columns as those of the new tokens).
        """
        if attention_mask is None or inputs_embeds.shape[1] > 1:
            return attention_mask
        return nn.functional.pad(attention_mask, (0, past_key_values.get_max_length() - attention_mask.shape[1]))
