"""What composition is compared with: LoRA and fine-tuning of m_B, and the two models' log-probabilities mixed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from calm.experiments.key_value_arithmetic.composition import new_composition
from calm.experiments.key_value_arithmetic.data import Task
from calm.experiments.key_value_arithmetic.lines import (
    Batches,
    Line,
    composition_line,
    encode,
    glossary_line,
    substitution_line,
)
from calm.experiments.key_value_arithmetic.mixing import Mixed
from calm.experiments.key_value_arithmetic.recipe import RATES, Recipe
from calm.experiments.key_value_arithmetic.training import Report, Trained, exact_match, fit, trainable
from calm.experiments.methods.mixing import WEIGHTS
from calm.experiments.methods.training import with_lora


def train_baseline(
    name: str,
    anchor: Path,
    augmenting: Path,
    task: Task,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    report: Report,
) -> Trained:
    """Train `m_B` in another way than by composition, for as many steps (`full_on_all` longer); or mix it with `m_A`.

    Learning rates and weights are chosen by how many validation lines of `D_C` (composition keys) come out right.

    Args:
        name: `lora` (as many parameters as the composition trains, on `D_C`), `full_on_DC`, `full_on_all` (on `D_C` and
            `m_A`'s data, line by line in turns) or `mixed_logits`.
        anchor: the folder of `m_B`.
        augmenting: the folder of `m_A`.
        task: keys, values and the split.
        recipe: lengths and shares.
        tokenizer: of both.
        seed: of weights and data.
        report: is told about progress.
    """
    vocabulary = tokenizer.get_vocab()
    rng = random.Random(f"validation of {name} {seed}")
    lines = [composition_line(task, rng, recipe.numeric_share) for _ in range(recipe.validation_examples)]
    validation = encode(lines, vocabulary)
    if name == "mixed_logits":
        models = [
            AutoModelForCausalLM.from_pretrained(folder).to(recipe.hardware.device).eval()
            for folder in (anchor, augmenting)
        ]
        mixtures = {w: Mixed(models[0], models[1], w).eval() for w in WEIGHTS}
        right = {weight: exact_match(mixture, validation) for weight, mixture in mixtures.items()}
        best = max(right, key=lambda weight: right[weight])
        return Trained(mixtures[best], 0, 0, best, {f"{weight:g}": found for weight, found in right.items()})

    new: Callable[[], PreTrainedModel]
    if name == "lora":
        parameters = trainable(new_composition(anchor, augmenting, recipe, seed))

        def new() -> PreTrainedModel:
            return with_lora(AutoModelForCausalLM.from_pretrained(anchor), parameters, seed)
    else:

        def new() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(anchor)

    keys = list(task.values)

    def draw(rng: random.Random, step: int) -> list[Line]:
        rows = []
        for row in range(recipe.composition_training.rows):
            if name != "full_on_all" or row % 2:
                rows.append(composition_line(task, rng, recipe.numeric_share))
            elif rng.random() < recipe.glossary_share[1]:
                rows.append(glossary_line(task, rng, recipe.glossary_entries))
            else:
                rows.append(substitution_line(task, rng, keys))
                if task.settings.answer == "restate":
                    rows[-1].learned[-1] = False  # KV-MATH goes on where KV-SUBS ends, after the same prompt
        return rows

    def trained(rate: float, steps: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = new()
        settings = dataclasses.replace(recipe.composition_training, steps=steps, learning_rate=rate)
        fit(model, Batches(draw, vocabulary, steps, f"{name} {seed}"), settings, seed, report, hardware=recipe.hardware)
        return model

    steps = recipe.steps_on_all if name == "full_on_all" else recipe.composition_training.steps
    right = {rate: exact_match(trained(rate, max(1, steps // 4)), validation) for rate in RATES[name]}
    best = max(right, key=lambda rate: right[rate])
    model = trained(best, steps)
    return Trained(model, steps, trainable(model), best, {f"{rate:g}": found for rate, found in right.items()})
