"""Composes two bases and trains the connections on `D_C`."""

from __future__ import annotations

import random
from pathlib import Path

import torch

import calm
from calm.experiments.key_value_arithmetic.data import Task, build_tokenizer
from calm.experiments.key_value_arithmetic.lines import Batches, Line, composition_line
from calm.experiments.key_value_arithmetic.recipe import Recipe
from calm.experiments.key_value_arithmetic.training import Report, Trained, fit, trainable


def new_composition(
    anchor: Path, augmenting: Path, recipe: Recipe, seed: int, attend: str = "causal"
) -> calm.CalmForCausalLM:
    """Compose two bases as a recipe says.

    Args:
        anchor: the folder of `m_B`.
        augmenting: the folder of the augmenting model.
        recipe: which connections, and whether their queries and keys are trained.
        seed: of their weights.
        attend: as for `calm.compose`.
    """
    torch.manual_seed(seed)
    model = calm.compose(str(anchor), str(augmenting), recipe.connections, attend=attend)
    if recipe.frozen_queries_and_keys is not None:
        for name, weight in model.connections.named_parameters():
            if name.endswith(("w_q.weight", "w_k.weight")):
                weight.data.mul_(recipe.frozen_queries_and_keys)
                weight.requires_grad_(False)
    return model


def compose_and_train(
    anchor: Path, augmenting: Path, task: Task, recipe: Recipe, seed: int, report: Report, attend: str = "causal"
) -> Trained:
    """Compose two bases and train the connections on `D_C`.

    Args:
        anchor: the folder of `m_B`.
        augmenting: the folder of the augmenting model.
        task: keys, values and the split.
        recipe: sizes and lengths.
        seed: of weights and data.
        report: is told about progress.
        attend: as for `calm.compose`.
    """
    model = new_composition(anchor, augmenting, recipe, seed, attend)
    steps = train_composition(model, task, recipe, seed, report)
    return Trained(model, steps, trainable(model), recipe.composition_training.learning_rate)


def train_composition(model: calm.CalmForCausalLM, task: Task, recipe: Recipe, seed: int, report: Report) -> int:
    """Train the connections on `D_C`: KV-MATH over the composition keys, and some NUM-MATH.

    Args:
        model: trained in place.
        task: keys, values and the split.
        recipe: lengths and shares.
        seed: of the data.
        report: is told about progress.

    Returns:
        The number of steps.
    """

    def draw(rng: random.Random, step: int) -> list[Line]:
        return [composition_line(task, rng, recipe.numeric_share) for _ in range(recipe.composition_training.rows)]

    vocabulary = build_tokenizer(recipe.data).get_vocab()
    batches = Batches(draw, vocabulary, recipe.composition_training.steps, f"D_C {seed}")
    return fit(model, batches, recipe.composition_training, seed, report, hardware=recipe.hardware)
