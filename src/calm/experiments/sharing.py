"""Lets several processes share the jobs of a run: each job is done by the one that comes to it first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """A piece of work that one process does at a time, and none does again once its outcome is kept on disk.

    Attributes:
        path: the file or folder that keeps the outcome, if there is one; it names the job.
        do: does the work, or reads what is kept of it.
        needs: paths of the jobs that come before.
    """

    path: Path
    do: Callable[[], None]
    needs: tuple[Path, ...] = ()


def locked(path: Path) -> FileLock:
    """The lock of a job. The system releases it when the process that holds it ends, however that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_suffix(".lock"))


def do_all(jobs: Sequence[Job], console: Console) -> None:
    """Have all jobs done, each after those that it needs: by this process, or by others that have the same list.

    A job that another process is at is left for later, when its outcome is read; or, if that process has ended
    without one, done here.

    Args:
        jobs: in the order in which to begin.
        console: is told what this process waits for.
    """
    left, done, awaited = list(jobs), set[Path](), set[Path]()
    while left:
        ready = [job for job in left if done.issuperset(job.needs)]
        if not ready:
            raise ValueError(f"jobs need what is no job before them: {[str(job.path) for job in left]}")
        for job in ready:
            if (lock := _taken(job.path)) is None:
                continue
            with lock:
                job.do()
            left.remove(job)
            done.add(job.path)
            break
        else:
            if awaited != (awaited := {job.path for job in ready}):
                at_work = ", ".join("/".join(path.with_suffix("").parts[-3:]) for path in sorted(awaited))
                console.print(f"[dim]waiting for other processes, which are at {at_work} ...[/dim]")
            time.sleep(POLL_SECONDS)


def _taken(path: Path) -> contextlib.AbstractContextManager[Any] | None:
    """The lock of a job, held until the end of the context that it is; None if another process holds it."""
    with contextlib.suppress(Timeout):
        return locked(path).acquire(blocking=False)
    return None
