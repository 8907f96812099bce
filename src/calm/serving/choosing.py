"""Chooses the tokens of a batch row by row: every row with its own temperature, top-p and seed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from calm.serving.rows import Row, Token

GREEDY_BELOW = 1e-3  # dividing by less would overflow, and the likeliest token has all of the probability anyway


class ChooseTokens(LogitsProcessor):
    """Leaves each row one token, so that the greedy `generate` of a batch takes what every row asked for.

    A sampled row draws from a generator of its own: its answer is the same whatever runs beside it.

    Attributes:
        tokens: What was chosen in the last step, with log-probabilities for the rows that want them.
    """

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.tokens: list[Token | None] = []
        self._generators = [_generator(row.sampling.seed) for row in rows]
        self._warpers = [
            (TemperatureLogitsWarper(row.sampling.temperature), TopPLogitsWarper(row.sampling.top_p))
            if row.sampling.temperature >= GREEDY_BELOW
            else None
            for row in rows
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose.

        Args:
            input_ids: Int64 `[batch, length]`, unused.
            scores: `[batch, vocabulary]`.

        Returns:
            The scores, minus infinity everywhere but at each row's chosen token.
        """
        chosen = scores.argmax(-1)
        for index, warpers in enumerate(self._warpers):
            if warpers is not None:
                row = scores[index : index + 1]
                row = row - row.max()  # so that a low temperature underflows instead of overflowing
                for warp in warpers:
                    row = warp(input_ids, row)
                probabilities = row.float().softmax(-1).cpu()
                chosen[index] = torch.multinomial(probabilities, 1, generator=self._generators[index]).item()
        self.tokens = self._with_logprobs(scores, chosen)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def _with_logprobs(self, scores: Tensor, chosen: Tensor) -> list[Token | None]:
        tokens: list[Token | None] = [None] * len(self.rows)
        for index, row in enumerate(self.rows):
            if row.sampling.logprobs is not None:
                logprobs = scores[index].float().log_softmax(-1)
                top = logprobs.topk(row.sampling.logprobs)
                token = int(chosen[index])
                alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                tokens[index] = Token(token, float(logprobs[token]), alternatives)
        return tokens


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator
