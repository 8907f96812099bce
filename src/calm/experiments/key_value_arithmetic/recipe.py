"""Recipes: sizes, learning rates and lengths of training for the whole experiment, as presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from calm.errors import CalmError
from calm.experiments.key_value_arithmetic.data import DataSettings

RATES = {"lora": (1e-3, 3e-3, 1e-2), "full_on_DC": (3e-4, 1e-3, 3e-3), "full_on_all": (3e-4, 1e-3, 3e-3)}
"""Learning rates that the baselines try, each for a quarter of the steps."""


@dataclass(frozen=True)
class ModelSettings:
    """A small decoder.

    Args:
        width: hidden size.
        feed_forward: inner width of the feed-forward layers.
        layers: number of layers.
        heads: number of attention heads.
        initializer_range: standard deviation of new weights. Such small models memorise little from the usual 0.02.
    """

    width: int
    feed_forward: int
    layers: int = 3
    heads: int = 4
    initializer_range: float = 0.08


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW (0.9, 0.98) with a cosine schedule and gradients clipped at 1.

    Args:
        steps: number of steps.
        rows: rows of a batch.
        learning_rate: its peak, after `warmup_steps`.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW.
        check_every: steps between two looks at the validation expressions, which only show how it goes.
    """

    steps: int
    rows: int
    learning_rate: float
    warmup_steps: int = 30
    weight_decay: float = 0.0
    check_every: int = 50


@dataclass(frozen=True)
class Hardware:
    """Where a recipe trains, and how.

    Args:
        device: "cpu", or "cuda" for one GPU.
        bf16: compute in bfloat16 (autocast); weights, gradients and AdamW's states stay in float32.
        loaders: processes that draw batches, so that the GPU need not wait for them; 0 draws in the training process.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False
    loaders: int = 0


CPU = Hardware()


@dataclass(frozen=True)
class Superposition:
    """What `m_B` is told of the numbers that unknown operands stand for, where answers are direct (`Superposed`).

    Args:
        loudness: smallest and largest size of it, in units of the state that it is added to. A composition begins with
            a closed gate, so that `m_B` has to take up what comes faintly: with 0.5 as the smallest, gates turned the
            wrong way (docs/dev/LOG.md, "the direct answer, nearer than before").
        noise: largest root mean square of isotropic noise in it, in units of the number.
        others: largest standard deviation of how much of every number is in it besides. A model that is about to say 7
            also thinks of 6 and 8; noise in all directions alike is easily told from a number, that is not.
    """

    loudness: tuple[float, float] = (0.05, 2.5)
    noise: float = 0.7
    others: float = 0.25


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on besides its seed.

    Args:
        data: keys, values and expressions.
        augmenting_model: size of `m_A`.
        augmenting_training: training of `m_A`, and of the vanilla `m_A` of the ablation.
        anchor_model: size of `m_B`.
        anchor_training: training of `m_B`.
        composition_training: training of every composition, and of the baselines.
        steps_on_all: steps of the baseline `full_on_all`, whose batches are half `m_A`'s data.
        connections: their number, or (layer of `m_A`, layer of `m_B`) pairs.
        frozen_queries_and_keys: connections keep the `W_Q` and `W_K` that they begin with, times this, so that a head
            looks about as far back as its slope says and not for what it finds: `D_C` has few keys, which it would
            learn by heart. None trains them.
        shared_embeddings: `m_A` has the embeddings of `m_B`, which its training leaves alone, so that what it is about
            to say is a state that `m_B` can read.
        glossary_entries: entries of a glossary line.
        glossary_share: share of glossary lines in `m_A`'s batches at the first and at the last step.
        with_unknowns: share of `m_B`'s lines in which operands may be strings that it cannot know. Direct answers take
            whole numbers for that.
        written_down: share of `m_B`'s lines that ask for what such strings are worth instead of for the result, where
            answers are direct. Whoever has to write down what it is told reads it better (docs/dev/LOG.md, "an m_B that
            writes down what it is told").
        superposition: what `m_B` is told of such strings where answers are direct.
        numeric_share: share of NUM-MATH in `D_C`.
        evaluation_examples: held-out expressions for each task.
        validation_examples: expressions (over the composition keys) that show how training goes.
        workers: processes that train at the same time, each on one thread; 1 trains in this process.
        hardware: where it trains.
    """

    data: DataSettings
    augmenting_model: ModelSettings
    augmenting_training: TrainingSettings
    anchor_model: ModelSettings
    anchor_training: TrainingSettings
    composition_training: TrainingSettings
    steps_on_all: int
    connections: int | tuple[tuple[int, int], ...] = 3
    frozen_queries_and_keys: float | None = None
    shared_embeddings: bool = False
    glossary_entries: int = 4
    glossary_share: tuple[float, float] = (0.5, 0.2)
    with_unknowns: float = 0.4
    written_down: float = 0.0
    superposition: Superposition = Superposition()
    numeric_share: float = 0.35
    evaluation_examples: int = 500
    validation_examples: int = 300
    workers: int = 2
    hardware: Hardware = CPU

    def __post_init__(self) -> None:
        if self.with_unknowns and (self.data.answer, self.data.numbers) == ("direct", "digits"):
            raise CalmError(
                f"Recipe.with_unknowns is {self.with_unknowns!r}: expected 0 with direct answers in digits, for which "
                "no one token is what a string is worth. Take numbers='whole', or restate."
            )
        if self.written_down and not (self.with_unknowns and self.data.answer == "direct"):
            raise CalmError(
                f"Recipe.written_down is {self.written_down!r}: expected 0 but for direct answers with_unknowns; a "
                "string is worth nothing that could be written down where answers restate."
            )
        if self.shared_embeddings and self.augmenting_model.width != self.anchor_model.width:
            raise CalmError(
                f"Recipe.shared_embeddings is True: expected models of one width, not {self.augmenting_model.width} "
                f"(m_A) and {self.anchor_model.width} (m_B)."
            )

    @property
    def number_of_connections(self) -> int:
        """How many there are."""
        return self.connections if isinstance(self.connections, int) else len(self.connections)


_GPU = Recipe(
    data=DataSettings(
        keys=25_000,
        syllables_per_key=(2, 2),
        values=(1, 25_000),
        unique_values=True,
        operands=(3, 6),
        numbers="digits",
        answer="direct",
    ),
    augmenting_model=ModelSettings(width=512, feed_forward=2048, layers=8, heads=8, initializer_range=0.02),
    augmenting_training=TrainingSettings(steps=20_000, rows=512, learning_rate=1e-3, warmup_steps=500, check_every=500),
    anchor_model=ModelSettings(width=512, feed_forward=1536, layers=12, heads=8, initializer_range=0.02),
    anchor_training=TrainingSettings(
        steps=20_000, rows=512, learning_rate=1e-3, warmup_steps=500, weight_decay=0.1, check_every=500
    ),
    composition_training=TrainingSettings(steps=5_000, rows=256, learning_rate=1e-3, warmup_steps=200),
    steps_on_all=20_000,
    connections=4,
    with_unknowns=0.0,
    evaluation_examples=1000,
    workers=1,
    hardware=Hardware(device="cuda", bf16=True, loaders=8),
)
PRESETS = {
    # `calm demo`: answers that restate the values, which a few minutes are enough for.
    "demo": Recipe(
        data=DataSettings(syllables_per_key=(2, 2)),
        augmenting_model=ModelSettings(width=64, feed_forward=256),
        augmenting_training=TrainingSettings(steps=500, rows=128, learning_rate=5e-3),
        anchor_model=ModelSettings(width=96, feed_forward=384),
        anchor_training=TrainingSettings(steps=800, rows=192, learning_rate=6e-3, weight_decay=0.1),
        composition_training=TrainingSettings(steps=600, rows=64, learning_rate=6e-3),
        steps_on_all=2000,  # as many lines of m_A's data as m_A has
    ),
    # Direct answers to three operands, the paper's fewest. How: docs/dev/LOG.md, "an m_B that writes down what it is
    # told" and "three operands".
    "cpu": Recipe(
        data=DataSettings(syllables_per_key=(2, 2), operands=(3, 3), answer="direct"),
        augmenting_model=ModelSettings(width=96, feed_forward=384),
        augmenting_training=TrainingSettings(steps=1500, rows=96, learning_rate=3e-3),
        anchor_model=ModelSettings(width=96, feed_forward=384),
        anchor_training=TrainingSettings(steps=8000, rows=192, learning_rate=6e-3, weight_decay=0.1),
        composition_training=TrainingSettings(steps=1000, rows=64, learning_rate=2e-3, weight_decay=0.1),
        steps_on_all=4500,  # as many lines of m_A's data as m_A has
        connections=((2, 0), (2, 1), (2, 2)),
        frozen_queries_and_keys=0.1,
        shared_embeddings=True,
        glossary_entries=5,
        glossary_share=(0.5, 0.5),
        with_unknowns=0.7,
        written_down=0.3,
        numeric_share=0.2,
    ),
    # Proves that everything runs, not that anything is learned.
    "tiny": Recipe(
        data=DataSettings(keys=80, syllables=20, values=(1, 5)),
        augmenting_model=ModelSettings(width=16, feed_forward=32, layers=2),
        augmenting_training=TrainingSettings(steps=20, rows=8, learning_rate=5e-3, check_every=10),
        anchor_model=ModelSettings(width=24, feed_forward=48, layers=2),
        anchor_training=TrainingSettings(steps=20, rows=8, learning_rate=5e-3, check_every=10),
        composition_training=TrainingSettings(steps=10, rows=8, learning_rate=5e-3),
        steps_on_all=20,
        connections=2,
        evaluation_examples=20,
        validation_examples=10,
        workers=1,
    ),
    # The paper's keys, values, numbers of operands and direct answers. It was never run; only its code was, at toy size
    # on a CPU. By `calm plan` and 6 x parameters x tokens, a step takes 4.0 TFLOPs for m_A, 5.4 for m_B and 2.6 for a
    # composition: 0.20 EFLOPs for the three, 34 minutes at 100 TFLOP/s; the other rows and curves take twice as many.
    "gpu": _GPU,
    # The paper's data whole. Products of up to six such numbers have up to 26 digits; expect NUM-MATH to suffer.
    "paper": dataclasses.replace(_GPU, data=dataclasses.replace(_GPU.data, operators=("+", "-", "x"))),
}


def preset(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        CalmError: there is none.
    """
    if name not in PRESETS:
        raise CalmError(f"preset={name!r}: expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]
