"""The adapter between lm-eval and a model: its HFLM, made right for compositions."""

from __future__ import annotations

import logging
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from calm.backbones import context_of
from calm.errors import CalmError
from calm.generation import StopOnWritten
from calm.model import CalmForCausalLM


class CalmLM(HFLM):
    """Log-likelihoods and generation, batched, for a composition or any other causal language model.

    lm-eval pads on the right for log-likelihoods, where causal order hides it, and on the left for generation, which
    runs with the model's own cache.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer. One without padding token is given one.
        batch_size: Sequences in a batch.

    Raises:
        CalmError: If the tokenizer has no EOS token, which ends generation and stands for an empty context.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8):
        if tokenizer.eos_token_id is None:
            raise CalmError(
                f"The tokenizer {tokenizer.name_or_path!r} has no EOS token, which lm-eval ends generation with: set "
                "tokenizer.eos_token."
            )
        composed = isinstance(model, CalmForCausalLM)
        logger = logging.getLogger(HFLM.__module__)
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that a loaded model cannot be spread over processes
        try:
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_length=model.context_length if composed else context_of(model.config),
                softmax_dtype="float32",  # sums over the vocabulary in bfloat16 would decide between close answers
            )
        finally:
            logger.setLevel(level)
        self._composed_arguments: dict[str, Any] = {"use_cache": False} if composed else {}
        self._attends_to_prompt = composed and model.config.attend == "prompt"

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with torch.no_grad():
            return self.model(inps, **self._composed_arguments).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As lm-eval's, but that beams end one by one.

        lm-eval's own stop criterion remembers which rows of a batch are done, and ends all of them at once: candidates
        of beam search change their rows, so that an answer would depend on what else is in its batch.
        """
        if generation_kwargs.get("num_beams", 1) == 1:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        if not generation_kwargs.setdefault("do_sample", False):
            generation_kwargs.pop("temperature", None)
        return self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([StopOnWritten(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations; for `attend="prompt"` in batches of one context length, which is the prompt's.

        Args:
            requests: `(strings, context tokens, continuation tokens)`.
            disable_tqdm: Show no progress.
            override_bs: Unused but by lm-eval.

        Returns:
            For each the sum of its continuation's log-probabilities, and whether it is the greedy one.

        Raises:
            CalmError: If a continuation is longer than the context.
        """
        if (longest := max((len(continuation) for *_, continuation in requests), default=0)) > self.max_length:
            raise CalmError(
                f"A continuation to score has {longest} tokens, and the model's context is {self.max_length}: leave "
                "out the task, or take a model with a longer context."
            )
        if not self._attends_to_prompt:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

        def prompt_length(index: int) -> int:  # after lm-eval's truncation on the left
            _, context, continuation = requests[index]
            return min(len(context), self.max_length + 1 - len(continuation))

        scores: dict[int, tuple[float, bool]] = {}
        for length, group in groupby(sorted(range(len(requests)), key=prompt_length), key=prompt_length):
            self._composed_arguments["prompt_length"] = length
            indices = list(group)
            same_length = [requests[i] for i in indices]
            scores |= zip(indices, super()._loglikelihood_tokens(same_length, True, override_bs), strict=True)
        return [scores[i] for i in range(len(requests))]
