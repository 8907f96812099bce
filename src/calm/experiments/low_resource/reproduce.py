"""The low-resource domain (paper section 4.2): XX to English for several languages, every method, several seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from calm.experiments.checkpoints import SMOLLM2_135M
from calm.experiments.low_resource import hub
from calm.experiments.low_resource.catalogues import DESKTOP
from calm.experiments.low_resource.data import DataSettings, describe, load
from calm.experiments.low_resource.hub import HubSettings
from calm.experiments.methods.examples import Data
from calm.experiments.methods.languages import Preset, results_of
from calm.experiments.methods.settings import HELD_OUT, SEEN, SMOLLM2_CUT, Fit, Settings
from calm.experiments.results import METHODS, Asked, Results

SPLIT = 3
"""No trial was made with it; trials have 0 and 1 (docs/dev/LOG.md)."""

PRESETS: dict[str, Preset[DataSettings | HubSettings]] = {
    "cpu": Preset(
        languages=("cy",),
        seeds=(0,),
        split=SPLIT,
        data=DataSettings(packages=DESKTOP, composition_held_out=True, max_new_tokens=32),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=60, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=2800, rows=16, learning_rate=1e-3),
            connections=4,
            num_heads=3,
            steps=100,
            steps_on_all=600,
            rows=16,
            max_length=160,
            batch=32,
            # An hour has no room for the others.
            methods=("m_A", "m_B", "composed", "vanilla_m_A", "random_m_A", "lora", "mixed_logits", "pipeline"),
        ),
        rates={
            "cy": dict(composed=3e-4, vanilla_m_A=1e-3, random_m_A=3e-4, lora=1e-3, mixed_logits=0.9),
            "xh": dict(composed=1e-4, vanilla_m_A=1e-3, random_m_A=1e-3, lora=1e-3, mixed_logits=0.7),
            "om": dict(composed=3e-4, vanilla_m_A=3e-4, random_m_A=3e-4, lora=3e-3, mixed_logits=0.9),
            "fr": dict(composed=3e-4, vanilla_m_A=1e-3, random_m_A=3e-4, lora=3e-3, mixed_logits=0.7),
        },
    ),
    "gpu": Preset(
        # About 30,000, 12,000 and 6,000 messages; of the fourth, with 56,000, the anchor knows something.
        languages=("cy", "xh", "om", "fr"),
        seeds=(0, 1, 2),
        split=SPLIT,
        data=DataSettings(packages=DESKTOP, composition_held_out=True),
        methods=Settings(
            anchor=SMOLLM2_135M,
            augmenting=SMOLLM2_CUT,
            general=Fit(steps=600, rows=16, learning_rate=1e-3),
            specialist=Fit(steps=1500, rows=32, learning_rate=8e-4),
            connections=4,
            num_heads=3,
            steps=200,
            steps_on_all=1500,
            rows=32,
        ),
    ),
    # The paper's scale, on public checkpoints that share a tokenizer. Not run here; tests run it with stand-ins.
    "paper": Preset(
        languages=("cy", "ga", "gd", "oc", "rw", "xh"),
        seeds=(0, 1, 2),
        split=SPLIT,
        data=HubSettings(),
        methods=Settings(
            anchor="google/gemma-2-9b",
            augmenting="google/gemma-2-2b",
            general=None,
            specialist=Fit(steps=10_000, rows=64, learning_rate=2e-5),
            connections=8,
            steps=2000,
            steps_on_all=10_000,
            rows=64,
            learning_rates={
                "composition": (3e-5, 1e-4, 3e-4),
                "lora": (1e-4, 3e-4, 1e-3),
                "full": (5e-6, 1e-5, 3e-5),
            },
            # Without fine-tuning: 9B in float32 with AdamW's states are more than any one card holds.
            methods=tuple(name for name in METHODS if not name.startswith("full_on")),
        ),
    ),
}


NOTES = (
    "One split for all seeds; a seed draws weights, the order of examples, and with them m_A.",
    "Near-duplicates of a test message, in English or as the same translation, are in nothing that is trained on.",
    "m_B answers with five examples of D_C before the message, alone, in the mixture and in the pipeline; every other "
    "method without.",
)


def reproduce(preset: str, asked: Asked, folder: Path, console: Console) -> Results:
    """Run what is not there yet of a preset.

    Args:
        preset: one of `PRESETS`.
        asked: languages and seeds instead of the preset's, whether to search where an earlier search has found,
            whether m_A has seen D_C, and whether to run all methods; no code is executed in this domain.
        folder: where data, models and outcomes are kept.
        console: is told what is done.
    """
    return reproduce_preset(preset, PRESETS[preset], asked, folder, console)


def reproduce_preset(
    name: str, preset: Preset[DataSettings | HubSettings], asked: Asked, folder: Path, console: Console
) -> Results:
    """As `reproduce`, with the sizes themselves."""
    if asked.composition_seen and isinstance(preset.data, DataSettings):
        preset = dataclasses.replace(preset, data=dataclasses.replace(preset.data, composition_held_out=False))

    def prepare(language: str) -> tuple[Data, dict[str, Any]]:
        if isinstance(preset.data, HubSettings):
            return hub.load(language, preset.data, preset.split), {}
        settings = language, preset.data, preset.split, folder / "data"
        return load(*settings), describe(*settings)

    held_out = isinstance(preset.data, DataSettings) and preset.data.composition_held_out
    notes = (*NOTES, HELD_OUT if held_out else SEEN)
    return results_of("low_resource", name, preset, asked, prepare, notes, folder, console)
