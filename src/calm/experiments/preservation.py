"""Small tasks in what an anchor can do before: the last word of an English sentence, and of a line of Python (issue 4).

Both are like LAMBADA (Paperno et al. 2016): one word is asked for, and a whole paragraph or function comes before it.
Here the word need not occur before. What is asked for begins with the space before it, so that BPE splits there.
"""

from __future__ import annotations

import functools
import re
import string
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from calm.errors import CalmError
from calm.experiments.code import python
from calm.experiments.code.functions import Function
from calm.experiments.methods.examples import Example, TaskSet
from calm.experiments.methods.metrics import FirstWord

ENGLISH, PYTHON = "English last word", "Python last word"
"""Rows of the preservation table."""

_CONTEXT = range(60, 400)
"""Characters before the word, about 15 to 100 tokens."""
_LAST_OF_SENTENCE = re.compile(r"(?<=[a-z,]) (?P<word>[A-Za-z]{4,12})(?=[.?!](?: |$))")
_LAST_OF_LINE = re.compile(r"\n +[^\s#\"']+(?: [^\s#\"']+)* (?P<word>[^\s#\"']{4,12})(?=\n|$)")
_EXAMPLES = 120
_NEW_TOKENS = 6
_PER_FILE = 3


def english_words(texts: Iterable[str]) -> TaskSet:
    """The last word of a sentence, from its paragraph so far: letters only, 4 to 12.

    Args:
        texts: held-out prose. One example comes from each of the first 120 that have such a word, the last one there is
            not too far from the beginning of its paragraph.

    Raises:
        CalmError: If there is none.
    """
    texts = list(texts)
    found = (found for text in texts if (found := _last(_LAST_OF_SENTENCE, text.splitlines())))
    examples = tuple(islice(found, _EXAMPLES))
    if not examples:
        raise CalmError(
            f"none of the {len(texts)} English texts has a sentence that ends with a word of 4 to 12 letters after "
            f"{_CONTEXT.start} to {_CONTEXT.stop} characters of its paragraph: give prose"
        )
    metric = FirstWord(ignored=string.punctuation)
    return TaskSet("English, last word of a sentence", examples, metric, _NEW_TOKENS)


@functools.cache  # reading takes seconds, and every data set of a run has these
def python_words(functions: tuple[Function, ...] | None = None) -> TaskSet:
    """The last word of a line, from its function so far: 4 to 12 signs without quotes, such as `None:` or `len(x)`.

    Args:
        functions: those of the standard library's modules if not given, which are on every machine; they depend on
            Python's version. Read until there are 120 examples, at most three of a file.

    Raises:
        CalmError: If there is none.
    """
    counts = Counter[str]()
    examples: list[Example] = []
    for function in _standard_library() if functions is None else functions:
        found = _last(_LAST_OF_LINE, [function.code])
        if found and counts[function.file] < _PER_FILE:
            examples.append(found)
            counts[function.file] += 1
        if len(examples) == _EXAMPLES:
            break
    if not examples:
        raise CalmError(
            f"no function with a line that ends in a word of 4 to 12 signs is in {sysconfig.get_path('stdlib')!r}"
            ": this task needs the sources of Python's standard library, which this installation lacks"
        )
    return TaskSet("Python, last word of a line", tuple(examples), FirstWord(), _NEW_TOKENS)


def _standard_library() -> Iterator[Function]:
    """The documented functions of its modules, but not of its packages, file by file."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from python.parse(path.read_text(encoding="utf-8", errors="replace"), path.name)


def _last(pattern: re.Pattern[str], paragraphs: Iterable[str]) -> Example | None:
    """The last word of the first paragraph that has one after enough text, and not after too much."""
    for paragraph in paragraphs:
        fitting = [found for found in pattern.finditer(paragraph) if found.start("word") in _CONTEXT]
        if fitting:
            start = fitting[-1].start("word") - 1
            return Example(paragraph[:start], f" {fitting[-1]['word']}")
    return None
