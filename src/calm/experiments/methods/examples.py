"""What a domain provides: examples, split into what each part may see, and how answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np


class Example(NamedTuple):
    """A prompt and what should follow it, without the end token. Only completions are learned."""

    prompt: str
    completion: str


class Metric(Protocol):
    """A number for a set of answers, from sums over the answers, so that it can be bootstrapped.

    Attributes:
        name: As tables show it, such as "chrF".
        higher_is_better: Whether more is better.
    """

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
        ...

    def statistics(self, answers: Sequence[str], examples: Sequence[Example]) -> np.ndarray:
        """What each answer contributes: float64 [examples, statistics]."""
        ...

    def value(self, sums: np.ndarray, examples: int) -> float:
        """The metric of so many examples whose statistics add up to `sums`, float64 [statistics]."""
        ...


@dataclass(frozen=True)
class TaskSet:
    """Held-out examples of one row of the table.

    Attributes:
        title: What people call the row.
        examples: What is asked, with the reference.
        metric: The row's number.
        max_new_tokens: How long an answer may be.
        few_shot: Put before the prompt for `m_B`, alone, in `mixed_logits` and in `pipeline`.
        stop: An answer ends before the first of these strings.
        others: More metrics of the same answers.
    """

    title: str
    examples: tuple[Example, ...]
    metric: Metric
    max_new_tokens: int
    few_shot: tuple[Example, ...] = ()
    stop: tuple[str, ...] = ("\n",)
    others: tuple[Metric, ...] = ()


@dataclass(frozen=True)
class Data:
    """All data of one pair of models.

    Nothing like a test example is in what is trained on, except where a domain means to ask for what `m_A` has learned.

    Attributes:
        general: Plain text in what the anchor knows well (English prose), which the vanilla m_A is trained on.
        specialist: `m_A` is the vanilla m_A, further trained on this (unless it is a public model).
        composition: `D_C`.
        development: For choosing learning rates and the mixture's weight, by what is asked; like the tests, and in
            none of them.
        tests: By row.
        preserved: Plain texts whose perplexity shows what a method does to other abilities, by name, such as
            "English". In none of the other sets.
        preserved_tests: Tasks in such abilities, by row of the preservation table. Every method gets the same prompts,
            `m_B` too. In none of the other sets; no row of `tests` has the name of one of these.
    """

    general: tuple[str, ...]
    specialist: tuple[Example, ...]
    composition: tuple[Example, ...]
    development: Mapping[str, TaskSet]
    tests: Mapping[str, TaskSet]
    preserved: Mapping[str, tuple[str, ...]]
    preserved_tests: Mapping[str, TaskSet] = field(default_factory=dict)

    def parts(self) -> dict[str, tuple[Example, ...]]:
        """The examples that are not of tests, by what they are for."""
        return {"specialist": self.specialist, "composition": self.composition, "development": self.developed}

    @property
    def developed(self) -> tuple[Example, ...]:
        """All examples of `development`."""
        return tuple(example for task in self.development.values() for example in task.examples)
