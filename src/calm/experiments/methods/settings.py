"""The settings of a run: which models, how long each is trained, which learning rates are tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TRAINED_ON_DC = ("composed", "vanilla_m_A", "random_m_A", "encoder_m_A", "lora", "full_on_DC", "full_on_all")
"""Methods that are trained, all for the same number of steps of the same size."""


@dataclass(frozen=True)
class Fit:
    """One training of a base.

    Attributes:
        steps: Optimiser steps.
        rows: Examples in a step.
        learning_rate: The highest one; 5% of warm-up, then cosine.
    """

    steps: int
    rows: int
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides its data and its seed.

    Attributes:
        anchor: Folder or hub name of `m_B`.
        augmenting: What becomes `m_A`: some layers of the anchor (with its embeddings and head), counted from 0, or
            the folder or hub name of a smaller model with the same tokenizer.
        general: Training of the vanilla `m_A` on general text; None where `augmenting` is a model already.
        specialist: Further training of the vanilla `m_A`, which makes it `m_A`.
        connections: A number, or (augmenting layer, anchor layer) pairs.
        steps: Optimiser steps of every method that is trained on `D_C`.
        rows: Examples in such a step.
        search_steps: Steps of each trial in the search for a learning rate.
        learning_rates: Those that are tried, by "composition", "lora" and "full".
        max_length: Tokens of an example at most.
        batch: Sequences in a batch of generation or scoring.
        dtype: Of the frozen models, and of computing.
        methods: Which of `results.METHODS` to run.
    """

    anchor: str
    augmenting: tuple[int, ...] | str
    general: Fit | None
    specialist: Fit
    connections: int | tuple[tuple[int, int], ...]
    steps: int
    rows: int
    search_steps: int
    learning_rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"composition": (1e-3, 3e-3), "lora": (3e-4, 1e-3), "full": (2e-5, 1e-4)}
    )
    max_length: int = 256
    batch: int = 32
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = ()

    def of_training(self) -> dict[str, Any]:
        """What a method that is trained on `D_C` depends on, besides its own learning rate and the models."""
        return {name: getattr(self, name) for name in ("connections", "steps", "rows", "max_length", "dtype")}
