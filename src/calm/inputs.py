"""Checks of what a composed model is given, before it runs; every refusal says the value and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_tracing

from calm.cache import CalmCache
from calm.config import CalmConfig, width_of
from calm.errors import CalmError


def output_key(augmenting: str, layer: int) -> str:
    """What the output of an augmenting model's layer is called where outputs are kept."""
    return f"{augmenting}.{layer}"


class CompositionInputs:
    """What `CalmForCausalLM` takes, and refuses.

    Attributes:
        context_length: The smallest context of the composed models in tokens, `None` where none states a limit.
        known_tokens: Their smallest vocabulary where they differ, else `None`.
    """

    config: CalmConfig
    augmenting: nn.ModuleDict
    context_length: int | None
    known_tokens: int | None
    training: bool
    is_gradient_checkpointing: bool
    _context_of: str  # whose context_length is
    _vocabulary: int | None

    def _check_inputs(
        self, input_ids: Tensor | None, attention_mask: Any, cache: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        if kwargs.get("inputs_embeds") is not None or input_ids is None:
            raise CalmError(
                "A composed model needs input_ids: each of its models embeds the tokens itself, so inputs_embeds "
                "cannot stand for them."
            )
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
            is_tensor = isinstance(input_ids, Tensor)
            found = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}" if is_tensor else type(input_ids).__name__
            raise CalmError(
                f"input_ids is {found}: expected a tensor of whole numbers [batch, length], as "
                'tokenizer([text], return_tensors="pt") makes one.'
            )
        if input_ids.shape[1] == 0:
            raise CalmError(
                f"input_ids has shape {tuple(input_ids.shape)}: expected at least one token a row. An empty prompt "
                "needs a beginning-of-sequence token."
            )
        if self.known_tokens is not None or input_ids.device.type == "cpu":  # else no need to wait for the device
            self._check_tokens(input_ids)
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
            is_tensor = isinstance(attention_mask, Tensor)
            found = f"has {attention_mask.dim()} dimensions" if is_tensor else f"is a {type(attention_mask).__name__}"
            raise CalmError(
                f"attention_mask {found}: expected a tensor of 2, [batch, past + length] with 1 for a token and 0 for "
                "padding; the models' own masks are made from it."
            )
        if cache is not None and not isinstance(cache, CalmCache):
            raise CalmError(
                f"past_key_values is a {type(cache).__name__}: expected a CalmCache, as a composed model returns it "
                "(it holds the augmenting models' and the connections' keys and values too)."
            )
        return input_ids

    def _check_cache(self, cache: CalmCache) -> None:
        if cache.is_torn():
            raise CalmError(
                "past_key_values were left by a pass that ended in the middle (an error, Ctrl-C): some models have "
                "seen tokens there that others have not. Start without it, or reset() it."
            )
        if self.training and self.is_gradient_checkpointing:
            raise CalmError(
                "past_key_values and activation checkpointing: the backward pass would fill the cache a second time. "
                "Leave it out; to generate, call model.eval() first, or generate(use_cache=False)."
            )

    def _check_tokens(self, input_ids: Tensor) -> None:
        if self._vocabulary is None or is_tracing(input_ids):
            return
        smallest, largest = (int(found) for found in torch.stack(torch.aminmax(input_ids)))
        found = smallest if smallest < 0 else largest
        if 0 <= found < self._vocabulary:
            return
        if self.known_tokens is None or found < 0:
            why = "the vocabulary of the composed models. Use the tokenizer that they share."
        else:
            why = (
                "the smallest vocabulary of the composed models. Larger ones are padding of the others' embeddings; a "
                "tokenizer that all of them share gives none of these."
            )
        raise CalmError(f"input_ids hold {found}: expected ids from 0 to {self._vocabulary - 1}, {why}")

    def _check_prompt_length(self, prompt_length: Any, batch: int) -> None:
        if prompt_length is None or self.config.attend != "prompt":
            return
        if isinstance(prompt_length, Tensor):
            if prompt_length.numel() in (1, batch) and not prompt_length.is_floating_point():
                return
            found = f"{prompt_length.dtype} of shape {tuple(prompt_length.shape)}"
        else:
            if isinstance(prompt_length, Integral) and not isinstance(prompt_length, bool) and int(prompt_length) >= 0:
                return
            found = repr(prompt_length)
        raise CalmError(
            f"prompt_length is {found}: expected how many leading columns are prompt, one whole number or a tensor of "
            f"{batch}, one for each row."
        )

    def _check_augmenting_outputs(
        self, outputs: Mapping[str, Tensor], input_ids: Tensor, use_cache: bool | None, cache: CalmCache | None
    ) -> None:
        if use_cache or cache is not None:
            raise CalmError(
                "augmenting_outputs and a cache: the augmenting models would have to run to fill theirs. Leave one out."
            )
        configs = self.config.augmenting_configs
        expected = {
            output_key(pair.augmenting, pair.augmenting_layer): (*input_ids.shape, width_of(configs[pair.augmenting]))
            for pair in self.config.layer_pairs
        }
        found = {key: tuple(output.shape) for key, output in outputs.items()}
        if found != expected:
            raise CalmError(
                f"augmenting_outputs have the shapes {found}: expected {expected}, which is what augmenting_outputs() "
                f"returns for input_ids of the shape {tuple(input_ids.shape)}."
            )

    @staticmethod
    def _check_mask_length(mask: Tensor | None, past: int | Tensor, length: int) -> None:
        if isinstance(past, Tensor):  # of a static cache; on a GPU to look is to wait
            past = 0 if is_tracing(past) or past.device.type != "cpu" else int(past)
        if mask is not None and mask.shape[1] < past + length:
            raise CalmError(
                f"attention_mask has {mask.shape[1]} columns: expected {past + length}, {past} of the tokens in the "
                f"cache and {length} of the new ones."
            )

    def _check_length(self, length: int, position_ids: Tensor | None = None) -> None:
        if self.context_length is not None and length > self.context_length and position_ids is not None:
            length = int(position_ids.max()) + 1
        if self.context_length is not None and length > self.context_length:
            raise CalmError(
                f"{length} tokens do not fit: the context of {self._context_of} is {self.context_length} tokens, and "
                "the smallest context of the composed models counts. Shorten the prompt or max_new_tokens."
            )


def prompt_before(labels: Tensor, padding_mask: Tensor | None) -> Tensor:
    """How many columns of each row come before its first label, `[batch]`.

    Raises:
        CalmError: If that is nothing but padding: the connections would see nothing, and train nothing.
    """
    labelled = labels != -100
    lengths = labelled.long().argmax(-1)
    before = torch.arange(labels.shape[1], device=labels.device) < lengths.unsqueeze(-1)
    prompt = before if padding_mask is None else before & padding_mask.bool()
    if not is_tracing(labels) and bool((empty := labelled.any(-1) & ~prompt.any(-1)).any()):
        raise CalmError(
            f'attend="prompt": the labels of row {int(empty.long().argmax())} begin at its first token, so that it has '
            "no prompt for the connections to see. Label completions only, with -100 before them, or pass "
            "prompt_length=; to train on whole texts, compose with attend='causal'."
        )
    return lengths
