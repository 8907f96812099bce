"""The two bases, trained from scratch: m_A learns what the keys are worth, m_B learns arithmetic."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calm.experiments.key_value_arithmetic.data import Task
from calm.experiments.key_value_arithmetic.lines import (
    Batches,
    Line,
    arithmetic_line,
    encode,
    glossary_line,
    substitution_line,
)
from calm.experiments.key_value_arithmetic.recipe import ModelSettings, Recipe
from calm.experiments.key_value_arithmetic.superposition import Superposed
from calm.experiments.key_value_arithmetic.training import Report, fit

CONTEXT = 128


def new_augmenting(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, seed: int, embeddings: Tensor | None = None
) -> GPT2LMHeadModel:
    """`m_A` with random weights (as it is, the random m_A of the ablation).

    A GPT-2, because its positions are absolute: which operand is due next then follows from the position alone, which
    it learns in a sixth of the steps that a llama of this size needs (docs/dev/LOG.md).

    Args:
        settings: its size.
        tokenizer: its vocabulary.
        seed: of its weights.
        embeddings: [vocabulary, width]: those of its tokens, and its head, not to be trained; None for its own.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=settings.width,
            n_inner=settings.feed_forward,
            n_layer=settings.layers,
            n_head=settings.heads,
            n_positions=CONTEXT,
            initializer_range=settings.initializer_range,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=embeddings is not None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    if embeddings is not None:
        weight = model.get_input_embeddings().weight
        weight.data.copy_(embeddings)
        weight.requires_grad_(False)
    return model


def new_anchor(settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """`m_B` with random weights, a llama whose embeddings serve as its head, so that numbers are learned once.

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
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def train_augmenting(
    task: Task,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    report: Report,
    embeddings: Tensor | None = None,
) -> tuple[GPT2LMHeadModel, int]:
    """Train `m_A` on KV-SUBS over all keys: glossary lines, and substitution.

    There is no early stop: once it substitutes, it goes on growing surer, and a surer `m_A` composes far better
    (docs/dev/LOG.md).

    Args:
        task: keys and values.
        recipe: sizes and lengths.
        tokenizer: of both bases.
        seed: of weights and data.
        report: is told about progress.
        embeddings: as for `new_augmenting`.

    Returns:
        The model and the number of steps.
    """
    keys, vocabulary = list(task.values), tokenizer.get_vocab()
    training = recipe.augmenting_training

    def draw(rng: random.Random, step: int) -> list[Line]:
        first, last = recipe.glossary_share
        share = first + (last - first) * step / training.steps
        return [
            glossary_line(task, rng, recipe.glossary_entries)
            if rng.random() < share
            else substitution_line(task, rng, keys)
            for _ in range(training.rows)
        ]

    rng = random.Random(f"validation of m_A {seed}")
    validation = []
    for _ in range(recipe.validation_examples):
        expression = task.expression(rng, task.composition_keys)
        line = Line().add([*expression.words(), task.question("KV-SUBS")], False)
        validation.append(line.add([*expression.substituted(task.values).words(), "<end>"], True))

    model = new_augmenting(recipe.augmenting_model, tokenizer, seed, embeddings)
    batches = Batches(draw, vocabulary, training.steps, f"m_A {seed}")
    steps = fit(model, batches, training, seed, report, encode(validation, vocabulary), recipe.hardware)
    return model, steps


def train_anchor(
    task: Task, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, report: Report
) -> tuple[LlamaForCausalLM, int]:
    """Train `m_B` on NUM-MATH, with strings among the operands: to step over, or with a number told inside.

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
        unknown, written = recipe.with_unknowns, recipe.written_down
        return [arithmetic_line(task, rng, unknown, written) for _ in range(recipe.anchor_training.rows)]

    rng = random.Random(f"validation of m_B {seed}")
    # both kinds of lines: with unknown strings, the reductions must still be right
    every_other = bool(recipe.with_unknowns)
    validation = [arithmetic_line(task, rng, i % 2 * every_other) for i in range(recipe.validation_examples)]
    model = new_anchor(recipe.anchor_model, tokenizer, seed + 1)
    batches = Batches(draw, vocabulary, recipe.anchor_training.steps, f"m_B {seed}")
    low, high = task.settings.values
    trained: LlamaForCausalLM | Superposed = model
    if task.settings.answer == "direct" and recipe.with_unknowns:
        trained = Superposed(
            model, torch.tensor([vocabulary[str(number)] for number in range(low, high + 1)]), recipe.superposition
        )
    steps = fit(trained, batches, recipe.anchor_training, seed, report, encode(validation, vocabulary), recipe.hardware)
    return model, steps
