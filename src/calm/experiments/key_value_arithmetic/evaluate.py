"""Accuracy: greedy generation on held-out expressions, and exact match of the full answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from calm.experiments.key_value_arithmetic.data import TASKS, Task, TaskName


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, count: int, seed: int
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

    Returns:
        The answers by task.
    """
    answers: dict[TaskName, list[Answer]] = {}
    for name in TASKS:
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


def percent_right(answers: list[Answer]) -> float:
    """Accuracy in percent, with one decimal."""
    return round(100 * sum(answer.right for answer in answers) / len(answers), 1)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int
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
        batch = tokenizer(prompts[start : start + 256], return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
