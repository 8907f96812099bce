"""Plain English prose, for a vanilla m_A and for perplexities: the paragraphs of two books in Debian."""

from __future__ import annotations

import os
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from calm.errors import CalmError
from calm.experiments import debian

BOOKS = {
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",  # GPL-2+ or CC-BY-SA-3.0
    "debian-reference-en": "usr/share/debian-reference/ch*.en.html",  # GPL-2+
}
"""The pages of each, below the root of its Debian package."""


class Prose(NamedTuple):
    """Paragraphs of 20 to 150 words, each once; the two parts have no page in common.

    Attributes:
        general: To train on, in the order of the books within a page.
        preserved: Held out.
        source: What they come from, as plain JSON: `packages` with their versions, `pages`, `paragraphs` and
            `characters` of each part.
    """

    general: tuple[str, ...]
    preserved: tuple[str, ...]
    source: dict[str, object]


def load(seed: int, folder: str | os.PathLike[str], preserved: int = 200) -> Prose:
    """Fetch the books once, and split them by pages.

    Args:
        seed: of the choice of pages.
        folder: where Debian packages are kept, as for `debian.package` (about 100 MB for these, unpacked).
        preserved: paragraphs to hold out.

    Raises:
        CalmError: If a package cannot be had, or if the books have too few paragraphs.
    """
    packages = {name: debian.package(name, folder) for name in BOOKS}
    pages = [page for name, pattern in BOOKS.items() for page in sorted(packages[name].root.glob(pattern))]
    random.Random(seed).shuffle(pages)
    held_out: dict[str, None] = {}  # as an ordered set
    general: dict[str, None] = {}
    for page in pages:
        paragraphs = dict.fromkeys(_paragraphs(page))
        if len(held_out) < preserved:
            held_out |= paragraphs
        else:
            general |= paragraphs
    parts = {"general": tuple(p for p in general if p not in held_out), "preserved": tuple(held_out)[:preserved]}
    if len(parts["preserved"]) < preserved or not parts["general"]:
        raise CalmError(
            f"{preserved} paragraphs of English prose were to be held out of {len(pages)} pages in {str(folder)!r}, "
            f"which have {len(held_out) + len(general)}: take fewer, or remove the packages' folders to fetch them anew"
        )
    source: dict[str, object] = {
        "packages": {name: package.version for name, package in packages.items()},
        "pages": len(pages),
        "paragraphs": {part: len(texts) for part, texts in parts.items()},
        "characters": {part: sum(map(len, texts)) for part, texts in parts.items()},
    }
    return Prose(parts["general"], parts["preserved"], source)


def _paragraphs(page: Path) -> list[str]:
    parser = _Paragraphs()
    parser.feed(page.read_text(encoding="utf-8"))
    parser.close()
    return [paragraph for paragraph in parser.paragraphs if 20 <= len(paragraph.split()) <= 150]


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
