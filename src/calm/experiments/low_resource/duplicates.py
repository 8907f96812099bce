"""Messages that are nearly the same, found and put together, so that none of them is tested when another is trained on.

Two messages are near-duplicates when, without case, punctuation, and with one sign for every number and placeholder,
they have at least `SIMILAR` percent in common (rapidfuzz's ratio: twice the longest common subsequence over both
lengths) of their letters, of their letters with the words sorted, or of their words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from rapidfuzz import fuzz, process

from calm.experiments.low_resource.catalogues import PLACEHOLDER, Pair, folded

SIMILAR = 80
_ROWS = 256
"""Compared at a time: bounds the memory."""


def clusters(pairs: Sequence[Pair]) -> list[list[int]]:
    """Put together whatever is connected by near-duplicates, in English or in translation.

    Returns:
        Indices into `pairs`, the clusters and what is in them in the order of `pairs`.
    """
    parents = list(range(len(pairs)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for side in ([pair.english for pair in pairs], [pair.translation for pair in pairs]):
        for one, other in similar(side, side):
            parents[root(one)] = root(other)
    members = defaultdict(list)
    for index in range(len(pairs)):
        members[root(index)].append(index)
    return list(members.values())


def similar(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Indices of near-duplicates, one text from each side; the same two can come more than once."""
    vocabulary: dict[str, int] = {}
    for view in (_letters, _sorted_letters, lambda text: _words(text, vocabulary)):
        lefts, rights = [view(template(text)) for text in left], [view(template(text)) for text in right]
        # Texts of very different lengths cannot be similar, so each is compared with those of about its length only.
        rows, columns = sorted(range(len(left)), key=lambda i: len(lefts[i])), np.argsort([len(r) for r in rights])
        lengths = np.array([len(rights[column]) for column in columns])
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS]
            shortest, longest = len(lefts[block[0]]), len(lefts[block[-1]])
            low = int(np.searchsorted(lengths, shortest * SIMILAR / (200 - SIMILAR), "left"))
            high = int(np.searchsorted(lengths, longest * (200 - SIMILAR) / SIMILAR, "right"))
            near = columns[low:high]
            scores = process.cdist(
                [lefts[row] for row in block],
                [rights[column] for column in near],
                scorer=fuzz.ratio,
                score_cutoff=SIMILAR,
                dtype=np.float32,
            )
            for row, column in zip(*np.nonzero(scores), strict=True):
                yield block[row], int(near[column])


def template(text: str) -> str:
    """The text without case and punctuation, numbers and placeholders all `0`."""
    words = folded(PLACEHOLDER.sub(" 0 ", text)).split()
    return " ".join("0" if word.isdigit() else word for word in words)


def _letters(text: str) -> str:
    return text


def _sorted_letters(text: str) -> str:
    return " ".join(sorted(text.split()))


def _words(text: str, vocabulary: dict[str, int]) -> str:
    """One character for each word."""
    return "".join(chr(0x10000 + vocabulary.setdefault(word, len(vocabulary))) for word in text.split())
