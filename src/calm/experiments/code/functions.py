"""A function of either language, and what makes it fit to learn from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_SENTENCE = re.compile(r".*?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!\.\.)\.(?=\s|$)", re.DOTALL)
_WORDS = (3, 20)


class Function(NamedTuple):
    """A documented function.

    Attributes:
        file: Where it is from, below the root of its package.
        header: Its lines before the docstring, each with its line break.
        body: Its lines after the docstring, indented.
        sentence: The first sentence of the docstring, on one line.
    """

    file: str
    header: str
    body: str
    sentence: str

    @property
    def code(self) -> str:
        """The function without its docstring."""
        return self.header + self.body

    @property
    def next_lines(self) -> list[int]:
        """Which lines of the body can be asked for: statements after the first line, which BPE splits from before."""
        lines = self.body.split("\n")
        return [i for i, line in enumerate(lines) if i and re.match(r" +[^\s\d#;].", line)]


def first_sentence(docstring: str) -> str:
    """The first sentence on one line; empty if the first paragraph has none that ends with a period."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    found = _SENTENCE.match(paragraph)
    return found[0] if found else ""


def fitting(functions: Iterable[Function], max_characters: int) -> tuple[list[Function], dict[str, int]]:
    """Those to learn from, sorted, each code once.

    Args:
        functions: in any order.
        max_characters: of the code without its docstring.

    Returns:
        The functions, and how many there were: `functions` in all, those left out because they have no first sentence
        of 3 to 20 words (`undescribed`), are `long`, have no next line to ask for (`short`), are `not_ascii`, or are
        `repeated`; and the rest, `fitting`.
    """
    counts = dict.fromkeys(("functions", "undescribed", "long", "short", "not_ascii", "repeated", "fitting"), 0)
    seen = set()
    kept = []
    for function in sorted(functions):
        counts["functions"] += 1
        reason = _reason(function, max_characters)
        if not reason and " ".join(function.code.split()) in seen:
            reason = "repeated"
        if reason:
            counts[reason] += 1
        else:
            seen.add(" ".join(function.code.split()))
            kept.append(function)
    counts["fitting"] = len(kept)
    return kept, counts


def _reason(function: Function, max_characters: int) -> str:
    if not _WORDS[0] <= len(function.sentence.split()) <= _WORDS[1] or function.sentence[0].isdigit():
        return "undescribed"
    if len(function.code) > max_characters:
        return "long"
    if not function.next_lines:
        return "short"
    return "" if (function.code + function.sentence).isascii() else "not_ascii"
