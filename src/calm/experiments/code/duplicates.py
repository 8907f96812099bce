"""Functions that are nearly the same: half of the smaller one's runs of five tokens, or the same description."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from calm.experiments.code.functions import Function

SIMILAR = 0.5
_RUN = 5
_TOKEN = re.compile(r"\w+|[^\w\s]")


def similar(left: Sequence[Function], right: Sequence[Function]) -> Iterator[tuple[int, int]]:
    """Indices of near-duplicates, one function from each side.

    Compared are sets of runs of tokens of the code without its docstring, without case, and with one sign for every
    number; and the first sentences of the docstrings, as words without case.
    """
    runs_of = [_runs(function.code) for function in left]
    holders = defaultdict(list)
    described = defaultdict(list)
    for index, runs in enumerate(runs_of):
        for run in runs:
            holders[run].append(index)
        described[_words(left[index].sentence)].append(index)
    for other, function in enumerate(right):
        runs = _runs(function.code)
        shared = Counter(index for run in runs for index in holders.get(run, ()))
        found = {index for index, n in shared.items() if n >= SIMILAR * min(len(runs), len(runs_of[index]))}
        found.update(described.get(_words(function.sentence), ()))
        for index in sorted(found):
            yield index, other


def _runs(code: str) -> set[tuple[str, ...]]:
    tokens = ["0" if token[0].isdigit() else token for token in _TOKEN.findall(code.lower())]
    return {tuple(tokens[start : start + _RUN]) for start in range(max(1, len(tokens) - _RUN + 1))}


def _words(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.lower()))
