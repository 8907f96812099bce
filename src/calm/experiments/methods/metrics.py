"""Metrics of texts, by sacrebleu, as sums over answers; the first or last word of an answer; and perplexity."""

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
    """chrF2 (Popović 2016): character n-grams up to 6, no words, beta 2, sacrebleu's default. The paper has chrF1."""

    def __init__(self) -> None:
        super().__init__("chrF2", CHRF())


class Bleu(_Sacrebleu):
    """BLEU with sacrebleu's 13a tokenization."""

    def __init__(self) -> None:
        super().__init__("BLEU", BLEU())


@dataclass(frozen=True)
class Mean:
    """100 times the mean of one number per answer."""

    higher_is_better: bool = True

    def value(self, sums: np.ndarray, examples: int) -> float:
        """0 to 100."""
        return 100 * float(sums[0]) / examples


@dataclass(frozen=True)
class FirstWord(Mean):
    """Percent of the answers whose first word is the reference.

    Args:
        ignored: signs that do not count at either end of the answer's word.
    """

    ignored: str = ""
    name: str = "first word right, %"

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """1 or 0: float64 [examples, 1]."""
        words = [(answer.split() or [""])[0].strip(self.ignored) for answer in answers]
        pairs = zip(words, examples, strict=True)
        return np.array([[word == example.completion.strip()] for word, example in pairs], dtype=np.float64)


@dataclass(frozen=True)
class LastWord(Mean):
    """Percent of the answers whose last word is the reference's."""

    name: str = "last word right, %"

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """1 or 0: float64 [examples, 1]."""
        pairs = zip(answers, examples, strict=True)
        right = [[answer.split()[-1:] == example.completion.split()[-1:]] for answer, example in pairs]
        return np.array(right, dtype=np.float64)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token, from (nats, tokens) of each text."""

    name: str = "perplexity"
    higher_is_better: bool = False

    def value(self, sums: np.ndarray, examples: int) -> float:
        """Perplexity of texts whose (nats, tokens) add up to `sums`."""
        return math.exp(float(sums[0] / sums[1]))
