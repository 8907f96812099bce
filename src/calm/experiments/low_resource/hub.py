"""The same data from a hub, for the `paper` preset: OPUS-100 to train on, FLORES+ to test, FineWeb-Edu as English."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from calm.errors import CalmError
from calm.experiments import preservation
from calm.experiments.hub import first_texts, rows
from calm.experiments.low_resource.catalogues import Pair
from calm.experiments.low_resource.data import example, leaks, title
from calm.experiments.methods.examples import Data, TaskSet
from calm.experiments.methods.metrics import Bleu, Chrf

FLORES = {
    "cy": "cym_Latn",
    "ga": "gle_Latn",
    "gd": "gla_Latn",
    "oc": "oci_Latn",
    "rw": "kin_Latn",
    "xh": "xho_Latn",
}
"""What FLORES+ calls them."""


@dataclass(frozen=True)
class HubSettings:
    """Data sets, by hub name or by a folder that `datasets.load_dataset` takes likewise.

    Attributes:
        parallel: with a `translation` column, in configurations such as "cy-en".
        test: with a `text` column and `dev` and `devtest` splits, in configurations such as "cym_Latn".
        english: with a `text` column, in whose first texts perplexity and last words are measured.
        english_config: its configuration.
        composition_share: D_C's size, in parts of `m_A`'s data (about 5% in the paper).
        development: sentences for choosing learning rates.
        max_new_tokens: how long an answer may be.
    """

    parallel: str = "Helsinki-NLP/opus-100"
    test: str = "openlanguagedata/flores_plus"
    english: str = "HuggingFaceFW/fineweb-edu"
    english_config: str | None = "sample-10BT"
    composition_share: float = 0.05
    development: int = 500
    max_new_tokens: int = 128


def load(language: str, settings: HubSettings, seed: int) -> Data:
    """One language's data, without training messages that are near a test sentence.

    Args:
        language: two letters, as in `FLORES`.
        settings: data sets and sizes.
        seed: of the choice of D_C, which is part of `m_A`'s data as in the paper.

    Raises:
        CalmError: a data set cannot be had, or has no such language.
    """
    if language not in FLORES:
        raise CalmError(f"language={language!r}: FLORES+ is asked for one of {', '.join(FLORES)}.")
    pair = "-".join(sorted((language, "en")))
    parallel = [
        Pair(row["translation"]["en"].strip(), row["translation"][language].strip())
        for row in rows(settings.parallel, pair, "train")
    ]
    development = _flores(settings.test, FLORES[language], "dev")[: settings.development]
    test = _flores(settings.test, FLORES[language], "devtest")
    parallel = [one for one in dict.fromkeys(parallel) if all(one)]
    leaking = {one for one, _ in leaks(parallel, [*development, *test])}
    trained = [one for one in parallel if one not in leaking]
    random.Random(seed).shuffle(trained)
    composition = trained[: round(settings.composition_share * len(trained))]
    tests = TaskSet(
        title=f"{title(language)} to English",
        examples=tuple(example(one, language) for one in test),
        metric=Chrf(),
        max_new_tokens=settings.max_new_tokens,
        few_shot=tuple(example(one, language) for one in composition[:5]),
        others=(Bleu(),),
    )
    developed = tuple(example(one, language) for one in development)
    english = first_texts(settings.english, settings.english_config)
    return Data(
        general=(),  # the vanilla m_A is a model already
        specialist=tuple(example(one, language) for one in trained),
        composition=tuple(example(one, language) for one in composition),
        development={language: dataclasses.replace(tests, examples=developed)},
        tests={language: tests},
        preserved={"English": english},
        preserved_tests={
            preservation.ENGLISH: preservation.english_words(english),
            preservation.PYTHON: preservation.python_words(),
        },
    )


def _flores(name: str, config: str, split: str) -> list[Pair]:
    sides = (rows(name, which, split) for which in ("eng_Latn", config))
    return [Pair(one["text"].strip(), two["text"].strip()) for one, two in zip(*sides, strict=True)]
