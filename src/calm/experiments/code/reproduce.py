"""The code domain (paper section 4.3): completion, description and HumanEval, every method, several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from calm.experiments.checkpoints import SMOLLM2_135M
from calm.experiments.code.data import DataSettings, describe, load
from calm.experiments.methods import table
from calm.experiments.methods.run import parameters_of, run_seeds, seconds_of
from calm.experiments.methods.settings import FEW_RATES, SMOLLM2_CUT, Fit, Settings
from calm.experiments.results import Results, command, made_here


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of the experiment.

    Attributes:
        seeds: of the models and the order of examples. Learning rates are searched with the first one.
        data: how functions are chosen and split.
        methods: models and lengths of training.
    """

    seeds: tuple[int, ...]
    data: DataSettings
    methods: Settings


SPLIT = 0
"""Seed of the split, which is the same for all seeds, so that they answer the same questions."""

# Neither was run to its end yet: the sizes are worked out from how fast these models train.
PRESETS = {
    "cpu": Preset(
        seeds=(0,),
        data=DataSettings(composition_held_out=True, test=100, human_eval_tokens=96),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=180, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=350, rows=32, learning_rate=8e-4),
            connections=4,
            steps=60,
            steps_on_all=180,
            rows=16,
            search_steps=15,
            learning_rates=FEW_RATES,
            max_length=160,
        ),
    ),
    "gpu": Preset(
        seeds=(0, 1, 2),
        data=DataSettings(composition_held_out=True),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=600, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=2500, rows=32, learning_rate=8e-4),
            connections=4,
            steps=300,
            steps_on_all=2500,
            rows=32,
            search_steps=80,
        ),
    ),
}


def reproduce(
    preset: str, seeds: Sequence[int] | None, folder: Path, console: Console, allow_code_execution: bool
) -> Results:
    """Run what is not there yet of a preset.

    Args:
        preset: one of `PRESETS`.
        seeds: instead of the preset's.
        folder: where data, models and outcomes are kept.
        console: is told what is done.
        allow_code_execution: have the row `humaneval`, which runs what models write.
    """
    return reproduce_preset(preset, PRESETS[preset], seeds, folder, console, allow_code_execution)


def reproduce_preset(
    name: str,
    preset: Preset,
    seeds: Sequence[int] | None,
    folder: Path,
    console: Console,
    allow_code_execution: bool,
) -> Results:
    """As `reproduce`, with the sizes themselves."""
    asked = dataclasses.replace(preset.data, allow_code_execution=allow_code_execution)
    chosen = tuple(seeds) if seeds else preset.seeds
    data = load(asked, SPLIT, folder / "data")
    outcomes = run_seeds(data, preset.methods, chosen, folder, console)
    left_out = () if allow_code_execution else ("HumanEval was left out: it runs what models write, if you allow it.",)
    return Results(
        domain="code",
        preset=name,
        command=command("code", name, seeds, allow_code_execution),
        settings={**dataclasses.asdict(preset), "data_made": describe(asked, SPLIT, folder / "data")},
        seeds=chosen,
        parameters=parameters_of(folder / f"seed-{chosen[0]}"),
        notes=(
            "One split for all seeds, by files; a seed draws weights, the order of examples, and with them m_A.",
            "Nothing that is trained on resembles a held-out function or a solution of HumanEval.",
            preset.methods.about_all(),
            "m_A as an encoder sees one token of the plain texts whose perplexity is measured.",
            "m_B answers with three examples of D_C before the question, HumanEval excepted; every other method "
            "without.",
            *left_out,
        ),
        seconds=seconds_of(folder, chosen),
        **table.fields(data, outcomes),
        **made_here(),
    )
