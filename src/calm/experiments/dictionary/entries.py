"""Words with their English translations, from FreeDict's dictionaries in Debian (GPL and free content licences)."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any, NamedTuple

from calm.errors import CalmError
from calm.experiments import debian

_HEAD = re.compile(r"(?P<word>\S.*?) /[^/]+/(?: <(?P<grammar>[^>]*)>)?")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019 -][^\W\d_]+)*")
_ENGLISH = re.compile(r"[a-z]+")


class Entry(NamedTuple):
    """One word.

    Attributes:
        word: in the language.
        english: its only translation, one word in lower case.
        is_verb: what the dictionary says.
    """

    word: str
    english: str
    is_verb: bool


def read(language: str, folder: Path) -> tuple[list[Entry], dict[str, Any]]:
    """The words that have exactly one translation, which is one word and not the word itself.

    Args:
        language: the code in the name of Debian's `dict-freedict-CODE-eng`, such as "cym". The dictionary has to mark
            verbs (`<v>`), as the Welsh and the Icelandic one do.
        folder: where Debian packages are kept, as for `debian.package`.

    Returns:
        The entries in the order of the dictionary, and what they come from: `package`, `version`, how many `words` it
        has, `ambiguous` ones, `other` ones (no plain word on one side, or the same on both), and `entries`.

    Raises:
        CalmError: If there is no such package, or no verb in it.
    """
    package = debian.package(f"dict-freedict-{language}-eng", folder)
    path = package.root / f"usr/share/dictd/freedict-{language}-eng.dict.dz"
    if not path.exists():
        raise CalmError(f"{package.name} in {str(package.root)!r} holds no {path.relative_to(package.root)}")
    translations: dict[str, dict[str, None]] = {}  # ordered sets
    verbs: dict[str, bool] = {}
    word = None
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            head = _HEAD.fullmatch(line.rstrip("\n"))
            if head:
                word = head["word"]
                translations.setdefault(word, {})
                verbs[word] = verbs.get(word, True) and (head["grammar"] or "").split(",")[0] == "v"
            elif word and line.strip() and not line[0].isspace():
                translations[word][re.sub(r"^\d+\. ", "", line.strip())] = None
    entries, ambiguous, other = [], 0, 0
    for word, found in translations.items():
        english = next(iter(found), "")
        if len(found) > 1:
            ambiguous += 1
        elif not _WORD.fullmatch(word) or not _ENGLISH.fullmatch(english) or word.casefold() == english:
            other += 1
        else:
            entries.append(Entry(word, english, verbs[word]))
    if not any(entry.is_verb for entry in entries):
        raise CalmError(f"{package.name} marks no verbs: take a dictionary that does, such as cym or isl")
    return entries, {
        "package": package.name,
        "version": package.version,
        "words": len(translations),
        "ambiguous": ambiguous,
        "other": other,
        "entries": len(entries),
    }
