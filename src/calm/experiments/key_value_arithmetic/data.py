"""The key-value data: keys and their values, the three tasks, training lines, and the tokenizer they are written in."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm.errors import CalmError

TaskName = Literal["KV-SUBS", "NUM-MATH", "KV-MATH"]
TASKS: tuple[TaskName, ...] = ("KV-SUBS", "NUM-MATH", "KV-MATH")

ONSETS = (*"bdfghjklmnprstvwz", "ch", "sh", "th", "br", "dr", "gr", "kr", "pr", "tr")
SYLLABLES = tuple(onset + vowel + coda for coda in ("", "n") for onset in ONSETS for vowel in "aeiou")
SPECIAL_TOKENS = ("<pad>", "<end>", "<unknown>")
LARGEST_VOCABULARY = 65_536
SIGN = "~"
"""The token for the sign of a negative number among digits; the minus between operands is another."""

# One turn is one expression: earlier turns are not part of the task, and the equals sign asks for the answer.
CHAT_TEMPLATE = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% set text = asked['content'] | trim %}"
    "{{ text if text.endswith('=') or text.endswith(':') else text + ' =' }}"
    "{% if messages[-1]['role'] == 'assistant' %}{{ ' ' + messages[-1]['content'] + eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class DataSettings:
    """How much of which data (METHOD, "key-value arithmetic").

    Args:
        keys: number of keys.
        syllables: number of distinct syllables that the keys are built from, at most 260.
        syllables_per_key: fewest and most syllables of a key.
        values: smallest and largest value of a key; also the range of the numbers in NUM-MATH.
        unique_values: every key has its own value, as in the paper.
        operands: fewest and most operands of an expression.
        operators: a selection of "+", "-" and "x".
        numbers: "whole" has one token for each integer, "digits" one for each digit and one for the sign, where results
            reach too far for that.
        answer: "restate" answers with one reduction at a time, KV-MATH after restating the expression in numbers;
            "direct" with the result alone, as in the paper (KV-SUBS is then asked for with ":").
        composition_share: share of the keys that the composition may see; evaluation uses the others.
        held_out_expressions: share of the expressions in numbers that nothing is trained on and NUM-MATH asks for: a
            model that has seen them all would not have to calculate.

    Raises:
        CalmError: a setting that no data can be built from.
    """

    keys: int = 1000
    syllables: int = 256
    syllables_per_key: tuple[int, int] = (2, 3)
    values: tuple[int, int] = (1, 19)
    unique_values: bool = False
    operands: tuple[int, int] = (2, 3)
    operators: tuple[str, ...] = ("+", "-")
    numbers: Literal["whole", "digits"] = "whole"
    answer: Literal["restate", "direct"] = "restate"
    composition_share: float = 0.2
    held_out_expressions: float = 0.1

    def __post_init__(self) -> None:
        low, high = self.values
        checks = {
            "syllables": (1 <= self.syllables <= len(SYLLABLES), f"1 to {len(SYLLABLES)}"),
            "syllables_per_key": (1 <= self.syllables_per_key[0] <= self.syllables_per_key[1], "1 <= fewest <= most"),
            "values": (0 <= low <= high, "0 <= smallest <= largest"),
            "operands": (1 <= self.operands[0] <= self.operands[1], "1 <= fewest <= most"),
            "operators": (bool(self.operators) and set(self.operators) <= {"+", "-", "x"}, "some of '+', '-', 'x'"),
            "numbers": (self.numbers in ("whole", "digits"), "'whole' or 'digits'"),
            "answer": (self.answer in ("restate", "direct"), "'restate' or 'direct'"),
            "composition_share": (0 < self.composition_share < 1, "between 0 and 1"),
            "held_out_expressions": (0 < self.held_out_expressions < 1, "between 0 and 1"),
            "unique_values": (
                not self.unique_values or high - low + 1 >= self.keys,
                f"False, or at least {self.keys} values for {self.keys} keys",
            ),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise CalmError(f"DataSettings.{name} is {getattr(self, name)!r}; expected {expected}.")
        fewest, most = self.syllables_per_key
        possible = sum(self.syllables**length for length in range(fewest, most + 1))
        if not self.operands[1] <= round(self.keys * self.composition_share) < self.keys <= possible // 2:
            raise CalmError(
                f"DataSettings.keys is {self.keys}; expected at most {possible // 2} (half of what can be spelled) and "
                f"enough for expressions of {self.operands[1]} keys on both sides of the split."
            )


Operand: TypeAlias = "str | int"


class Expression(NamedTuple):
    """Operands (a string is a key, an integer a number) and the operators between them."""

    operands: tuple[Operand, ...]
    operators: tuple[str, ...]

    def words(self) -> list[str]:
        """The expression as tokens: one for each syllable, number and operator."""
        words = words_of(self.operands[0])
        for operator, operand in zip(self.operators, self.operands[1:], strict=True):
            words += [operator, *words_of(operand)]
        return words

    def text(self) -> str:
        """The expression as people write it."""
        parts = [str(self.operands[0])]
        for operator, operand in zip(self.operators, self.operands[1:], strict=True):
            parts += [operator, str(operand)]
        return " ".join(parts)

    def substituted(self, values: dict[str, int]) -> Expression:
        """The same expression with each key replaced by its value."""
        numbers = tuple(values[operand] if isinstance(operand, str) else operand for operand in self.operands)
        return Expression(numbers, self.operators)

    def reductions(self) -> list[Expression]:
        """This expression in numbers and what is left after each reduction; the last one is the result.

        Products are reduced first, then sums and differences from left to right.
        """
        steps = [self]
        while steps[-1].operators:
            operands, operators = steps[-1]
            at = operators.index("x") if "x" in operators else 0
            left, right = operands[at], operands[at + 1]
            if isinstance(left, str) or isinstance(right, str):
                raise TypeError(f"{self.text()!r} holds a key; substitute its value first.")
            result = {"+": left + right, "-": left - right, "x": left * right}[operators[at]]
            steps.append(
                Expression((*operands[:at], result, *operands[at + 2 :]), operators[:at] + operators[at + 1 :])
            )
        return steps


def words_of(operand: Operand) -> list[str]:
    """The tokens of one operand: its syllables, or one integer."""
    return operand.split("-") if isinstance(operand, str) else [str(operand)]


@dataclass(frozen=True)
class Task:
    """One drawn world: which keys there are, what they are worth and who may see which.

    Args:
        settings: what it was drawn with.
        values: the value of every key.
        composition_keys: the keys of `D_C`.
        held_out_keys: all other keys; evaluation uses nothing else.
    """

    settings: DataSettings
    values: dict[str, int]
    composition_keys: tuple[str, ...]
    held_out_keys: tuple[str, ...]

    @classmethod
    def draw(cls, settings: DataSettings, seed: int) -> Task:
        """Draw keys, values and the split.

        Args:
            settings: how many of which.
            seed: the same seed draws the same task.
        """
        rng = random.Random(f"key-value task {seed}")
        low, high = settings.values
        keys: dict[str, None] = {}
        while len(keys) < settings.keys:
            keys[random_key(rng, settings)] = None
        if settings.unique_values:
            values = rng.sample(range(low, high + 1), len(keys))
        else:
            values = [rng.randint(low, high) for _ in keys]
        shuffled = rng.sample(list(keys), len(keys))
        count = round(len(keys) * settings.composition_share)
        return cls(settings, dict(zip(keys, values, strict=True)), tuple(shuffled[:count]), tuple(shuffled[count:]))

    def revalued(self, seed: int) -> Task:
        """The same keys and split with values drawn anew: what a model knows that is no specialist on these keys."""
        rng = random.Random(f"key-value values {seed}")
        redrawn = rng.sample(list(self.values.values()), len(self.values))
        if not self.settings.unique_values:
            low, high = self.settings.values
            redrawn = [rng.randint(low, high) for _ in self.values]
        return Task(
            self.settings, dict(zip(self.values, redrawn, strict=True)), self.composition_keys, self.held_out_keys
        )

    def expression(self, rng: random.Random, keys: Sequence[str] | None, operands: int | None = None) -> Expression:
        """Draw one expression.

        Args:
            rng: where chance comes from.
            keys: the keys to draw distinct operands from; None for numbers.
            operands: how many; None draws it from the settings.
        """
        count = operands or rng.randint(*self.settings.operands)
        numbers = [rng.randint(*self.settings.values) for _ in range(count)]
        drawn: Sequence[Operand] = numbers if keys is None else rng.sample(keys, count)
        return Expression(tuple(drawn), tuple(rng.choices(self.settings.operators, k=count - 1)))

    def trained_expression(
        self, rng: random.Random, keys: Sequence[str] | None, operands: int | None = None
    ) -> Expression:
        """As `expression`, but none that in numbers is held out, nor one that is when a part of it is reduced."""
        while True:
            drawn = self.expression(rng, keys, operands)
            if not any(map(self.is_held_out, drawn.substituted(self.values).reductions())):
                return drawn

    def is_held_out(self, expression: Expression) -> bool:
        """Whether an expression in numbers is one that nothing is trained on; the same ones for every task."""
        drawn = int.from_bytes(hashlib.sha256(expression.text().encode()).digest()[:4], "big") / 2**32
        return bool(expression.operators) and drawn < self.settings.held_out_expressions

    def prompt(self, name: TaskName, expression: Expression) -> str:
        """The text that asks for an answer."""
        return f"{expression.text()} {self.question(name)}"

    def question(self, name: TaskName) -> str:
        """The prompt's last token. Restating begins alike for all three tasks, so only "direct" tells them apart."""
        return ":" if name == "KV-SUBS" and self.settings.answer == "direct" else "="

    def answer(self, name: TaskName, expression: Expression) -> str:
        """The text of the full answer, without the end token."""
        numbers = expression.substituted(self.values)
        if name == "KV-SUBS":
            return numbers.text()
        steps = numbers.reductions()
        if self.settings.answer == "direct":
            steps = steps[-1:]
        elif name == "NUM-MATH":
            steps = steps[1:]  # already in numbers: nothing to restate
        return " = ".join(step.text() for step in steps)

    def examples(self, name: TaskName, keys: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
        """Distinct (prompt, answer) pairs.

        Args:
            name: the task.
            keys: which keys may occur (NUM-MATH has none, and only expressions that are held out).
            count: how many.
            seed: the same seed draws the same examples.
        """
        rng = random.Random(f"key-value examples {name} {seed}")
        drawn: dict[Expression, None] = {}
        for _ in range(round(100 * count / self.settings.held_out_expressions)):
            if len(drawn) == count:
                return [(self.prompt(name, e), self.answer(name, e)) for e in drawn]
            expression = self.expression(rng, None if name == "NUM-MATH" else keys)
            if name != "NUM-MATH" or self.is_held_out(expression):
                drawn[expression] = None
        raise CalmError(f"{name} has fewer than {count} different expressions; ask for fewer, or widen DataSettings.")


def random_key(rng: random.Random, settings: DataSettings) -> str:
    """A string of syllables, such as "ba-du"."""
    return "-".join(rng.choices(SYLLABLES[: settings.syllables], k=rng.randint(*settings.syllables_per_key)))


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def build_tokenizer(settings: DataSettings) -> PreTrainedTokenizerFast:
    """One token for each syllable, operator and integer that these settings can reach, or for each digit.

    A hyphen between letters belongs to a key and is no token; a minus stands between spaces; "-7" is one integer.
    Decoding puts the hyphens back, so that text survives the round trip.

    Raises:
        CalmError: the results reach too far for one token an integer.
    """
    digits = settings.numbers == "digits"
    numbers = (SIGN, *"0123456789") if digits else (str(number) for number in _reachable(settings))
    words = itertools.chain(SPECIAL_TOKENS, "+-x=:;", SYLLABLES[: settings.syllables], numbers)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unknown>"))
    split: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(r"\s+|(?<=[a-z])-(?=[a-z])"), behavior="removed")
    ]
    joined: list[decoders.Decoder] = [
        decoders.WordPiece(prefix="##", cleanup=False),
        decoders.Fuse(),
        decoders.Replace(Regex(r"(?<=[a-wyz]) (?=[a-wyz])"), "-"),
    ]
    if digits:
        tokenizer.normalizer = normalizers.Replace(Regex(r"-(?=[0-9])"), SIGN)
        split.append(pre_tokenizers.Split(Regex(rf"{SIGN}|[0-9]"), behavior="isolated"))
        joined += [decoders.Replace(Regex(rf"(?<=[{SIGN}0-9]) (?=[0-9])"), ""), decoders.Replace(SIGN, "-")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Sequence(joined)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def tokens_of(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The token of a word, or those of a number's digits, as the tokenizer makes them."""
    return [vocabulary[word]] if word in vocabulary else [vocabulary[digit] for digit in word.replace("-", SIGN)]


def _reachable(settings: DataSettings) -> range:
    low, high = settings.values
    most = settings.operands[1]
    largest, subtracted = (max(high * n, high**n if "x" in settings.operators else 0) for n in (most, most - 1))
    smallest = low - subtracted if "-" in settings.operators else low
    if largest - smallest > LARGEST_VOCABULARY:
        raise CalmError(
            f"Results lie between {smallest} and {largest}, too many for one token an integer; expected at most "
            f"{LARGEST_VOCABULARY}. Choose numbers='digits', smaller values, fewer operands, or leave out 'x'."
        )
    return range(smallest, largest + 1)
