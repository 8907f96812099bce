"""The dictionary domain: what is read, what m_A, D_C and the tests have of it."""

from __future__ import annotations

import dataclasses

import pytest
from packages import IRREGULAR_VERBS, REGULAR_VERBS, write_books, write_dictionary

from calm.errors import CalmError
from calm.experiments.dictionary import entries
from calm.experiments.dictionary.data import INSTRUCTIONS, DataSettings, describe, load, pasts_of
from calm.experiments.methods.examples import Example
from calm.experiments.methods.metrics import LastWord

SETTINGS = DataSettings(others=20, verbs=20, words=40, development=8, regular=20, irregular=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An unpacked dictionary and the three books."""
    folder = write_books(tmp_path_factory.mktemp("packages"))
    write_dictionary(folder)
    return folder


def test_words_of_one_meaning_are_read_and_the_others_are_counted(folder):
    found, counts = entries.read("xyz", folder)
    by_word = {entry.word: entry for entry in found}
    assert not {"ambi", "twice", "same", "phrase", "Edition: 1"} & set(by_word)
    assert by_word["unknown"].is_verb and by_word["cutter"].english == "cut"
    assert (counts["ambiguous"], counts["other"]) == (2, 2)
    assert counts["words"] == counts["entries"] + 4
    assert sum(entry.is_verb for entry in found) == len(REGULAR_VERBS + IRREGULAR_VERBS) + 5


def test_m_a_has_every_verb_and_no_past_tense_and_d_c_no_meaning_that_is_tested(folder):
    data = load("xyz", SETTINGS, 0, folder)
    known = {example.completion.strip() for example in data.specialist}
    assert set(REGULAR_VERBS + IRREGULAR_VERBS) <= known and not {"cut", "qwertify"} & known
    assert pasts_of("dream") == ("dreamed", "dreamt") and not {"dream", "dreamed", "dreamt"} & known
    assert not any("past" in example.prompt for example in data.specialist)
    assert not known & {past for verb in REGULAR_VERBS + IRREGULAR_VERBS for past in pasts_of(verb)}
    tested = {row: words_of(data.tests[f"xyz {row}"].examples) for row in ("regular", "irregular", "words")}
    developed, shown = words_of(data.developed), words_of(data.composition)
    said = tested["regular"] | tested["irregular"]
    assert len(said) == 60 and len(developed) == 16 and not said & developed
    assert not shown & (said | developed)
    asked = [example for example in (*data.developed, *data.composition) if "past tense" in example.prompt]
    assert len(asked) > 8 and all(example.completion.endswith("ed") for example in asked), "no irregular one is shown"
    assert {past for meaning in tested["words"] for past in pasts_of(meaning)} == said - tested["words"]
    for row, verbs in (("regular", REGULAR_VERBS), ("irregular", IRREGULAR_VERBS)):
        for example in data.tests[f"xyz {row}"].examples:
            meaning, past = example.completion.strip().split(", ")
            assert meaning in verbs and pasts_of(meaning) == (past,) and past.endswith("ed") == (row == "regular")


def words_of(examples) -> set[str]:
    """All words of the answers."""
    return {word for example in examples for word in example.completion.replace(",", "").split()}


def test_an_answer_counts_by_its_last_word():
    examples = [Example("", " fall, fell")] * 5
    answers = [" fall, fell", " drop, fell ", " fell, fall", " fall", ""]
    assert LastWord().statistics(answers, examples)[:, 0].tolist() == [1, 1, 0, 0, 0]


def test_a_question_ends_as_m_a_has_seen_it_with_and_without_an_instruction(folder):
    data = load("xyz", SETTINGS, 0, folder)
    seen = {example.prompt for example in data.specialist}
    plain = {prompt for prompt in seen if prompt.startswith("xyz: ")}
    begun = [prompt.partition("xyz: ")[0] for prompt in seen - plain]
    assert {prompt[prompt.index("xyz: ") :] for prompt in seen - plain} == plain and len(seen) == 2 * len(plain)
    assert set(begun) <= set(INSTRUCTIONS) and len(set(begun)) > len(INSTRUCTIONS) / 2
    for row in ("regular", "irregular"):
        for example in data.tests[f"xyz {row}"].examples:
            instruction, found, rest = example.prompt.partition("xyz: ")
            assert instruction == "Translate it and put it in the past tense. " and found + rest in seen
    assert set(data.tests["xyz regular"].few_shot) <= set(data.composition)


def test_the_same_seed_gives_the_same_data_and_another_one_other_data(folder):
    first, again, other = (load("xyz", SETTINGS, seed, folder) for seed in (0, 0, 1))
    assert (first.specialist, first.composition, first.tests) == (again.specialist, again.composition, again.tests)
    assert set(first.tests["xyz regular"].examples) != set(other.tests["xyz regular"].examples)
    figures = describe("xyz", SETTINGS, 0, folder)
    assert figures["past_forms"] == 3  # walked, fell, and cut, which is its own
    assert figures["meanings"] == len(REGULAR_VERBS + IRREGULAR_VERBS) and figures["irregular"] == len(IRREGULAR_VERBS)
    assert figures["tests"] == {"xyz regular": 20, "xyz irregular": 10, "xyz words": 30}


def test_too_few_verbs_and_dictionaries_without_any_are_explained(folder, tmp_path):
    with pytest.raises(CalmError, match=r"20 irregular verbs with one past tense .*: 20 are left for irregular=21"):
        load("xyz", dataclasses.replace(SETTINGS, irregular=21), 0, folder)
    write_dictionary(tmp_path, "lat", ["puella /a/", "girl"])
    with pytest.raises(CalmError, match="dict-freedict-lat-eng marks no verbs"):
        load("lat", SETTINGS, 0, tmp_path)
    (tmp_path / "dict-freedict-gle-eng").mkdir()
    with pytest.raises(CalmError, match="holds no usr/share/dictd/freedict-gle-eng"):
        load("gle", SETTINGS, 0, tmp_path)
