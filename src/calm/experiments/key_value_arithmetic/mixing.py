"""The cheapest rival: the log-probabilities of m_A and m_B are mixed at decoding, and nothing is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Mixed(nn.Module):
    """Scores the next token with `weight * log p_A + (1 - weight) * log p_B`.

    Args:
        anchor: `m_B`.
        augmenting: `m_A`, over the same vocabulary.
        weight: that of `m_A`, from 0 to 1.
        pad_token_id: padding, which `m_A` does not see.
    """

    def __init__(self, anchor: PreTrainedModel, augmenting: PreTrainedModel, weight: float, pad_token_id: int) -> None:
        super().__init__()
        self.anchor, self.augmenting, self.weight, self.pad_token_id = anchor, augmenting, weight, pad_token_id

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.anchor.device

    def mix(self, anchor_logits: Tensor, augmenting_logits: Tensor) -> Tensor:
        """Mix logits, both `[..., vocabulary]`, into such as a model would give."""
        of_anchor, of_augmenting = (logits.float().log_softmax(-1) for logits in (anchor_logits, augmenting_logits))
        return self.weight * of_augmenting + (1 - self.weight) * of_anchor

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        """Logits of right-padded rows `[batch, length]`, and the loss if there are labels."""
        models = (self.anchor, self.augmenting)
        logits = self.mix(*(model(input_ids=input_ids, use_cache=False).logits for model in models))
        loss = None
        if labels is not None:
            loss = self.anchor.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """As transformers' `generate`: the anchor decodes, and each step's scores are mixed."""
        processors = LogitsProcessorList([_Mixing(self)])
        return self.anchor.generate(input_ids, attention_mask=attention_mask, logits_processor=processors, **kwargs)


class _Mixing(LogitsProcessor):
    """Runs `m_A` on all tokens so far: it is small, and a cache of its own would be more code than time saved."""

    def __init__(self, mixed: Mixed) -> None:
        self.mixed = mixed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = (input_ids != self.mixed.pad_token_id).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        seen = self.mixed.augmenting(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        return self.mixed.mix(scores, seen.logits[:, -1])
