"""XX -> English from real messages, split so that nothing like a test message is trained on (paper section 4.2)."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.errors import CalmError
from calm.experiments import english, preservation
from calm.experiments.low_resource import catalogues
from calm.experiments.low_resource.catalogues import Pair
from calm.experiments.low_resource.duplicates import SIMILAR, clusters, similar
from calm.experiments.methods.examples import Data, Example, TaskSet
from calm.experiments.methods.metrics import Bleu, Chrf

NAMES = {
    "br": "Breton",
    "cy": "Welsh",
    "fr": "French",
    "ga": "Irish",
    "gd": "Scottish Gaelic",
    "nr": "Southern Ndebele",
    "nso": "Northern Sotho",
    "oc": "Occitan",
    "om": "Oromo",
    "rw": "Kinyarwanda",
    "ss": "Swati",
    "st": "Southern Sotho",
    "tn": "Tswana",
    "ts": "Tsonga",
    "ve": "Venda",
    "xh": "Xhosa",
}
"""English names of the languages that this is made for, and French, of which an anchor knows something. Another one
goes by its code."""

_LARGEST = 10
"""Messages in a larger cluster, which a template made, are trained on only."""


@dataclass(frozen=True)
class DataSettings:
    """What is made of a language's messages.

    Args:
        packages: Debian packages whose catalogues are read besides LibreOffice's, such as `catalogues.DESKTOP`.
        max_words: of the English text; the translation may have half as many more.
        composition_share: D_C's size, in parts of all that m_A may be trained on. The paper's is about 5%.
        composition_held_out: keep D_C out of m_A's data. In the paper m_A has seen it.
        development: messages for choosing learning rates.
        test: messages that are evaluated. These two have at least two words, one message from each cluster.
        max_new_tokens: how long an answer may be.
    """

    packages: tuple[str, ...] = ()
    max_words: int = 15
    composition_share: float = 0.05
    composition_held_out: bool = False
    development: int = 100
    test: int = 500
    max_new_tokens: int = 48


def load(language: str, settings: DataSettings, seed: int, folder: str | os.PathLike[str]) -> Data:
    """The data of one language, with English prose for the vanilla m_A, and what shows whether the anchor is preserved.

    Args:
        language: the code in the name of Debian's `libreoffice-l10n-CODE`, which is the name of the row, too.
        settings: sizes.
        seed: of the split.
        folder: where Debian packages are kept. They are fetched when first asked for.

    Returns:
        The same D_C, development and test messages whether D_C is held out of `specialist` or not.

    Raises:
        CalmError: If a package cannot be had, or if it has too few messages for the settings.
    """
    return _prepare(language, settings, seed, Path(folder))[0]


def describe(language: str, settings: DataSettings, seed: int, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `load` gives with the same arguments, in figures, as plain JSON.

    Returns:
        `language`; `package`, `version`, `packages`, and how many `messages` were left out for each reason, as
        `catalogues.read` counts them; `clusters` and the `largest_cluster`; the threshold `similar`, in percent;
        the sizes `specialist`, `composition`, `development`, `test`; `unused`, the others of the clusters that are
        tested; `random_split_leaks`, how many of as many test messages would have had a near-duplicate in the rest, in
        English or in translation, if messages had been drawn at random; `english`, where the prose is from; and how
        many examples each of the `preserved_tests` has.
    """
    return _prepare(language, settings, seed, Path(folder))[1]


def title(language: str) -> str:
    """What people call the language."""
    return NAMES.get(language, language)


def leaks(held_out: Sequence[Pair], trained: Sequence[Pair]) -> list[tuple[Pair, Pair]]:
    """Each held-out pair with a near-duplicate, in English or in translation, among the trained ones, with one such."""
    found: dict[int, int] = {}
    for index, other in similar([pair.english for pair in held_out], [pair.english for pair in trained]):
        found.setdefault(index, other)
    for index, other in similar([pair.translation for pair in held_out], [pair.translation for pair in trained]):
        found.setdefault(index, other)
    return [(held_out[index], trained[other]) for index, other in sorted(found.items())]


def example(pair: Pair, language: str) -> Example:
    """The prompt ends without a space and the completion begins with one, so that BPE splits them there."""
    return Example(f"{title(language)}: {pair.translation}\nEnglish:", f" {pair.english}")


@functools.lru_cache(maxsize=1)  # `load` and `describe` ask one after the other, and clusters take a minute
def _prepare(language: str, settings: DataSettings, seed: int, folder: Path) -> tuple[Data, dict[str, Any]]:
    pairs, summary = catalogues.read(language, settings.max_words, folder, settings.packages)
    grouped = [[pairs[index] for index in cluster] for cluster in clusters(pairs)]
    random.Random(seed).shuffle(grouped)
    small = [cluster for cluster in grouped if len(cluster) <= _LARGEST]
    trained = [pair for cluster in grouped if len(cluster) > _LARGEST for pair in cluster]

    one_each: list[Pair] = []
    unused = 0
    wanted = settings.test + settings.development
    while len(one_each) < wanted and small:
        cluster = small.pop()
        fitting = [pair for pair in cluster if len(pair.english.split()) > 1]
        if fitting:
            one_each.append(fitting[0])
            unused += len(cluster) - 1
        else:
            trained += cluster
    share = round(settings.composition_share * (len(trained) + sum(map(len, small))))
    composition: list[Pair] = []
    few_shot: list[Pair] = []
    while len(composition) < share and small:
        cluster = small.pop()
        composition += cluster
        # Examples made by one template would show m_B the template, not the task.
        few_shot += [pair for pair in cluster if len(pair.english.split()) > 1][:1]
    trained += [pair for cluster in small for pair in cluster]
    if len(one_each) < wanted or len(composition) < share or len(few_shot) < 5 or not trained:
        raise CalmError(
            f"{summary['package']} has {len(pairs)} messages of up to {settings.max_words} words, too few for "
            f"{settings.test} test messages, {settings.development} for development, unlike any other, and a D_C of "
            f"{settings.composition_share:.0%} of the rest, five of them unlike one another: "
            "ask for fewer, or take another language"
        )

    specialist = trained if settings.composition_held_out else trained + composition
    random.Random(seed).shuffle(specialist)
    test, development = one_each[: settings.test], one_each[settings.test :]
    prose = english.load(seed, folder)
    made = {
        name: tuple(example(pair, language) for pair in part)
        for name, part in (
            ("specialist", specialist),
            ("composition", composition),
            ("development", development),
            ("test", test),
        )
    }
    tests = TaskSet(
        title=f"{title(language)} to English",
        examples=made["test"],
        metric=Chrf(),
        max_new_tokens=settings.max_new_tokens,
        few_shot=tuple(example(pair, language) for pair in few_shot[:5]),
        others=(Bleu(),),
    )
    data = Data(
        general=prose.general,
        specialist=made["specialist"],
        composition=made["composition"],
        development={language: dataclasses.replace(tests, examples=made["development"])},
        tests={language: tests},
        preserved={"English": prose.preserved},
        preserved_tests={
            preservation.ENGLISH: preservation.english_words(prose.preserved),
            preservation.PYTHON: preservation.python_words(),
        },
    )
    drawn = random.Random(seed).sample(pairs, len(pairs))
    return data, {
        "language": title(language),
        **summary,
        "clusters": len(grouped),
        "largest_cluster": max(map(len, grouped)),
        "similar": SIMILAR,
        **{name: len(part) for name, part in made.items()},
        "unused": unused,
        "random_split_leaks": len(leaks(drawn[: settings.test], drawn[settings.test :])),
        "english": prose.source,
        "preserved_tests": {name: len(task.examples) for name, task in data.preserved_tests.items()},
    }
