"""A composed model without its anchor's head: the base model of transformers, for trainers with losses of their own.

TRL's trainers compute their losses from the last hidden state and the head's weight, and never make whole logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from calm import backbones, loss
from calm.errors import CalmError


class Headless:
    """Runs both models and the connections, and returns what the anchor's decoder puts out.

    It is no module: the composed model's parameters have one name each.

    Args:
        model: The composed model.
    """

    # transformers asks a base model for these: a composition is not split by layers or tensors
    _tp_plan = _pp_plan = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._keeps_documents_apart = False

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the composed model, but for the head.

        Args:
            input_ids: As for the composed model's forward.
            attention_mask: Likewise.
            position_ids: Likewise.
            kwargs: Likewise, without labels.

        Returns:
            The anchor's decoder's own output. `last_hidden_state` is `[batch, length, width]` in the anchor's dtype:
            times the head's weight (and scaled or soft-capped, where the anchor does so), it is the logits.

        Raises:
            CalmError: What the composed model raises; for rows that hold several documents, if a base does not keep
                them apart; with `attend="prompt"`, if there is no `prompt_length`.
        """
        model = self.model
        if not model._disabled:
            if model.config.attend == "prompt" and kwargs.get("prompt_length") is None:
                raise CalmError(
                    'attend="prompt": without labels or prompt_length the composition cannot know where the prompt '
                    "ends (TRL's trainers give it neither). Train it with calm.training, or with the transformers "
                    "Trainer and labels of -100 for the prompt."
                )
            if position_ids is not None and attention_mask is None:
                self._check_documents(position_ids)
        with loss.without_head(model.anchor) as decoded:
            # by its class, since a trainer may have put a forward of its own, which calls this one, into the instance
            outputs = type(model).forward(
                model, input_ids, attention_mask, position_ids, **{**kwargs, "return_dict": True}
            )
        if outputs.past_key_values is not None:
            decoded.output["past_key_values"] = outputs.past_key_values
        return decoded.output

    def _check_documents(self, position_ids: Tensor) -> None:
        """Refuse a base that lets the documents of a packed row see one another, once."""
        if not self._keeps_documents_apart and find_packed_sequence_indices(position_ids) is not None:
            backbones.check_documents_apart(self.model.anchor, self.model.augmenting)
            self._keeps_documents_apart = True
