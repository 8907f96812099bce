"""Metrics of written code, as sums over answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rapidfuzz import fuzz

from calm.evaluation.code import passes
from calm.experiments.methods.examples import Example
from calm.experiments.methods.metrics import Mean


@dataclass(frozen=True)
class ExactMatch(Mean):
    """Percent of the answers that are the reference, without the space around them."""

    name: str = "exact match"

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """1 or 0: float64 [examples, 1]."""
        pairs = zip(answers, examples, strict=True)
        return np.array([[answer.strip() == example.completion.strip()] for answer, example in pairs], dtype=np.float64)


@dataclass(frozen=True)
class EditSimilarity(Mean):
    """Mean of rapidfuzz's ratio (twice the longest common subsequence over both lengths), in percent."""

    name: str = "edit similarity"

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """0 to 1: float64 [examples, 1]."""
        pairs = zip(answers, examples, strict=True)
        return np.array([[fuzz.ratio(answer.strip(), example.completion.strip()) / 100] for answer, example in pairs])


@dataclass(frozen=True)
class PassAt1(Mean):
    """Percent of HumanEval's problems whose tests the one answer passes. It runs what the model wrote.

    Args:
        checks: the program that tests an answer, by the example's prompt.
    """

    checks: Mapping[str, str] = field(default_factory=dict)
    name: str = "pass@1"

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """1 or 0: float64 [examples, 1]."""
        programs = [
            f"{example.prompt}{answer}\n{self.checks[example.prompt]}"
            for answer, example in zip(answers, examples, strict=True)
        ]
        return np.array([[passes(program)] for program in programs], dtype=np.float64)
