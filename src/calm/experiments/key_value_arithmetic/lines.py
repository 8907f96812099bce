"""Training lines: what each model reads and which tokens it is asked to predict, drawn batch by batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from calm.experiments.key_value_arithmetic.data import Expression, Task, random_key, tokens_of, words_of

IGNORED = -100

AFTER_AN_ENTRY = 0.7
"""How often an operator or another sign follows an entry of a glossary that is for direct answers."""


@dataclass
class Line:
    """Tokens of one row, for each whether its prediction counts in the loss, and what some are worth (`Superposed`)."""

    words: list[str] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    worth: dict[int, str] = field(default_factory=dict)

    def add(self, words: Iterable[str], learned: bool) -> Line:
        """Append tokens that all count, or all do not."""
        for word in words:
            self.words.append(word)
            self.learned.append(learned)
        return self


def glossary_line(task: Task, rng: random.Random, entries: int) -> Line:
    """`key = value ; key = value`: only the values are learned.

    For direct answers it is `key value + key value key value -`: `m_A` then knows at a key's last token, where the
    anchor's position can take it from, what the key is worth, after whatever precedes a key in an expression.
    """
    line, signs = Line(), (*task.settings.operators, "=", ":", ";")
    for key in rng.sample(list(task.values), entries):
        if task.settings.answer == "restate":
            line.add([*words_of(key), "="], False).add([str(task.values[key])], True).add([";"], False)
        else:
            line.add(words_of(key), False).add([str(task.values[key])], True)
            line.add([rng.choice(signs)] if rng.random() < AFTER_AN_ENTRY else [], False)
    return line


def substitution_line(task: Task, rng: random.Random, keys: Sequence[str]) -> Line:
    """KV-SUBS with one operand or more.

    Args:
        task: keys and values.
        rng: where chance comes from.
        keys: the keys to draw from.
    """
    expression = task.expression(rng, keys, rng.randint(1, task.settings.operands[1]))
    line = Line().add([*expression.words(), task.question("KV-SUBS")], False)
    return line.add([*expression.substituted(task.values).words(), "<end>"], True)


def arithmetic_line(task: Task, rng: random.Random, with_unknowns: float, written_down: float = 0.0) -> Line:
    """NUM-MATH; in some lines operands are strings that mean nothing to the model.

    Each operand more is four times as likely: what is left after a reduction ranges wider than the numbers of the
    task, and short expressions would teach little of it.

    Where answers restate, what a string is worth cannot be known and is not learned, so that the model learns to go on
    from whatever number stands there. Where they are direct, it is told inside what the string is worth, at the
    string's last token (`Superposed`).

    Args:
        task: the range of numbers and expressions; its keys are not used.
        rng: where chance comes from.
        with_unknowns: share of the lines in which operands may be meaningless strings.
        written_down: share of the lines that ask KV-SUBS's question, where answers are direct: the expression again,
            with what the strings are worth.
    """
    fewest, most = task.settings.operands
    counts = range(fewest, most + 1)
    numbers = asked = task.trained_expression(rng, None, rng.choices(counts, [4**count for count in counts])[0])
    if rng.random() < with_unknowns:
        mixed = tuple(random_key(rng, task.settings) if rng.random() < 0.5 else n for n in numbers.operands)
        asked = Expression(mixed, numbers.operators)
    steps = numbers.reductions()
    if task.settings.answer == "direct":
        line = Line()
        for position, (operand, number) in enumerate(zip(asked.operands, numbers.operands, strict=True)):
            line.add([numbers.operators[position - 1]] if position else [], False).add(words_of(operand), False)
            if isinstance(operand, str):
                line.worth[len(line.words) - 1] = str(number)
        if rng.random() < written_down:
            return line.add([task.question("KV-SUBS")], False).add([*numbers.words(), "<end>"], True)
        return line.add([task.question("NUM-MATH")], False).add([*steps[-1].words(), "<end>"], True)
    line = Line().add([*asked.words(), "="], False)
    if asked != numbers:
        for position, (operand, number) in enumerate(zip(asked.operands, numbers.operands, strict=True)):
            line.add([numbers.operators[position - 1]] if position else [], True)
            line.add([str(number)], not isinstance(operand, str))
        line.add(["="], True)
    return line.add([*joined(steps[1:]), "<end>"], True)


def composition_line(task: Task, rng: random.Random, numeric: float) -> Line:
    """KV-MATH over the composition keys, and NUM-MATH so that it is kept.

    Args:
        task: keys, values and the split.
        rng: where chance comes from.
        numeric: share of NUM-MATH.
    """
    if rng.random() < numeric:
        return arithmetic_line(task, rng, with_unknowns=0.0)
    expression = task.trained_expression(rng, task.composition_keys)
    steps = expression.substituted(task.values).reductions()
    line = Line().add([*expression.words(), task.question("KV-MATH")], False)
    return line.add([*joined(steps if task.settings.answer == "restate" else steps[-1:]), "<end>"], True)


def joined(steps: Sequence[Expression]) -> list[str]:
    """The tokens of several expressions with equals signs between them."""
    words = steps[0].words()
    for step in steps[1:]:
        words += ["=", *step.words()]
    return words


class Batches(Dataset[dict[str, Tensor]]):
    """One item is one training step: a right-padded batch, drawn from the seed and the step alone.

    Args:
        draw: makes the rows of a step from a source of chance and the number of the step.
        vocabulary: the index of every token.
        steps: how many items there are.
        seed: the same seed draws the same batches.
    """

    def __init__(
        self, draw: Callable[[random.Random, int], list[Line]], vocabulary: Mapping[str, int], steps: int, seed: str
    ) -> None:
        self.draw, self.vocabulary, self.steps, self.seed = draw, vocabulary, steps, seed

    def __len__(self) -> int:
        """The number of steps."""
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """What a model reads in a step, as `encode` makes it."""
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return encode(self.draw(random.Random(f"key-value batch {self.seed} {step}"), step), self.vocabulary)


def encode(lines: Sequence[Line], vocabulary: Mapping[str, int]) -> dict[str, Tensor]:
    """Pad rows at their right end, where causal attention from a row's own tokens does not reach: no mask is needed.

    Returns:
        `input_ids` and `labels`, int64 [rows, longest]; labels are -100 where nothing is learned. Where some words are
        worth a number, `worth` too: the number's token at the word's (its last, if it has several), -100 elsewhere.
    """
    rows = []
    for line in lines:
        row: list[tuple[int, int, int]] = []
        for position, (word, learned) in enumerate(zip(line.words, line.learned, strict=True)):
            row += [(token, token if learned else IGNORED, IGNORED) for token in tokens_of(word, vocabulary)]
            if position in line.worth:
                row[-1] = (*row[-1][:2], vocabulary[line.worth[position]])
        rows.append(row)
    longest = max(len(row) for row in rows)
    padded = torch.tensor([row + [(vocabulary["<pad>"], IGNORED, IGNORED)] * (longest - len(row)) for row in rows])
    input_ids, labels, worth = (of_all.contiguous() for of_all in padded.unbind(-1))
    batch = {"input_ids": input_ids, "labels": labels}
    return batch | {"worth": worth} if any(line.worth for line in lines) else batch
