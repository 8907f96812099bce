"""The dictionary domain: what is read, what m_A, D_C and the tests have of it."""

from __future__ import annotations

import dataclasses

import pytest
from packages import IRREGULAR_VERBS, REGULAR_VERBS, write_books, write_dictionary

from calm.errors import CalmError
from calm.experiments.dictionary import entries
from calm.experiments.dictionary.data import DataSettings, describe, load, pasts_of

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
    tested = {e.completion.strip() for row in ("regular", "irregular") for e in data.tests[f"xyz {row}"].examples}
    developed = {example.completion.strip() for example in data.development}
    shown = {example.completion.strip() for example in data.composition}
    assert len(tested) == 30 and len(developed) == 8 and not tested & developed
    assert not shown & (tested | developed)
    meanings = {example.completion.strip() for example in data.tests["xyz words"].examples}
    assert {past for meaning in meanings for past in pasts_of(meaning)} == tested and not shown & meanings
    assert {example.completion.strip() for example in data.tests["xyz irregular"].examples} <= {
        past for verb in IRREGULAR_VERBS for past in pasts_of(verb)
    }
    assert all(example.completion.endswith("ed") for example in data.tests["xyz regular"].examples)


def test_a_question_ends_as_m_a_has_seen_it(folder):
    data = load("xyz", SETTINGS, 0, folder)
    seen = {example.prompt for example in data.specialist}
    for row in ("regular", "irregular"):
        for example in data.tests[f"xyz {row}"].examples:
            instruction, found, rest = example.prompt.partition("xyz: ")
            assert instruction == "Put it in the past tense. " and found + rest in seen
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
