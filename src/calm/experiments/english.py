"""Plain English prose from Debian: two books for a vanilla m_A, and a third one, unlike them, for perplexities."""

from __future__ import annotations

import gzip
import os
import random
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from calm.errors import CalmError
from calm.experiments import debian

BOOKS = {
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",  # GPL-2+ or CC-BY-SA-3.0
    "debian-reference-en": "usr/share/debian-reference/ch*.en.html",  # GPL-2+
}
"""What is trained on: the pages of each, below the root of its Debian package."""
HELD_OUT = ("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz")
"""What is measured on: the Jargon File (public domain). A model that was trained on other pages of the same books would
be at an advantage there over one that was not."""

_SENTENCES = re.compile(r"(?!.*\b(?:See|Compare|Contrast|Oppose)\b)[A-Z\"\u201c].*[.?!]\u201d?")
"""None that refer to other entries, which end in any word."""


class Prose(NamedTuple):
    """Paragraphs of 20 to 150 words, each once.

    Attributes:
        general: To train on.
        preserved: Of another book, to measure on.
        source: What they come from, as plain JSON: `packages` with their versions, `paragraphs` and `characters` of
            each part.
    """

    general: tuple[str, ...]
    preserved: tuple[str, ...]
    source: dict[str, object]


def load(seed: int, folder: str | os.PathLike[str], preserved: int = 200) -> Prose:
    """Fetch the books once.

    Args:
        seed: of the choice of paragraphs to measure on, and of the order of pages to train on.
        folder: where Debian packages are kept, as for `debian.package` (about 100 MB for these, unpacked).
        preserved: paragraphs to measure on.

    Raises:
        CalmError: If a package cannot be had, or if the books have too few paragraphs.
    """
    packages = {name: debian.package(name, folder) for name in (*BOOKS, HELD_OUT[0])}
    pages = [page for name, pattern in BOOKS.items() for page in sorted(packages[name].root.glob(pattern))]
    random.Random(seed).shuffle(pages)
    general = _fitting(paragraph for page in pages for paragraph in _paragraphs(page))
    measured = _fitting(_entries(packages[HELD_OUT[0]].root / HELD_OUT[1]))
    if len(measured) < preserved or not general:
        raise CalmError(
            f"{', '.join(packages)} in {str(folder)!r} have {len(general)} paragraphs of English prose to train on and "
            f"{len(measured)} to measure on: expected some and {preserved}. Remove the packages' folders to fetch them "
            "anew"
        )
    parts = {"general": general, "preserved": tuple(random.Random(seed).sample(measured, preserved))}
    source: dict[str, object] = {
        "packages": {name: package.version for name, package in packages.items()},
        "paragraphs": {part: len(texts) for part, texts in parts.items()},
        "characters": {part: sum(map(len, texts)) for part, texts in parts.items()},
    }
    return Prose(parts["general"], parts["preserved"], source)


def _fitting(paragraphs: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in paragraphs if 20 <= len(text.split()) <= 150))


def _entries(path: Path) -> list[str]:
    """Whole sentences of a dictionary's entries, without the braces of its references and the numbers of meanings."""
    if not path.exists():
        raise CalmError(f"{HELD_OUT[0]} was unpacked without {path}: remove its folder to fetch it anew")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        blocks = re.split(r"\n\s*\n", file.read())
    paragraphs = (re.sub(r"^\d+\. |[{}]", "", " ".join(block.split())) for block in blocks)
    return [paragraph for paragraph in paragraphs if _SENTENCES.fullmatch(paragraph)]


def _paragraphs(page: Path) -> list[str]:
    parser = _Paragraphs()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return parser.paragraphs


class _Paragraphs(HTMLParser):
    """The running text of a page, one string for each paragraph, without code blocks and tables."""

    _SKIPPED = ("pre", "table", "script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._pieces: list[str] | None = None
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SKIPPED:
            self._skipped += 1
        if tag == "p" or (tag == "div" and ("class", "para") in attrs):
            self._end()
            self._pieces = []

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SKIPPED:
            self._skipped -= 1
        if tag in ("p", "div"):
            self._end()

    def handle_data(self, data: str) -> None:
        if self._pieces is not None and not self._skipped:
            self._pieces.append(data)

    def _end(self) -> None:
        if self._pieces is not None:
            self.paragraphs.append(" ".join("".join(self._pieces).split()))
        self._pieces = None
