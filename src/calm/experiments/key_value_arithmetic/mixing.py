"""m_A and m_B with mixed log-probabilities, as one model that is evaluated as the others are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from calm.experiments.methods.mixing import MixedLogits, mix


class Mixed(nn.Module):
    """Two models over one vocabulary.

    Args:
        anchor: `m_B`.
        augmenting: `m_A`.
        weight: that of `m_A`, from 0 to 1.
    """

    def __init__(self, anchor: PreTrainedModel, augmenting: PreTrainedModel, weight: float) -> None:
        super().__init__()
        self.anchor, self.augmenting, self.weight = anchor, augmenting, weight

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return self.anchor.device

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        """Logits of right-padded rows `[batch, length]`, and the loss if there are labels."""
        of_anchor, of_augmenting = (
            model(input_ids=input_ids, use_cache=False).logits for model in (self.anchor, self.augmenting)
        )
        logits = mix(of_anchor, of_augmenting, self.weight)
        loss = None
        if labels is not None:
            loss = self.anchor.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """As transformers' `generate`: the anchor decodes, and each step's scores are mixed."""
        mixed = MixedLogits(self.augmenting, self.weight, input_ids, attention_mask, begins=input_ids.shape[1])
        processors = LogitsProcessorList([mixed])
        return self.anchor.generate(input_ids, attention_mask=attention_mask, logits_processor=processors, **kwargs)
