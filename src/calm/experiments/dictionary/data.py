"""Verbs of a language in the English past tense: m_A knows what they mean, the anchor how English inflects it."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lemminflect

from calm.errors import CalmError
from calm.experiments import english, preservation
from calm.experiments.dictionary import entries
from calm.experiments.dictionary.entries import Entry
from calm.experiments.methods.examples import Data, Example, Metric, TaskSet
from calm.experiments.methods.metrics import FirstWord, LastWord

NAMES = {"cym": "Welsh", "isl": "Icelandic"}
"""English names of the languages that this is made for. Another one goes by its code."""

INSTRUCTIONS = (
    "Translate it. ",
    "What does it mean? ",
    "Say it in English. ",
    "Look it up and give its meaning. ",
    "Which English word is it?\n",
    "Find the word that has the same meaning. ",
    "Here is one more word for you to explain.\n",
    "Answer in English, please, and with one word. ",
)
"""m_A learns every word twice, once behind one of these, so that it knows the word wherever it meets it. One that has
met words at the beginning of a text alone knows 61 of 100 behind an instruction (docs/dev/LOG.md, "the past tense of a
word that is said first")."""

ENDING = {"regular": "in -ed", "irregular": "otherwise"}
"""How a row's pasts end. A few verbs that grammars call irregular (feed, fed) are "regular" here."""

_NEW_TOKENS = 12


@dataclass(frozen=True)
class DataSettings:
    """What is made of a dictionary.

    Args:
        others: words that are no verbs, in m_A's data.
        verbs: in D_C, put into the past.
        words: in D_C, translated as in m_A's data, none of them with the meaning of a held-out verb.
        development: verbs for choosing learning rates.
        regular: verbs that are tested and whose past ends in -ed, as that of all verbs in D_C and development does.
            Verbs with several past tenses are in no part.
        irregular: the other verbs that are tested.
    """

    others: int = 600
    verbs: int = 400
    words: int = 1000
    development: int = 100
    regular: int = 400
    irregular: int = 70


def load(language: str, settings: DataSettings, seed: int, folder: str | os.PathLike[str]) -> Data:
    """m_A's dictionary, and the past tense of some verbs of it, split by their English meanings.

    m_A is trained on the dictionary alone, D_C asks for the meaning and the past of a few of its verbs, and the tests
    for those of others, whose past counts: `LANGUAGE regular`, `LANGUAGE irregular`. `LANGUAGE words` asks for their
    meanings, as m_A's data do.

    Args:
        language: as for `entries.read`.
        settings: sizes.
        seed: of the split.
        folder: where Debian packages are kept. They are fetched when first asked for.

    Raises:
        CalmError: If a package cannot be had, or if the dictionary has too few verbs for the settings.
    """
    return _prepare(language, settings, seed, Path(folder))[0]


def describe(language: str, settings: DataSettings, seed: int, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `load` gives with the same arguments, in figures, as plain JSON.

    Returns:
        `language`; what `entries.read` counts; `past_forms`, words left out as some verb's past; `meanings`, of verbs,
        and how many of them are `irregular`; the sizes `specialist`, `composition`, `development`, and of the `tests`
        and `preserved_tests`; `english`, where the prose is from.
    """
    return _prepare(language, settings, seed, Path(folder))[1]


def title(language: str) -> str:
    """What people call the language."""
    return NAMES.get(language, language)


def pasts_of(verb: str) -> tuple[str, ...]:
    """The past tenses that lemminflect's dictionary has of an English verb; none if it does not know the verb."""
    return tuple(map(str, lemminflect.getInflection(verb, "VBD", inflect_oov=False)))


def translation(entry: Entry, language: str, instruction: str = "") -> Example:
    """A word and its meaning. The prompt ends without a space and the completion begins with one (BPE splits there)."""
    return Example(f"{instruction}{title(language)}: {entry.word}\nEnglish:", f" {entry.english}")


def past_tense(entry: Entry, language: str) -> Example:
    """The same with an instruction before it that m_A has not seen; the answer says the meaning and then its past."""
    (past,) = pasts_of(entry.english)
    asked, meaning = translation(entry, language, "Translate it and put it in the past tense. ")
    return Example(asked, f"{meaning}, {past}")


def _prepare(language: str, settings: DataSettings, seed: int, folder: Path) -> tuple[Data, dict[str, Any]]:
    read, summary = entries.read(language, folder)
    # "covered" may be the meaning of an adjective, and "found" that of a verb: a question's answer, and a leak
    pasts = {past for entry in read if entry.is_verb for past in pasts_of(entry.english)}
    found = [entry for entry in read if entry.english not in pasts]
    rng = random.Random(seed)
    by_meaning: dict[str, list[Entry]] = defaultdict(list)
    for entry in found:
        if entry.is_verb and len(pasts_of(entry.english)) == 1:  # of "dreamed" and "dreamt" neither would be wrong
            by_meaning[entry.english].append(entry)
    verbs = [rng.choice(by_meaning[meaning]) for meaning in sorted(by_meaning)]
    rng.shuffle(verbs)
    regular = [verb for verb in verbs if pasts_of(verb.english)[0].endswith("ed")]
    irregular = [verb for verb in verbs if verb not in regular]
    test = {"regular": regular[: settings.regular], "irregular": irregular[: settings.irregular]}
    rest = regular[settings.regular :]  # D_C shows nobody that a past may end otherwise: that has to be the anchor's
    development, shown = rest[: settings.development], rest[settings.development :][: settings.verbs]
    others = [entry for entry in found if not entry.is_verb]
    rng.shuffle(others)
    dictionary = [*verbs, *others[: settings.others]]
    rng.shuffle(dictionary)
    held_out = {verb.english for part in (*test.values(), development) for verb in part}
    translated = [entry for entry in dictionary if entry.english not in held_out][: settings.words]
    sizes = {
        "regular": (len(test["regular"]), settings.regular),
        "irregular": (len(test["irregular"]), settings.irregular),
        "development": (len(development), settings.development),
        "verbs": (len(shown), settings.verbs),
        "words": (len(translated), settings.words),
    }
    for name, (has, wanted) in sizes.items():
        if has < wanted:
            raise CalmError(
                f"{summary['package']} has {len(regular)} regular and {len(irregular)} irregular verbs with one "
                f"past tense that lemminflect knows: {has} are left for {name}={wanted}; ask for fewer, or take "
                "another language"
            )

    composition = [past_tense(verb, language) for verb in shown]
    few_shot = tuple(composition[:5])
    composition += [translation(entry, language) for entry in translated]
    rng.shuffle(composition)
    tests = {
        f"{language} {kind}": _asked(
            f"{title(language)} verbs, their past {ENDING[kind]}",
            [past_tense(verb, language) for verb in part],
            few_shot,
            LastWord(),
        )
        for kind, part in test.items()
    }
    developed = dataclasses.replace(
        tests[f"{language} regular"], examples=tuple(past_tense(verb, language) for verb in development)
    )
    tests[f"{language} words"] = _asked(
        f"the meaning of the same {title(language)} verbs",
        [translation(verb, language) for part in test.values() for verb in part],
        tuple(translation(entry, language) for entry in translated[:5]),
        FirstWord(),
    )
    instructed = [translation(entry, language, rng.choice(INSTRUCTIONS)) for entry in dictionary]
    prose = english.load(seed, folder)
    data = Data(
        general=prose.general,
        specialist=(*(translation(entry, language) for entry in dictionary), *instructed),
        composition=tuple(composition),
        development={f"{language} regular": developed},
        tests=tests,
        preserved={"English": prose.preserved},
        preserved_tests={
            preservation.ENGLISH: preservation.english_words(prose.preserved),
            preservation.PYTHON: preservation.python_words(),
        },
    )
    return data, {
        "language": title(language),
        **summary,
        "past_forms": len(read) - len(found),
        "meanings": len(verbs),
        "irregular": len(irregular),
        **{name: len(part) for name, part in data.parts().items()},
        "tests": {row: len(task.examples) for row, task in tests.items()},
        "preserved_tests": {row: len(task.examples) for row, task in data.preserved_tests.items()},
        "english": prose.source,
    }


def _asked(what: str, examples: Sequence[Example], few_shot: tuple[Example, ...], metric: Metric) -> TaskSet:
    return TaskSet(what, tuple(examples), metric, _NEW_TOKENS, few_shot)
