"""The code domain's data from a hub: functions of six languages, MBPP's problems, and nothing leaked; from folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from packages import write_code_sets, write_data_set

from calm.errors import CalmError
from calm.experiments.code.data import completion, to_text
from calm.experiments.code.hub import LANGUAGES, HubSettings, function, load, mbpp
from calm.experiments.code.metrics import PassAt1
from calm.experiments.methods.examples import Example

PROBLEM = {
    "text": "Write a function to\r\ndouble a number.",
    "code": "def double(n):\r\n    return 2 * n\r\n",
    "test_setup_code": "two = 2",
    "test_list": ["assert double(1) == two", "assert double(-1) == -two"],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = write_code_sets(tmp_path_factory.mktemp("hub"))
    texts = [{"text": "The package that is asked for comes from a server, which is called a mirror."}]
    write_data_set(folder / "english", {"train": texts}, None)
    return HubSettings(
        functions=str(folder / "functions"),
        languages=("python", "go"),
        mbpp=str(folder / "mbpp"),
        english=str(folder / "english"),
        english_config=None,
        composition_share=0.2,
        development=4,
    )


def row(code: str, docstring: str = "Count the words of it. More.") -> dict[str, str]:
    return {"repo": "a/b", "path": "c", "code": code, "docstring": docstring}


def test_pythons_docstring_is_taken_out_of_a_method_whose_first_line_was_moved():
    code = 'def count(self, words=None,\n              to=3):\n        """Count the words of it. More.\n        """\n'
    found = function(row(f"{code}        total = len(words)\n\n        return total"), "python")
    assert found.sentence == "Count the words of it." and "Count" not in found.code
    assert found.body == "    total = len(words)\n    return total"
    assert found.header.startswith("def count(self, words=None,\n")
    bare = function(row("def count(words):\n    total = len(words)\n    return total"), "python")
    assert (bare.header, bare.body, bare.sentence) == ("def count(words):\n", found.body, found.sentence)


def test_other_languages_keep_their_shape_and_are_commented_in_their_way():
    java = function(row("int count(String words) {\n\t\tint n = words.length();\n\t\treturn n;\n\t}"), "java")
    assert java.code == "int count(String words) {\n    int n = words.length();\n    return n;\n}"
    signs = {language: to_text(java, language).prompt.rsplit("\n", 1)[1] for language in LANGUAGES}
    hashes = {"python", "ruby"}
    assert signs == {name: f"{'#' if name in hashes else '//'} In English:" for name in LANGUAGES}
    prompt, line = completion(java, "java", 0)
    written = "int count(String words) {\n    int n = words.length();\n    return n;"
    assert f"{prompt}{line}" == f"// Count the words of it.\n{written}"


def test_a_problem_of_mbpp_is_passed_by_its_solution_and_by_no_other():
    (example,), checks = mbpp([PROBLEM])
    assert example == Example(
        "# Write a function to\n# double a number.\n# It passes these tests:\n"
        "# assert double(1) == two\n# assert double(-1) == -two\n",
        "def double(n):\n    return 2 * n",
    )
    metric = PassAt1(checks=checks)
    answers = [example.completion, "def double(n):\n    return 2", ""]
    assert metric.statistics(answers, [example] * 3).tolist() == [[1], [0], [0]]


def test_nothing_like_a_held_out_function_or_a_solution_is_trained_on(settings):
    data, counts = load(settings, 0, allow_code_execution=False)
    assert counts["python"]["similar"] == 1 and counts["go"]["similar"] == 0
    trained = "".join(f"{prompt}{completion}" for prompt, completion in data.specialist)
    solution = load(settings, 0, allow_code_execution=True)[0].tests["mbpp"].examples[0].completion
    leaked = solution.partition("\n")[0]  # the first line of a function of the training split, too
    assert leaked.startswith("def ") and leaked not in trained
    functions = {f"{prompt}{code}" for prompt, code in data.specialist}
    described = [e.prompt.rpartition("\n")[0] for e in data.composition if e.prompt.endswith("In English:")]
    assert set(described) <= functions  # m_A has seen D_C's functions, as in the paper
    assert 0.1 < len(described) / len(functions) < 0.3
    assert not set(data.composition) & set(data.specialist)
    held_out = {example.completion for task in data.tests.values() for example in task.examples}
    assert len(held_out) == 12 and not held_out & {example.completion for example in data.specialist}
    assert not set(data.developed) & set(data.specialist) and len(data.developed) == 8
    assert set(data.tests) == {"python_to_text", "go_to_text"}  # nothing is executed

    unlike = dataclasses.replace(settings, mbpp_config="other")
    write_data_set(Path(settings.mbpp), {"test": [PROBLEM], "prompt": [PROBLEM]}, "other")
    data, counts = load(unlike, 0, allow_code_execution=False)
    assert counts["python"]["similar"] == 0  # without that problem its solution is any function
    assert leaked in "".join(f"{prompt}{completion}" for prompt, completion in data.specialist)


def test_the_same_seed_gives_the_same_data_and_code_execution_adds_two_rows(settings):
    first, _ = load(settings, 0, allow_code_execution=False)
    again, _ = load(settings, 0, allow_code_execution=True)
    other, _ = load(settings, 1, allow_code_execution=False)
    assert first.parts() == again.parts()
    assert set(again.tests) - set(first.tests) == {"humaneval", "mbpp"}
    assert len(again.tests["mbpp"].examples) == len(again.tests["mbpp"].few_shot) == 3
    assert set(first.composition) != set(other.composition)


def test_a_data_set_that_is_not_there_or_too_small_is_named(settings):
    with pytest.raises(CalmError, match=r"the data set '.*functions' \(ruby, test\) could not be read"):
        load(dataclasses.replace(settings, languages=("ruby",)), 0, allow_code_execution=False)
    with pytest.raises(CalmError, match=r"has 0 functions of python to test, 0 for development and 0 for D_C"):
        load(dataclasses.replace(settings, max_characters=10), 0, allow_code_execution=False)
