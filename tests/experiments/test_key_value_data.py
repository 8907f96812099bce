"""The data of the key-value experiment say what they claim, and nothing leaks from the held-out keys."""

import dataclasses
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calm
from calm.experiments.key_value_arithmetic import bases, recipe
from calm.experiments.key_value_arithmetic.data import TASKS, DataSettings, Expression, Task, build_tokenizer
from calm.experiments.key_value_arithmetic.lines import (
    IGNORED,
    Batches,
    Line,
    arithmetic_line,
    composition_line,
    encode,
    glossary_line,
    substitution_line,
)

SETTINGS = DataSettings()


@pytest.fixture(scope="module")
def task():
    return Task.draw(SETTINGS, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(SETTINGS)


# -- data --------------------------------------------------------------------------------------------------------------


def test_split_and_values(task):
    assert len(task.values) == 1000
    assert len(task.composition_keys) == 200
    assert set(task.composition_keys) | set(task.held_out_keys) == set(task.values)
    assert not set(task.composition_keys) & set(task.held_out_keys)
    assert {min(task.values.values()), max(task.values.values())} == {1, 19}
    assert {key.count("-") for key in task.values} == {1, 2}


def test_seed_decides_everything(task):
    assert Task.draw(SETTINGS, 0) == task
    assert Task.draw(SETTINGS, 1) != task
    assert task.examples("KV-MATH", task.held_out_keys, 5, 0) == task.examples("KV-MATH", task.held_out_keys, 5, 0)
    assert task.examples("KV-MATH", task.held_out_keys, 5, 0) != task.examples("KV-MATH", task.held_out_keys, 5, 1)


def test_revalued_keeps_keys_and_split(task):
    other = task.revalued(0)
    assert other.values.keys() == task.values.keys() and other.held_out_keys == task.held_out_keys
    same = sum(other.values[key] == value for key, value in task.values.items())
    assert same < 100  # 1 in 19 by chance


def test_unique_values_as_in_the_paper():
    task = Task.draw(DataSettings(keys=500, values=(1, 500), unique_values=True, operands=(3, 6)), 0)
    assert sorted(task.values.values()) == list(range(1, 501))
    assert sorted(task.revalued(0).values.values()) == list(range(1, 501))


@pytest.mark.parametrize(
    ("answer", "name", "expected"),
    [
        ("restate", "KV-SUBS", ("a + b - c =", "10 + 12 - 4")),
        ("restate", "NUM-MATH", ("10 + 12 - 4 =", "22 - 4 = 18")),
        ("restate", "KV-MATH", ("a + b - c =", "10 + 12 - 4 = 22 - 4 = 18")),
        ("direct", "KV-SUBS", ("a + b - c :", "10 + 12 - 4")),
        ("direct", "NUM-MATH", ("10 + 12 - 4 =", "18")),
        ("direct", "KV-MATH", ("a + b - c =", "18")),
    ],
)
def test_the_three_tasks(answer, name, expected):
    values = {"a": 10, "b": 12, "c": 4}
    task = Task(dataclasses.replace(SETTINGS, answer=answer), values, (), tuple(values))
    expression = Expression(("a", "b", "c"), ("+", "-"))
    if name == "NUM-MATH":
        expression = expression.substituted(values)
    assert (task.prompt(name, expression), task.answer(name, expression)) == expected


@given(st.lists(st.integers(1, 19), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_reductions_end_in_what_python_says(numbers, rng):
    operators = tuple(rng.choices("+-x", k=len(numbers) - 1))
    steps = Expression(tuple(numbers), operators).reductions()
    results = {eval(step.text().replace("x", "*").replace("--", "+")) for step in steps}
    assert results == {steps[-1].operands[0]}
    assert [len(step.operands) for step in steps] == list(range(len(numbers), 0, -1))


def test_examples_are_distinct_and_held_out(task):
    examples = task.examples("KV-MATH", task.held_out_keys, 500, 0)
    assert len(set(examples)) == 500
    seen = {word for prompt, _ in examples for word in prompt.split() if word[0].isalpha()}
    assert seen and not seen & set(task.composition_keys)


@pytest.mark.parametrize("answer", ["restate", "direct"])
def test_what_is_asked_in_numbers_was_in_no_training_line(answer):
    task = Task.draw(dataclasses.replace(SETTINGS, answer=answer), 0)
    asked = {prompt.removesuffix(" =") for prompt, _ in task.examples("NUM-MATH", (), 500, 0)}
    rng = random.Random(0)
    lines = [arithmetic_line(task, rng, 0.5, 0.3 * (answer == "direct")) for _ in range(3000)]
    lines += [composition_line(task, rng, 0.3) for _ in range(3000)]

    def in_numbers(line):
        words = [line.worth.get(at, word) for at, word in enumerate(line.words)]
        text = " ".join(words).replace(" <end>", "")
        for key in sorted(keys_in(line, task), key=len, reverse=True):
            if key in task.values:  # and not a string that means nothing
                text = text.replace(key.replace("-", " "), str(task.values[key]))
        return {part.strip() for part in re.split("[=:]", text)}

    seen = set().union(*map(in_numbers, lines))
    assert len(asked) == 500 and len(seen) > 4000
    assert not asked & seen
    drawn = {task.expression(rng, None).text() for _ in range(6000)}
    assert len(asked & drawn) > 50, "drawn at random, many of them would have been there"


def test_too_few_expressions_is_an_error():
    task = Task.draw(DataSettings(values=(1, 2), operands=(1, 1)), 0)
    with pytest.raises(calm.CalmError, match="fewer than 10 different"):
        task.examples("NUM-MATH", (), 10, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keys", 2),
        ("keys", 10**9),
        ("syllables", 0),
        ("syllables_per_key", (3, 2)),
        ("values", (5, 1)),
        ("operands", (0, 2)),
        ("operators", ("/",)),
        ("operators", ()),
        ("answer", "guess"),
        ("composition_share", 1.0),
        ("unique_values", True),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(calm.CalmError, match=rf"DataSettings\.{name} is"):
        DataSettings(**{name: value})


# -- tokenizer ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_text_round_trips(seed):
    rng, task, tokenizer = random.Random(seed), Task.draw(SETTINGS, 0), build_tokenizer(SETTINGS)
    expression = task.expression(rng, list(task.values))
    for name in TASKS:
        asked = expression.substituted(task.values) if name == "NUM-MATH" else expression
        text = f"{task.prompt(name, asked)} {task.answer(name, asked)}"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_one_token_each(tokenizer):
    assert tokenizer.tokenize("ba-du - ki = -7 - 12") == ["ba", "du", "-", "ki", "=", "-7", "-", "12"]
    assert tokenizer.decode(tokenizer("ba x du")["input_ids"]) == "ba x du"
    assert tokenizer("qu 5000")["input_ids"] == [tokenizer.unk_token_id] * 2


def test_every_reachable_number_is_a_token():
    tokenizer = build_tokenizer(DataSettings(values=(1, 4), operands=(2, 3), operators=("+", "-", "x")))
    for a in range(1, 5):
        for b in range(1, 5):
            for c in range(1, 5):
                for operators in ("--", "-x", "x-", "xx", "++", "x+"):
                    for step in Expression((a, b, c), tuple(operators)).reductions():
                        assert tokenizer.unk_token_id not in tokenizer(step.text())["input_ids"]


def test_too_many_numbers_are_refused():
    with pytest.raises(calm.CalmError, match="one token an integer"):
        build_tokenizer(DataSettings(values=(1, 25_000), operators=("+", "x")))


def test_chat_asks_for_the_last_expression_only(tokenizer):
    messages = [{"role": "user", "content": "ba + du ="}, {"role": "assistant", "content": "1 + 2"}]
    again = [*messages, {"role": "user", "content": " ki - ba"}]
    assert tokenizer.apply_chat_template(again, add_generation_prompt=True, tokenize=False) == "ki - ba ="
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "ba + du = 1 + 2<end>"


# -- training lines ----------------------------------------------------------------------------------------------------


def learned(line):
    return [word for word, counts in zip(line.words, line.learned, strict=True) if counts]


def keys_in(line, task):
    """All keys of a line, read back from its words."""
    names, current = [], []
    for word in [*line.words, "+"]:
        if word.isalpha() and word != "x":
            current.append(word)
        elif current:
            names.append("-".join(current))
            current = []
    return names


def test_glossary_learns_the_values_only(task):
    line = glossary_line(task, random.Random(0), 8)
    assert learned(line) == [str(task.values[key]) for key in keys_in(line, task)]
    assert len(learned(line)) == 8


def test_substitution_learns_answer_and_end(task):
    rng = random.Random(0)
    lengths = set()
    for _ in range(200):
        line = substitution_line(task, rng, task.held_out_keys[:10])
        prompt, answer = " ".join(line.words).split(" = ")
        assert " ".join(learned(line)) == answer
        assert answer.endswith("<end>") and len(answer.split()) <= len(prompt.split()) + 1
        assert set(keys_in(line, task)) <= set(task.held_out_keys[:10])
        lengths.add(len(answer.split()) // 2)
    assert lengths == {1, 2, 3}


def test_unknown_values_are_not_learned(task):
    rng = random.Random(0)
    for _ in range(200):
        line = arithmetic_line(task, rng, with_unknowns=1.0)
        if not keys_in(line, task):
            continue
        asked, restated = " ".join(line.words).split(" = ")[:2]
        operands = asked.replace(" - ", " + ").split(" + ")
        start = line.words.index("=") + 1
        for index, operand in enumerate(operands):
            known = operand.isdigit()
            assert line.learned[start + 2 * index] == known
            assert not known or line.words[start + 2 * index] == operand
        assert all(line.learned[start + 2 * len(operands) - 1 :])
        assert eval(restated) == int(line.words[-2])


def test_composition_sees_no_held_out_key(task):
    rng = random.Random(0)
    lines = [composition_line(task, rng, numeric=0.25) for _ in range(400)]
    seen = {key for line in lines for key in keys_in(line, task)}
    assert seen and seen <= set(task.composition_keys)
    numeric = sum(not keys_in(line, task) for line in lines) / len(lines)
    assert 0.15 < numeric < 0.35


def test_long_expressions_are_learned_more_often(task):
    rng = random.Random(0)
    asked = [" ".join(arithmetic_line(task, rng, 0.0).words).split(" = ")[0] for _ in range(1000)]
    counts = [len(text.split()) // 2 + 1 for text in asked]
    assert set(counts) == {2, 3} and 0.75 < counts.count(3) / len(counts) < 0.85


def test_encode_pads_and_masks(tokenizer):
    lines = [Line().add(["ba", "="], False).add(["3", "<end>"], True), Line().add(["4"], True)]
    batch = encode(lines, tokenizer.get_vocab())
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 4)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][1]) == ["4", "<pad>", "<pad>", "<pad>"]
    assert batch["labels"][0, :2].tolist() == [IGNORED, IGNORED] and batch["labels"][1, 1:].eq(IGNORED).all()


def test_a_step_is_drawn_from_seed_and_step_alone(task, tokenizer):
    def draw(rng, step):
        return [composition_line(task, rng, 0.25) for _ in range(4)]

    one = Batches(draw, tokenizer.get_vocab(), 5, "D_C 0")
    two = Batches(draw, tokenizer.get_vocab(), 5, "D_C 0")
    [one[i] for i in range(3)]
    assert torch.equal(one[3]["input_ids"], two[3]["input_ids"])
    other = Batches(draw, tokenizer.get_vocab(), 5, "D_C 1")[3]["input_ids"]
    assert other.shape != two[3]["input_ids"].shape or not torch.equal(other, two[3]["input_ids"])


# -- digits ------------------------------------------------------------------------------------------------------------

DIGITS = DataSettings(values=(1, 300), operands=(2, 4), operators=("+", "-", "x"), numbers="digits", answer="direct")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_digits_are_encoded_as_the_tokenizer_reads_them(seed):
    rng, task, tokenizer = random.Random(seed), Task.draw(DIGITS, 0), build_tokenizer(DIGITS)
    for line in (composition_line(task, rng, 0.5), substitution_line(task, rng, list(task.values))):
        ids = encode([line], tokenizer.get_vocab())["input_ids"][0].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer(text)["input_ids"] == ids[:-1]  # all but the end
        # the same words: a hyphen between letters joins the syllables of a key
        assert re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text).split() == line.words[:-1]


def test_digits_of_a_learned_number_are_all_learned():
    tokenizer = build_tokenizer(DIGITS)
    batch = encode([Line().add(["12", "="], False).add(["-305", "<end>"], True)], tokenizer.get_vocab())
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["1", "2", "=", "~", "3", "0", "5", "<end>"]
    assert (batch["labels"][0] != IGNORED).tolist() == [False] * 3 + [True] * 5


def test_the_papers_data_can_be_drawn_and_asked():
    data = recipe.PRESETS["paper"].data
    task, tokenizer = Task.draw(data, 0), build_tokenizer(data)
    assert sorted(task.values.values()) == list(range(1, 25_001)) and len(task.composition_keys) == 5_000
    lines = [composition_line(task, random.Random(i), 0.35) for i in range(200)]
    batch = encode(lines, tokenizer.get_vocab())["input_ids"]
    assert tokenizer.unk_token_id not in batch and batch.shape[1] <= bases.CONTEXT
