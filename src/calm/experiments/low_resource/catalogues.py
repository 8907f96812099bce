"""Real English messages with their translations, cleaned, from the message catalogues of programs in Debian."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polib

from calm.errors import CalmError
from calm.experiments import debian

PLACEHOLDER = re.compile(r"\$\(\w+\)|\$\w+\$|\$\w+|\$|%[A-Za-z]\w+%?|%\d+|%[a-z]\b|#\d+|\{\w*\}")
DESKTOP = (
    "aisleriot",
    "audacity-data",
    "cinnamon-l10n",
    "deja-dup",
    "epiphany-browser-data",
    "evolution-common",
    "evolution-data-server-common",
    "gedit-common",
    "gnome-applets-data",
    "gnome-control-center-data",
    "gnome-panel-data",
    "gnome-session-common",
    "kdiff3",
    "kgeography-data",
    "krita-l10n",
    "kstars-data",
    "libapt-pkg6.0",
    "libglib2.0-data",
    "libgtk-3-common",
    "libgtk2.0-common",
    "libgweather-4-common",
    "libkf5kdelibs4support-data",
    "nautilus-data",
    "picard",
    "python3-django",
    "rhythmbox-data",
    "synaptic",
    "system-config-printer-common",
    "totem-common",
    "tuxpaint-data",
    "vlc-l10n",
)
"""Packages with the messages of programs in many languages, 158 MB: with them Welsh and Xhosa have two and three times
as many as LibreOffice's alone."""

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")


class Pair(NamedTuple):
    """One message. Attributes: the English text and its translation, each in one line."""

    english: str
    translation: str


def read(
    language: str, max_words: int, folder: Path, packages: Sequence[str] = ()
) -> tuple[list[Pair], dict[str, Any]]:
    """Every message of a language that can be learned from, once.

    A message is left out if it is not translated, if the translation is the English text, if either holds markup or
    no word of three letters besides placeholders, if it is too long, or if the same English text came before.

    Args:
        language: the code in the name of Debian's `libreoffice-l10n-CODE`, and of the folders of other catalogues.
        max_words: in the English text; the translation may have half as many more.
        folder: where Debian packages are kept, as for `debian.package`.
        packages: more Debian packages, such as `DESKTOP`, which may have catalogues of this language.

    Returns:
        The pairs in the order of the catalogues, LibreOffice's first, and what they come from: `package`, `version`,
        `packages` (the versions of the others that have any), `messages`, how many were left out for each reason, and
        `pairs`.

    Raises:
        CalmError: If there is no such package, or no catalogue in LibreOffice's.
    """
    office = debian.package(f"libreoffice-l10n-{language}", folder)
    catalogues = sorted(office.root.rglob("LC_MESSAGES/*.mo"))
    if not catalogues:
        raise CalmError(f"{office.name} in {str(office.root)!r} holds no message catalogues (LC_MESSAGES/*.mo)")
    versions: dict[str, str] = {}
    for package in (debian.package(name, folder) for name in packages):
        found = sorted(package.root.rglob(f"{language}/LC_MESSAGES/*.mo"))
        if found:
            versions[package.name] = package.version
            catalogues += found
    left_out = dict.fromkeys(("untranslated", "copied", "markup", "wordless", "long", "repeated"), 0)
    pairs: dict[str, Pair] = {}
    messages = 0
    for english, translation in _messages(catalogues):
        messages += 1
        pair = Pair(_clean(english), _clean(translation))
        reason = _unfit(pair, max_words) or ("repeated" if folded(pair.english) in pairs else None)
        if reason:
            left_out[reason] += 1
        else:
            pairs[folded(pair.english)] = pair
    counts = {"messages": messages, **left_out, "pairs": len(pairs)}
    return list(pairs.values()), {"package": office.name, "version": office.version, "packages": versions, **counts}


def folded(text: str) -> str:
    """The text without case, punctuation and double spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _messages(catalogues: list[Path]) -> Iterator[tuple[str, str]]:
    for path in catalogues:
        for entry in polib.mofile(str(path)):  # it splits the context off
            # Which plural form English's singular corresponds to differs by language; the last is a form for many, as
            # the English plural is (of Welsh's four, for some numbers only: it may differ in a mutation).
            plural = entry.msgid_plural
            yield (plural, entry.msgstr_plural[max(entry.msgstr_plural)]) if plural else (entry.msgid, entry.msgstr)


def _clean(text: str) -> str:
    """In one line, with the product's name, without the sign before the letter that is a key (~, _ or &)."""
    text = re.sub("%PRODUCTNAME%?", "LibreOffice", text)
    text = re.sub(r"\s*\([~_&]\w\)|~(?=\w)|&(?=\w)(?!\w+;)", "", text)
    if text.count("_") == 1:  # two are a name such as %LISTSTYLE_NAME_1
        text = re.sub(r"(?<![A-Z])_(?=\w)|_(?=[a-z])", "", text)
    return " ".join(text.split())


def _unfit(pair: Pair, max_words: int) -> str | None:
    """Why it is left out."""
    if not pair.translation:
        return "untranslated"
    if folded(pair.english) == folded(pair.translation):
        return "copied"
    if any(re.search(r"</?[a-z]|[~_]|&\w+;", PLACEHOLDER.sub("", text)) for text in pair):
        return "markup"
    if not all(any(len(word) > 2 for word in _WORD.findall(PLACEHOLDER.sub(" ", text))) for text in pair):
        return "wordless"
    if len(pair.english.split()) > max_words or len(pair.translation.split()) > max_words * 1.5:
        return "long"
    return None
