"""Accuracy: greedy generation on held-out expressions, and exact match of the full answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from calm.experiments.key_value_arithmetic.data import TASKS, Task, TaskName
from calm.experiments.key_value_arithmetic.lines import IGNORED, Line, encode
from calm.experiments.key_value_arithmetic.mixing import Mixed


@dataclass(frozen=True)
class Answer:
    """One answered expression, all as text.

    Args:
        prompt: what was asked.
        expected: the full right answer.
        given: what the model wrote.
        right: whether that counts.
    """

    prompt: str
    expected: str
    given: str
    right: bool


def evaluate(
    model: PreTrainedModel | Mixed,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    count: int,
    seed: int,
    names: Sequence[TaskName] = TASKS,
) -> dict[TaskName, list[Answer]]:
    """Ask a model for `count` expressions of each task, over held-out keys only.

    An answer to NUM-MATH and KV-MATH is right if all of it is. KV-SUBS looks at what precedes the first equals sign,
    since a model that restates and then solves goes on after the substitution.

    Args:
        model: any causal language model over the tokenizer's vocabulary.
        tokenizer: pads on the left.
        task: keys, values and the split.
        count: expressions of each task.
        seed: of the expressions.
        names: which tasks.

    Returns:
        The answers by task.
    """
    answers: dict[TaskName, list[Answer]] = {}
    for name in names:
        examples = task.examples(name, task.held_out_keys, count, seed)
        longest = max(len(tokenizer(expected)["input_ids"]) for _, expected in examples)
        given = generate(model, tokenizer, [prompt for prompt, _ in examples], longest + 1)
        if name == "KV-SUBS":
            given = [text.split(" =")[0] for text in given]
        answers[name] = [
            Answer(prompt, expected, text, text == expected)
            for (prompt, expected), text in zip(examples, given, strict=True)
        ]
    return answers


def flags_of(answers: Sequence[Answer]) -> str:
    """A "1" for each right answer, a "0" for each other one."""
    return "".join(str(int(answer.right)) for answer in answers)


def percent_right(flags: str) -> float:
    """Accuracy in percent, with one decimal, of "1" (right) and "0" for each expression."""
    return round(100 * flags.count("1") / len(flags), 1)


def numeric_perplexity(
    model: PreTrainedModel | Mixed, tokenizer: PreTrainedTokenizerFast, task: Task, count: int, seed: int
) -> float:
    """Perplexity of the answers to NUM-MATH, token by token: how much of `m_B`'s own data a model still knows.

    Arguments as for `evaluate`.
    """
    lines = [
        Line().add(tokenizer.tokenize(prompt), False).add([*tokenizer.tokenize(answer), "<end>"], True)
        for prompt, answer in task.examples("NUM-MATH", (), count, seed)
    ]
    total, tokens = 0.0, 0
    for start in range(0, len(lines), 256):
        batch = encode(lines[start : start + 256], tokenizer.get_vocab())
        learned = int((batch["labels"] != IGNORED).sum())
        with torch.no_grad():
            total += learned * float(model(**{name: ids.to(model.device) for name, ids in batch.items()}).loss)
        tokens += learned
    return math.exp(total / tokens)


def generate(
    model: PreTrainedModel | Mixed, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Complete prompts greedily, in large left-padded batches.

    Args:
        model: a causal language model.
        tokenizer: pads on the left.
        prompts: texts.
        max_new_tokens: most tokens to write.

    Returns:
        What was written, without the prompts.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), 256):
        batch = tokenizer(prompts[start : start + 256], return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            tokens = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
