"""Metrics of texts, by sacrebleu, as sums over answers; and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from calm.experiments.methods.examples import Example


class _Sacrebleu:
    """A corpus metric of sacrebleu from its sufficient statistics, which its own bootstrap is made of, too."""

    higher_is_better = True

    def __init__(self, name: str, metric: Any) -> None:
        self.name, self._metric = name, metric

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """Counts of n-grams, float64 [examples, statistics]."""
        references = [[example.completion.strip() for example in examples]]
        stripped = [answer.strip() for answer in answers]
        return np.asarray(self._metric._extract_corpus_statistics(stripped, references), dtype=np.float64)

    def value(self, sums: np.ndarray, examples: int) -> float:
        """The corpus' score, 0 to 100."""
        return float(self._metric._compute_score_from_stats([int(total) for total in sums]).score)


class Chrf(_Sacrebleu):
    """chrF (Popović 2015): character n-grams up to 6, no words, beta 2, as in the paper's section 4.2."""

    def __init__(self) -> None:
        super().__init__("chrF", CHRF())


class Bleu(_Sacrebleu):
    """BLEU with sacrebleu's 13a tokenization."""

    def __init__(self) -> None:
        super().__init__("BLEU", BLEU())


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token, from (nats, tokens) of each text."""

    name: str = "perplexity"
    higher_is_better: bool = False

    def value(self, sums: np.ndarray, examples: int) -> float:
        """Perplexity of texts whose (nats, tokens) add up to `sums`."""
        return math.exp(float(sums[0] / sums[1]))
