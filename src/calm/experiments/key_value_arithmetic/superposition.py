"""Superposed: m_B in training, with numbers that reach it in the state of a token that means nothing to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from calm.experiments.key_value_arithmetic.lines import IGNORED
from calm.experiments.key_value_arithmetic.recipe import Superposition


class Superposed(nn.Module):
    """`m_B`, which at an unknown operand is told inside what the operand is worth.

    After the first layer the embedding of the number is added to the operand's last token: more or less loudly, with
    noise. That is about how a composition will hand numbers over, from a model that `m_B` knows nothing of.

    Args:
        model: trained in place.
        numbers: int64, the tokens of all numbers that an operand may be worth.
        settings: how loudly and how cleanly.
    """

    numbers: Tensor

    def __init__(self, model: LlamaForCausalLM, numbers: Tensor, settings: Superposition) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.register_buffer("numbers", numbers, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        worth: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """As the model's own, with numbers added.

        Args:
            input_ids: int64 [rows, length].
            labels: as for the model.
            worth: int64 [rows, length], the token of the number that is added there, -100 where none is.
            use_cache: as for the model.
        """
        if worth is None:
            return self.model(input_ids=input_ids, labels=labels, use_cache=use_cache)
        rows, columns = (worth != IGNORED).nonzero(as_tuple=True)
        numbers = worth[rows, columns]

        def add(module: nn.Module, args: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
            told = self.told(numbers, hidden[rows, columns])
            return hidden.index_put((rows, columns), told.to(hidden.dtype), accumulate=True)

        hook = self.model.model.layers[0].register_forward_hook(add)
        try:
            return self.model(input_ids=input_ids, labels=labels, use_cache=use_cache)
        finally:
            hook.remove()

    def told(self, numbers: Tensor, states: Tensor) -> Tensor:
        """What is added for numbers: their normalised embeddings with noise, in units of the states.

        Args:
            numbers: int64 [operands].
            states: [operands, width].

        Returns:
            [operands, width], of a random size between the two of `loudness`, evenly in its logarithm.
        """
        embedded, every = self._directions(numbers), self._directions(self.numbers)
        one_each = (len(numbers), 1)
        noise = torch.randn_like(embedded) * embedded.new_empty(one_each).uniform_(0, self.settings.noise)
        others = embedded.new_empty(len(numbers), len(every)).normal_()
        noise = noise + (others * embedded.new_empty(one_each).uniform_(0, self.settings.others)) @ every
        loudness = embedded.new_empty(one_each).uniform_(*map(math.log, self.settings.loudness)).exp()
        return (embedded + noise) * loudness * states.detach().square().mean(-1, keepdim=True).sqrt()

    def _directions(self, numbers: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(numbers)
        return F.rms_norm(embedded, embedded.shape[-1:])
