"""The tasks that show what is left of an anchor's abilities: what is asked for, and what counts as right."""

from __future__ import annotations

import pytest

from calm.data import load_tokenizer
from calm.errors import CalmError
from calm.experiments.code.functions import Function
from calm.experiments.methods.examples import Example
from calm.experiments.methods.metrics import FirstWord
from calm.experiments.preservation import english_words, python_words

START = "Packages are kept on a server, from which every machine takes what it needs"


def test_the_last_word_of_a_sentence_is_asked_for_after_all_that_comes_before_it():
    task = english_words([f"{START} to be installed. It is called a mirror. See 4.2.", "Too short for that."])
    assert task.examples == (Example(f"{START} to be installed. It is called a", " mirror"),)
    assert task.few_shot == ()  # m_B gets what every other method gets


@pytest.mark.parametrize("end", ["it.", "version 4.2.", "the file /etc/passwd.", "the user's.", "yesterday", "e.g. 5."])
def test_a_sentence_that_ends_with_anything_but_a_word_of_letters_is_not_asked_for(end):
    assert len(english_words([f"{START}, {end}", f"{START} today."]).examples) == 1


def test_a_word_is_asked_for_after_some_text_and_not_after_too_much():
    assert english_words([f"{START} today. {'More and more of it ' * 30}tomorrow."]).examples[0].completion == " today"
    assert english_words([f"Heading\n{START} today.\nNothing more today."]).examples[0].prompt == START
    with pytest.raises(CalmError, match="none of the 1 English texts has a sentence"):
        english_words(["Too short for that."])


def test_the_last_word_of_a_line_is_asked_for_after_the_function_so_far():
    body = '    if isinstance(value, dict) or value is None:\n        return "a string"\n    return value.copy() # done'
    function = Function("f.py", "def first(value):\n    value = other\n", body, "Take the first.")
    task = python_words((function,))
    assert task.examples == (
        Example("def first(value):\n    value = other\n    if isinstance(value, dict) or value is", " None:"),
    )
    many = tuple(function._replace(file=f"{number // 9}.py") for number in range(18))
    assert len(python_words(many).examples) == 6  # three of each file
    with pytest.raises(CalmError, match="needs the sources of Python's standard library"):
        python_words((function._replace(body="pass"),))


def test_the_standard_library_has_enough_lines_and_no_two_alike():
    examples = python_words().examples
    assert len(examples) == 120
    assert len(set(examples)) > 115


def test_the_first_word_counts_and_english_punctuation_does_not():
    reference = [Example("", " mirror")]
    for answer, of_english, of_code in (
        (" mirror", 1, 1),
        ("mirror. It", 1, 0),
        (" mirrors", 0, 0),
        (" the mirror", 0, 0),
        (" Mirror", 0, 0),
        (" ", 0, 0),
    ):
        assert FirstWord(ignored=".,").statistics([answer], reference).tolist() == [[of_english]]
        assert FirstWord().statistics([answer], reference).tolist() == [[of_code]]


@pytest.mark.real
def test_smollm2_splits_before_what_is_asked_for():
    from calm.experiments.checkpoints import SMOLLM2_135M

    tokenizer = load_tokenizer(str(SMOLLM2_135M.folder()))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    examples = [*python_words().examples, *english_words([f"{START} today."]).examples]
    for prompt, word in examples:
        assert ids(prompt) + ids(word) == ids(prompt + word)
    assert any(ids(f"{prompt} ") + ids(word[1:]) != ids(prompt + word) for prompt, word in examples)
