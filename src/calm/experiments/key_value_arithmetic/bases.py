"""The two bases, trained from scratch: m_A learns what the keys are worth, m_B learns arithmetic."""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm.experiments.key_value_arithmetic.data import Task
from calm.experiments.key_value_arithmetic.lines import (
    Batches,
    Line,
    arithmetic_line,
    encode,
    glossary_line,
    packed,
    substitution_line,
)
from calm.experiments.key_value_arithmetic.recipe import ModelSettings, Recipe
from calm.experiments.key_value_arithmetic.training import Report, fit

CONTEXT = 128


def new_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A model with random weights (as it is, the random m_A of the ablation).

    Args:
        settings: its size.
        tokenizer: its vocabulary.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=settings.feed_forward,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            initializer_range=settings.initializer_range,
            max_position_embeddings=CONTEXT,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def train_augmenting(
    task: Task, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
) -> tuple[LlamaForCausalLM, int]:
    """Train `m_A` on KV-SUBS over all keys: glossary lines, and substitution over a growing number of keys.

    It stops as soon as it substitutes the validation expressions. Memorising comes early; knowing which operand is
    due comes late and suddenly, at a step that differs from seed to seed, hence a cap instead of a fixed length.

    Args:
        task: keys and values.
        recipe: sizes and lengths.
        tokenizer: of both bases.
        seed: of weights and data.
        report: is told about progress.

    Returns:
        The model and the number of steps.
    """
    keys, vocabulary = list(task.values), tokenizer.get_vocab()

    def draw(rng: random.Random, step: int) -> list[Line]:
        first, last = recipe.glossary_share
        share = first + (last - first) * min(1.0, step / recipe.glossary_steps)
        growth = (len(keys) / recipe.first_keys) ** min(1.0, step / recipe.growing_steps)
        known = keys[: round(recipe.first_keys * growth)]
        return [
            glossary_line(task, rng, recipe.glossary_entries)
            if rng.random() < share
            else packed(lambda: substitution_line(task, rng, known, recipe.with_numbers), recipe.row_length)
            for _ in range(recipe.augmenting_training.rows)
        ]

    rng = random.Random(f"validation of m_A {seed}")
    validation = []
    for _ in range(recipe.validation_examples):
        expression = task.expression(rng, task.composition_keys)
        line = Line().add([*expression.words(), task.question("KV-SUBS")], False)
        validation.append(line.add([*expression.substituted(task.values).words(), "<end>"], True))

    model = new_model(recipe.augmenting_model, tokenizer, seed)
    batches = Batches(draw, vocabulary, recipe.augmenting_training.steps, f"m_A {seed}")
    steps = fit(model, batches, recipe.augmenting_training, seed, report, encode(validation, vocabulary))
    return model, steps


def train_anchor(
    task: Task, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
) -> tuple[LlamaForCausalLM, int]:
    """Train `m_B` on NUM-MATH, with strings among the operands that it learns to step over.

    Args:
        task: the range of numbers and expressions.
        recipe: sizes and lengths.
        tokenizer: of both bases.
        seed: of weights and data.
        report: is told about progress.

    Returns:
        The model and the number of steps.
    """
    vocabulary = tokenizer.get_vocab()

    def draw(rng: random.Random, step: int) -> list[Line]:
        return [
            packed(lambda: arithmetic_line(task, rng, recipe.with_unknowns), recipe.row_length)
            for _ in range(recipe.anchor_training.rows)
        ]

    rng = random.Random(f"validation of m_B {seed}")
    # both kinds of lines: with unknown strings, the reductions must still be right
    validation = [arithmetic_line(task, rng, with_unknowns=i % 2) for i in range(recipe.validation_examples)]
    model = new_model(recipe.anchor_model, tokenizer, seed + 1)
    batches = Batches(draw, vocabulary, recipe.anchor_training.steps, f"m_B {seed}")
    steps = fit(model, batches, recipe.anchor_training, seed, report, encode(validation, vocabulary))
    return model, steps
