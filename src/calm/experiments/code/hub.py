"""The data from a hub, for the `paper` preset: CodeXGLUE's functions in six languages, HumanEval, MBPP, FineWeb-Edu."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from calm.errors import CalmError
from calm.evaluation.code import check_limits
from calm.experiments import preservation
from calm.experiments.code import python
from calm.experiments.code.data import each_once, few, forms, human_eval, human_eval_task, solved, tasks, whole
from calm.experiments.code.duplicates import SIMILAR, similar
from calm.experiments.code.functions import Function, first_sentence, fitting
from calm.experiments.code.metrics import PassAt1
from calm.experiments.hub import first_texts, rows
from calm.experiments.methods.examples import Data, Example, TaskSet

LANGUAGES = {
    "python": "Python",
    "php": "PHP",
    "go": "Go",
    "java": "Java",
    "javascript": "JavaScript",
    "ruby": "Ruby",
}
"""CodeXGLUE's configurations, which are the paper's languages."""


@dataclass(frozen=True)
class HubSettings:
    """Data sets, by hub name or by a folder that `datasets.load_dataset` takes likewise.

    Attributes:
        functions: with the columns `repo`, `path`, `code` and `docstring`, a configuration for each language, split by
            repositories.
        languages: some of `LANGUAGES`.
        mbpp: with the columns `text`, `code`, `test_setup_code` and `test_list`, and the splits `test` and `prompt`.
        mbpp_config: its configuration.
        english: with a `text` column, in whose first texts perplexity and last words are measured.
        english_config: its configuration.
        train: functions of a language at most that are trained on. While a composition trains, `m_A`'s outputs on D_C
            are kept in memory: with these sizes about 9,000 examples, some 17 GB by estimate.
        composition_share: D_C's size, in parts of these (about 7% in the paper).
        development: functions of each language for choosing learning rates.
        test: functions of each language at most that are described.
        max_characters: of a function without its docstring.
        max_new_tokens: how long a description may be.
        program_tokens: how long a solution of HumanEval or MBPP may be.
    """

    functions: str = "google/code_x_glue_ct_code_to_text"
    languages: tuple[str, ...] = tuple(LANGUAGES)
    mbpp: str = "google-research-datasets/mbpp"
    mbpp_config: str | None = "full"
    english: str = "HuggingFaceFW/fineweb-edu"
    english_config: str | None = "sample-10BT"
    train: int = 10_000
    composition_share: float = 0.07
    development: int = 100
    test: int = 1000
    max_characters: int = 1000
    max_new_tokens: int = 64
    program_tokens: int = 384


def load(settings: HubSettings, seed: int, allow_code_execution: bool) -> tuple[Data, dict[str, Any]]:
    """All languages' data, and what it is, in figures.

    Args:
        settings: data sets and sizes.
        seed: of the choice of functions, and of the lines that are asked for.
        allow_code_execution: have the rows `humaneval` and `mbpp`, whose metric runs what models write.

    Returns:
        The data, without training functions that are near a held-out one or a solution of HumanEval or MBPP, and with
        D_C's functions among `specialist`, as in the paper. By language, as plain JSON: how many functions of the
        training split were left out for each reason, those `similar` to a held-out one, and how many are in each part.

    Raises:
        CalmError: A data set cannot be had, or is too small; or code is to be executed where it cannot be limited.
    """
    if allow_code_execution:
        check_limits()
    problems, _ = human_eval()
    written = mbpp(rows(settings.mbpp, settings.mbpp_config, "test"))
    shown = mbpp(rows(settings.mbpp, settings.mbpp_config, "prompt"))[0]
    solutions = [solved(problem) for problem in (*problems, *written[0], *shown)]
    specialist: list[Example] = []
    composition: list[Example] = []
    development: dict[str, TaskSet] = {}
    tests: dict[str, TaskSet] = {}
    if allow_code_execution:
        tests["humaneval"] = human_eval_task(settings.program_tokens)
        tests["mbpp"] = TaskSet(
            title="MBPP",
            examples=written[0],
            metric=PassAt1(checks=written[1]),
            max_new_tokens=settings.program_tokens,
            few_shot=shown[:3],
            stop=("\nclass", "\nassert", "\nif", "\nprint", "\n#", "\n@", '\n"""'),
        )
    counts: dict[str, Any] = {}
    for language in settings.languages:
        parts = {}
        for split in ("test", "validation", "train"):
            found = (function(row, language) for row in rows(settings.functions, language, split))
            parts[split], reasons = fitting(found, settings.max_characters)
            random.Random(seed).shuffle(parts[split])
        test, developed = parts["test"][: settings.test], parts["validation"][: settings.development]
        held_out = [*test, *developed, *(solutions if language == "python" else ())]
        alike = {index for _, index in similar(held_out, parts["train"])}
        trained = [one for index, one in enumerate(parts["train"]) if index not in alike][: settings.train]
        composed = trained[: round(settings.composition_share * len(trained))]
        if not test or len(developed) < 2 or not composed:
            raise CalmError(
                f"{settings.functions!r} has {len(test)} functions of {language} to test, {len(developed)} for "
                f"development and {len(composed)} for D_C: expected at least 1, 2 and 1 of them with up to "
                f"{settings.max_characters} characters and a first sentence of 3 to 20 words"
            )
        specialist += [whole(one) for one in trained]
        composition += [example for one in composed for example in forms(one, language, seed)]
        shown_functions = few(composed, seed)
        asked, in_development = (
            tasks(part, shown_functions, language, LANGUAGES[language], settings.max_new_tokens, seed)
            for part in (test, developed)
        )
        tests[f"{language}_to_text"] = asked[f"{language}_to_text"]
        development |= each_once(in_development)
        sizes = {"specialist": trained, "composition": composed, "development": developed, "test": test}
        counts[language] = {**reasons, "similar": len(alike), **{name: len(part) for name, part in sizes.items()}}
    for part in (specialist, composition):
        random.Random(seed).shuffle(part)
    english = first_texts(settings.english, settings.english_config)
    data = Data(
        general=(),  # the vanilla m_A is a model already
        specialist=tuple(specialist),
        composition=tuple(composition),
        development=development,
        tests=tests,
        preserved={"English": english},
        preserved_tests={preservation.ENGLISH: preservation.english_words(english)},
    )
    return data, {**counts, "similarity": SIMILAR, "specialist": len(specialist), "composition": len(composition)}


def function(row: dict[str, Any], language: str) -> Function:
    """A function of CodeXGLUE, without the docstring that Python's have in their code."""
    first, _, rest = row["code"].replace("\r\n", "\n").expandtabs(4).partition("\n")
    rest = textwrap.dedent(rest)  # the first line of a method lost its indentation, the others did not
    file = f"{row['repo']}/{row['path']}"
    if language == "python":
        rest = textwrap.indent(rest, "    ")
        without = next(python.parse(f"{first}\n{rest}", file), None)
        if without:
            return without
    body = "\n".join(line.rstrip() for line in rest.split("\n") if line.strip())
    return Function(file, f"{first}\n", body, first_sentence(row["docstring"]))


def mbpp(problems: Iterable[dict[str, Any]]) -> tuple[tuple[Example, ...], dict[str, str]]:
    """MBPP's problems as comments, and by prompt the program that checks an answer."""
    examples, checks = [], {}
    for problem in problems:
        said = "\n".join([problem["text"], "It passes these tests:", *problem["test_list"]])
        prompt = "".join(f"# {line}\n" for line in said.splitlines())
        examples.append(Example(prompt, problem["code"].replace("\r\n", "\n").strip()))
        checks[prompt] = "\n".join([problem["test_setup_code"], *problem["test_list"], ""])
    return tuple(examples), checks
