"""Processes that share a run: every job is done once, after what it needs, and none is lost with a process."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from calm.experiments import sharing
from calm.experiments.sharing import Job, do_all, locked
from calm.experiments.steps import once, read_json

NAMES = ("a", "b", "c", "d", "e", "f")
SPAWN = multiprocessing.get_context("spawn")


def write(folder: Path, name: str, needed: tuple[str, ...], seconds: float) -> None:
    def compute() -> dict:
        assert all((folder / f"{before}.json").exists() for before in needed)
        with (folder / "log").open("a") as log:
            log.write(f"{name} {os.getpid()}\n")
        time.sleep(seconds)
        return {"by": os.getpid()}

    once(folder / f"{name}.json", "the same", compute)


def jobs_in(folder: Path, seconds: float) -> list[Job]:
    needs = {"c": ("a", "b"), "d": ("a",), "f": ("c",)}
    return [
        Job(
            folder / f"{name}.json",
            functools.partial(write, folder, name, needs.get(name, ()), seconds),
            tuple(folder / f"{before}.json" for before in needs.get(name, ())),
        )
        for name in NAMES
    ]


def work(folder: Path, seconds: float, started) -> None:
    started.wait()
    do_all(jobs_in(folder, seconds), Console(file=io.StringIO()))


def logged(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_processes_share_the_jobs_and_each_is_done_once_after_those_that_it_needs(tmp_path):
    started = SPAWN.Barrier(2)
    others = [SPAWN.Process(target=work, args=(tmp_path, 0.3, started)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    done = logged(tmp_path)
    assert sorted(name for name, _ in done) == list(NAMES)
    assert {pid for _, pid in done} == {str(other.pid) for other in others}, "one of them did nothing"


def test_a_job_of_a_process_that_was_killed_is_done_by_another(tmp_path):
    started = SPAWN.Barrier(1)
    other = SPAWN.Process(target=work, args=(tmp_path, 60.0, started))
    other.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    do_all(jobs_in(tmp_path, 0.0), Console(file=io.StringIO()))
    assert [name for name, _ in logged(tmp_path)] == ["a", *NAMES]
    assert read_json(tmp_path / "a.json", {})["result"] == {"by": os.getpid()}


def test_what_another_process_is_at_is_left_for_later_and_waited_for_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.01)
    told, taken, before = io.StringIO(), threading.Event(), []

    def another() -> None:  # another process as far as locks are concerned
        with locked(tmp_path / "a.json"):
            taken.set()
            while "waiting" not in told.getvalue():
                time.sleep(0.01)
            before.extend(name for name, _ in logged(tmp_path))

    thread = threading.Thread(target=another, daemon=True)
    thread.start()
    assert taken.wait(10)
    do_all(jobs_in(tmp_path, 0.0), Console(file=told, width=200))
    thread.join()
    assert before == ["b", "e"], "the others need a"
    assert [name for name, _ in logged(tmp_path)] == ["b", "e", "a", "c", "d", "f"]
    where = "/".join(tmp_path.parts[-2:])
    assert told.getvalue().replace("\n", " ") == f"waiting for other processes, which are at {where}/a ... "


def test_a_job_that_fails_leaves_the_others_and_itself_to_be_done(tmp_path):
    def fail() -> None:
        raise InterruptedError

    failing = [Job(tmp_path / "a.json", fail)]
    for _ in range(2):  # the lock is not left behind
        with pytest.raises(InterruptedError):
            do_all(failing, Console(file=io.StringIO()))
    do_all(jobs_in(tmp_path, 0.0), Console(file=io.StringIO()))
    assert [name for name, _ in logged(tmp_path)] == list(NAMES)


def test_a_need_that_nobody_meets_is_an_error_rather_than_a_wait(tmp_path):
    with pytest.raises(ValueError, match="need what is no job"):
        do_all([Job(tmp_path / "a", lambda: None, (tmp_path / "b",))], Console(file=io.StringIO()))
