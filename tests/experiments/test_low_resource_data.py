"""Messages of a language: cleaned, split without leaks, and the same again under a seed; from catalogues made here."""

from __future__ import annotations

import random
import shutil

import polib
import pytest
from packages import write_books, write_catalogue

from calm.data import load_tokenizer
from calm.errors import CalmError
from calm.experiments import debian, english
from calm.experiments.low_resource import catalogues
from calm.experiments.low_resource.catalogues import Pair
from calm.experiments.low_resource.data import DataSettings, describe, leaks, load
from calm.experiments.low_resource.duplicates import clusters
from calm.experiments.methods.examples import Example

SETTINGS = DataSettings(composition_share=0.1, development=10, test=40)


def pair_of(example: Example) -> Pair:
    """The pair that an example was made of."""
    translation = example.prompt.partition(": ")[2].removesuffix("\nEnglish:")
    return Pair(example.completion.removeprefix(" "), translation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Unpacked packages, as a user would put them there by hand: Xhosa messages and the three books."""
    folder = tmp_path_factory.mktemp("packages")
    write_catalogue(folder)
    return write_books(folder)


def test_messages_are_cleaned_and_what_cannot_be_learned_from_is_left_out_and_counted(folder):
    pairs, counts = catalogues.read("xh", 15, folder)
    texts = {pair.english: pair.translation for pair in pairs}
    assert texts["Undo the ruler"] == "Umgca wokubuyisela"
    assert counts["package"] == "libreoffice-l10n-xh" and counts["version"] == "1:2.3"
    reasons = {reason: counts[reason] for reason in ("untranslated", "copied", "markup", "wordless", "long")}
    assert reasons == {"untranslated": 0, "copied": 1, "markup": 1, "wordless": 1, "long": 1}
    assert counts["repeated"] == 1  # "Sum the Cells!"
    assert counts["messages"] == counts["pairs"] + sum(reasons.values()) + counts["repeated"]


def test_other_packages_add_their_messages_of_the_language_after_libreoffices(folder):
    catalogue = polib.POFile()
    for english_text, translation in (
        ("_Open the door", "_Vula ucango"),
        ("E&xit the house", "&Phuma endlwini"),
        ("Sum the cells", "Enye"),  # LibreOffice has it
    ):
        catalogue.append(polib.POEntry(msgid=english_text, msgstr=translation))
    for language in ("xh", "cy"):
        place = folder / f"doors-l10n/usr/share/locale/{language}/LC_MESSAGES"
        place.mkdir(parents=True)
        catalogue.save_as_mofile(str(place / "doors.mo"))
        catalogue[0].msgstr = "_Agor y drws"
    (folder / "doors-l10n/VERSION").write_text("4.5")
    alone, before = catalogues.read("xh", 15, folder)
    pairs, counts = catalogues.read("xh", 15, folder, ("doors-l10n",))
    assert pairs == [*alone, Pair("Exit the house", "Phuma endlwini"), Pair("Open the door", "Vula ucango")]
    assert counts["packages"] == {"doors-l10n": "4.5"} and counts["repeated"] == before["repeated"] + 1
    assert before["packages"] == {}


def test_no_test_or_development_message_has_a_near_duplicate_in_what_is_trained_on(folder):
    data = load("xh", SETTINGS, 0, folder)
    trained = [pair_of(example) for example in (*data.specialist, *data.composition)]
    held_out = [pair_of(example) for example in (*data.tests["xh"].examples, *data.developed)]
    assert len(held_out) == 50
    assert leaks(held_out, trained) == []
    assert any("Error" in pair.english for pair in trained)  # templates are trained on, all of them or none


def test_the_leak_check_finds_the_leaks_of_a_random_split(folder):
    pairs, _ = catalogues.read("xh", 15, folder)
    drawn = random.Random(0).sample(pairs, len(pairs))
    found = leaks(drawn[:40], drawn[40:])
    assert found
    assert describe("xh", SETTINGS, 0, folder)["random_split_leaks"] > 0
    assert leaks([Pair("Quite different", "xyz")], [Pair("Something else", "xyz")])  # the same translation


def test_composition_data_is_seen_by_m_a_or_held_out_from_it_and_is_the_same_either_way(folder):
    seen = load("xh", SETTINGS, 0, folder)
    held_out = load(
        "xh", DataSettings(composition_share=0.1, development=10, test=40, composition_held_out=True), 0, folder
    )
    assert seen.composition == held_out.composition
    assert seen.tests["xh"].examples == held_out.tests["xh"].examples
    assert set(seen.composition) <= set(seen.specialist)
    assert not set(held_out.composition) & set(held_out.specialist)


def test_no_two_of_the_five_examples_before_a_prompt_are_alike(folder):
    for seed in range(5):
        data = load("xh", SETTINGS, seed, folder)
        shown = data.tests["xh"].few_shot
        assert set(shown) <= set(data.composition)
        assert len(clusters([pair_of(example) for example in shown])) == 5


def test_the_same_seed_gives_the_same_data_and_another_one_other_data(folder):
    first, again, other = (load("xh", SETTINGS, seed, folder) for seed in (0, 0, 1))
    assert (first.specialist, first.tests["xh"].examples) == (again.specialist, again.tests["xh"].examples)
    assert set(first.tests["xh"].examples) != set(other.tests["xh"].examples)
    assert not set(first.general) & set(first.preserved["English"])
    words = first.preserved_tests["English last word"].examples
    assert words and all(any(text.startswith(e.prompt) for text in first.preserved["English"]) for e in words)
    assert not any(text.startswith(e.prompt) for e in words for text in first.general)
    assert len(first.preserved_tests["Python last word"].examples) == 120


def test_near_duplicates_are_numbers_word_order_and_small_changes(folder):
    pairs = [
        Pair("Row 12 is too long", "a"),
        Pair("Row 3 is too long!", "b"),
        Pair("too long is Row 7", "c"),
        Pair("Delete the drawing", "d"),
    ]
    assert clusters(pairs) == [[0, 1, 2], [3]]


def test_near_duplicates_in_translation_are_near_duplicates(folder):
    quesnel, pease = Pair("Quesnel", "Maes Awyr Quesnel"), Pair("Pease", "Maes Awyr Pease")
    assert clusters([quesnel, Pair("Quite different", "Rhywbeth arall"), pease]) == [[0, 2], [1]]
    assert leaks([quesnel], [pease]) == [(quesnel, pease)]


def test_what_is_measured_on_is_of_another_book_than_what_is_trained_on(folder):
    prose = english.load(0, folder, preserved=20)
    assert len(set(prose.preserved)) == 20 and len(prose.general) == 600
    assert not any(text.startswith("code") for text in prose.general), "code blocks are no prose"
    assert all(text.startswith("Say ") and text.endswith(".") and "{" not in text for text in prose.preserved)
    assert english.load(0, folder, preserved=20) == prose != english.load(1, folder, preserved=20)
    with pytest.raises(CalmError, match="600 paragraphs of English prose to train on and 300 to measure on: expected"):
        english.load(0, folder, preserved=301)


def test_too_few_messages_and_packages_that_are_not_there_are_explained(folder, tmp_path, monkeypatch):
    with pytest.raises(CalmError, match="too few for 600 test messages"):
        load("xh", DataSettings(test=600), 0, folder)
    with pytest.raises(CalmError, match="cannot be the name of a Debian package"):
        debian.package("../etc", folder)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(CalmError, match=r"apt-get was not found.*put libreoffice-l10n-zz_VERSION_all\.deb into"):
        load("zz", SETTINGS, 0, tmp_path)


@pytest.mark.real
def test_smollm2_splits_prompts_and_completions_where_they_are_split(folder):
    from calm.experiments.checkpoints import SMOLLM2_135M

    tokenizer = load_tokenizer(SMOLLM2_135M.folder())
    for example in load("xh", SETTINGS, 0, folder).composition:
        apart = tokenizer(example.prompt)["input_ids"] + tokenizer(example.completion)["input_ids"]
        assert tokenizer(example.prompt + example.completion)["input_ids"] == apart
