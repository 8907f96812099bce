"""The dictionary domain: verbs of a language in the English past tense, every method, several seeds (issue 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from calm.experiments.checkpoints import SMOLLM2_135M
from calm.experiments.dictionary.data import DataSettings, describe, load
from calm.experiments.methods.examples import Data
from calm.experiments.methods.languages import Preset, results_of
from calm.experiments.methods.settings import SMOLLM2_CUT, Fit, Settings
from calm.experiments.results import Asked, Results

SPLIT = 2
"""No trial was made with it; trials have 0 and 1, from whose development verbs the form of the answers was chosen
(docs/dev/LOG.md, "the past tense of a word that is said first")."""

PRESETS: dict[str, Preset[DataSettings]] = {
    "cpu": Preset(
        languages=("cym",),
        seeds=(0,),
        split=SPLIT,
        data=DataSettings(),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=60, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=420, rows=64, learning_rate=1e-3),
            connections=4,
            steps=60,
            steps_on_all=300,
            rows=32,
            max_length=160,
            batch=32,
            # An hour has no room for the others.
            methods=("m_A", "m_B", "composed", "vanilla_m_A", "lora", "full_on_DC", "mixed_logits", "pipeline"),
        ),
        rates={"cym": dict(composed=3e-4, vanilla_m_A=1e-3, lora=1e-3, full_on_DC=1e-4, mixed_logits=0.3)},
    ),
    "gpu": Preset(
        languages=("cym", "isl"),
        seeds=(0, 1, 2),
        split=SPLIT,
        data=DataSettings(),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=600, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=800, rows=64, learning_rate=1e-3),
            connections=4,
            steps=400,
            steps_on_all=800,
            rows=32,
            batch=32,
        ),
    ),
}

NOTES = (
    "One split for all seeds; a seed draws weights, the order of examples, and with them m_A.",
    "m_A is trained on one word for each meaning of the dictionary's verbs, the tested ones among them, and on some of "
    "its other words, but on no past tense; no verb with the meaning of a tested one is in D_C. What is trained on D_C "
    "without m_A cannot know what a tested verb means: such rows show what guessing gives.",
    "All verbs of D_C, of the development set and of m_B's examples have a past in -ed: that another one may have "
    "another past is nothing that any method is shown.",
    "Only the last word of an answer counts, its past, and of a meaning only the first.",
    "The form of the answers and of m_A's examples was chosen on the development verbs of another split; no trial was "
    "made with this one.",
    "m_B answers with five examples of D_C before the question, alone, in the mixture and in the pipeline; every other "
    "method without.",
    "The paper has no such task: it is what low-resource translation leaves open, whether a composition adds anything "
    "to m_A where the anchor knows nothing of the language.",
)


def reproduce(preset: str, asked: Asked, folder: Path, console: Console) -> Results:
    """Run what is not there yet of a preset.

    Args:
        preset: one of `PRESETS`.
        asked: languages and seeds instead of the preset's, whether to search where an earlier search has found, and
            whether to run all methods; no code is executed in this domain.
        folder: where data, models and outcomes are kept.
        console: is told what is done.
    """
    return reproduce_preset(preset, PRESETS[preset], asked, folder, console)


def reproduce_preset(name: str, preset: Preset[DataSettings], asked: Asked, folder: Path, console: Console) -> Results:
    """As `reproduce`, with the sizes themselves."""

    def prepare(language: str) -> tuple[Data, dict[str, Any]]:
        settings = language, preset.data, preset.split, folder / "data"
        return load(*settings), describe(*settings)

    return results_of("dictionary", name, preset, asked, prepare, NOTES, folder, console)
