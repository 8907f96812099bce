"""The code domain (paper section 4.3): completion, description and HumanEval, every method, several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from calm.experiments.checkpoints import SMOLLM2_135M
from calm.experiments.code import hub
from calm.experiments.code.data import DataSettings, describe, load
from calm.experiments.code.hub import HubSettings
from calm.experiments.methods import table
from calm.experiments.methods.finished import notes_of, parameters_of, seconds_of
from calm.experiments.methods.run import run
from calm.experiments.methods.settings import HELD_OUT, SEEN, SMOLLM2_CUT, Fit, Settings
from calm.experiments.results import Asked, Results, made_here


@dataclasses.dataclass(frozen=True)
class Preset:
    """One size of the experiment.

    Attributes:
        seeds: of the models and the order of examples.
        split: seed of the split, which is the same for all seeds, so that they answer the same questions.
        data: how installed functions are chosen and split, or which data sets of a hub to take.
        methods: models and lengths of training.
        rates: the learning rate (for `mixed_logits` the weight) of each method that an earlier search found; empty for
            a search with the first seed.
    """

    seeds: tuple[int, ...]
    split: int
    data: DataSettings | HubSettings
    methods: Settings
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)


_WITH_EXAMPLES = {"m_B": "alone", "mixed_logits": "in the mixture", "pipeline": "in the pipeline"}
"""Methods that give `m_B` examples before the question, as a note words them."""

SPLIT = 1
"""No trial was made with it; trials have 0 (docs/dev/LOG.md)."""

# `gpu` was not run yet: its sizes are worked out from how fast these models train.
PRESETS = {
    "cpu": Preset(
        seeds=(0,),
        split=SPLIT,
        data=DataSettings(composition_held_out=True, test=160, human_eval_tokens=96),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=60, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=400, rows=32, learning_rate=1e-3),
            connections=4,
            num_heads=3,
            steps=100,
            steps_on_all=150,
            rows=16,
            max_length=160,
            # An hour has no room for the others.
            methods=("m_A", "m_B", "composed", "vanilla_m_A", "lora", "mixed_logits"),
        ),
        rates={"composed": 3e-4, "vanilla_m_A": 1e-3, "lora": 3e-3, "mixed_logits": 0.1},
    ),
    "gpu": Preset(
        seeds=(0, 1, 2),
        split=SPLIT,
        data=DataSettings(composition_held_out=True),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=600, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=2500, rows=32, learning_rate=8e-4),
            connections=4,
            num_heads=3,
            steps=300,
            steps_on_all=2500,
            rows=32,
        ),
    ),
    # The paper's scale on public checkpoints of one family, with one vocabulary, whose makers trained m_A on code. Not
    # run here; tests run it with stand-ins. The anchor's weights, gradients and AdamW states in float32 take 50 GB.
    "paper": Preset(
        seeds=(0, 1, 2),
        split=SPLIT,
        data=HubSettings(),
        methods=Settings(
            anchor="Qwen/Qwen2.5-3B",
            augmenting="Qwen/Qwen2.5-1.5B",
            general=None,
            specialist="Qwen/Qwen2.5-Coder-1.5B",
            connections=4,
            steps=1000,
            steps_on_all=4000,
            rows=64,
            learning_rates={
                "composition": (3e-5, 1e-4, 3e-4),
                "lora": (1e-4, 3e-4, 1e-3),
                "full": (5e-6, 1e-5, 3e-5),
            },
            max_length=512,
        ),
    ),
}


def reproduce(preset: str, asked: Asked, folder: Path, console: Console) -> Results:
    """Run what is not there yet of a preset.

    Args:
        preset: one of `PRESETS`.
        asked: seeds instead of the preset's, whether to have the row `humaneval`, which runs what models write,
            whether to search where an earlier search has found, whether m_A has seen D_C, and whether to run all
            methods.
        folder: where data, models and outcomes are kept.
        console: is told what is done.
    """
    return reproduce_preset(preset, PRESETS[preset], asked, folder, console)


def reproduce_preset(name: str, preset: Preset, asked: Asked, folder: Path, console: Console) -> Results:
    """As `reproduce`, with the sizes themselves."""
    seeds, allow_code_execution = asked.seeds or preset.seeds, asked.allow_code_execution
    if isinstance(preset.data, HubSettings):
        settings: DataSettings | HubSettings = preset.data
        data, made = hub.load(preset.data, preset.split, allow_code_execution)
        problems, kept_whole, tokens = "HumanEval and MBPP", "repositories", preset.data.program_tokens
        shown, about_form = "D_C or of MBPP's own", ""
        about_seen: tuple[str, ...] = ()  # a public m_A's makers do not say
    else:
        settings = dataclasses.replace(preset.data, allow_code_execution=allow_code_execution)
        if asked.composition_seen:
            settings = dataclasses.replace(settings, composition_held_out=False)
        about_seen = (HELD_OUT if settings.composition_held_out else SEEN,)
        data, made = load(settings, preset.split, folder / "data"), describe(settings, preset.split, folder / "data")
        problems, kept_whole, tokens = "HumanEval", "files", preset.data.human_eval_tokens
        shown = "D_C"
        about_form = (
            " It asks in a form that D_C has and m_B's prompt shows no example of, a description and then the code: "
            "what a method gains there over m_B is partly that form, which LoRA and the vanilla m_A learn, too."
        )
    known = {} if asked.searches else preset.rates
    if asked.all_methods:
        preset = dataclasses.replace(preset, methods=preset.methods.with_all_methods())
    outcomes = run({"": data}, preset.methods, seeds, folder, console, {"": known} if known else None)[""]
    about_problems = (
        f"An answer to {problems} ends after {tokens} tokens, which some need more than. Prompts of HumanEval end "
        f"within the indentation of the body here, its own with the line before.{about_form}"
        if allow_code_execution
        else f"Left out, since no code that a model wrote was to run: {problems}."
    )
    return Results(
        domain="code",
        preset=name,
        variant=asked.variant(preset.seeds, code_left_out=not allow_code_execution),
        command=asked.command("code", name),
        settings={
            **dataclasses.asdict(dataclasses.replace(preset, seeds=seeds, data=settings, rates=known)),
            "data_made": made,
        },
        seeds=seeds,
        parameters=parameters_of(folder, seeds[0]),
        notes=(
            f"One split for all seeds, by {kept_whole}; a seed draws weights and the order of examples, and with them "
            "an m_A that is trained here.",
            f"Nothing that is trained on here resembles a held-out function or a solution of {problems}.",
            *about_seen,
            *preset.methods.notes(("",) if known else ()),
            *notes_of(folder, preset.methods, {"": outcomes}),
            f"m_B answers with three examples before the question, of {shown}, HumanEval excepted, "
            f"{' and '.join(where for method, where in _WITH_EXAMPLES.items() if method in preset.methods.methods)}; "
            "every other method without.",
            about_problems,
        ),
        seconds=seconds_of(folder, seeds),
        **table.fields(data, outcomes),
        **made_here(),
    )
