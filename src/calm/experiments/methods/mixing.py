"""The cheapest rival of a composition: the two models' log-probabilities mixed at decoding, and nothing is trained."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of `m_A`; the best one is chosen on development data."""


def mix(anchor_logits: Tensor, augmenting_logits: Tensor, weight: float) -> Tensor:
    """`(1 - weight) log p_B + weight log p_A`, float32, from logits `[..., vocabulary]` of `m_B` and of `m_A`."""
    of_anchor, of_augmenting = (logits.float().log_softmax(-1) for logits in (anchor_logits, augmenting_logits))
    return (1 - weight) * of_anchor + weight * of_augmenting


class MixedLogits(LogitsProcessor):
    """Mixes another model's log-probabilities into those of the model that generates; made anew for each batch.

    Args:
        augmenting: the other model, with the same vocabulary and a cache of its own.
        weight: of its log-probabilities, from 0 to 1.
        input_ids: its prompts, int64 [batch, length], padded on the left; what is written follows them.
        attention_mask: of its prompts, int64 [batch, length].
        begins: the length of the other prompts, those of the model that generates.
    """

    def __init__(
        self, augmenting: PreTrainedModel, weight: float, input_ids: Tensor, attention_mask: Tensor, begins: int
    ) -> None:
        self.augmenting, self.weight, self.begins = augmenting, weight, begins
        self.prompts, self.mask = input_ids, attention_mask
        self.cache = DynamicCache(config=augmenting.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [batch, vocabulary] of the next token after `input_ids` [batch, begins + written]."""
        written = input_ids[:, self.begins :]
        mask = torch.cat([self.mask, torch.ones_like(written)], dim=1)
        seen = self.cache.get_seq_length()
        logits = self.augmenting(
            input_ids=torch.cat([self.prompts, written], dim=1)[:, seen:],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, seen:],
            past_key_values=self.cache,
            logits_to_keep=1,
        ).logits[:, -1]
        return mix(scores, logits, self.weight)
