"""Runs the stages, two at a time in processes of one thread each, and shows how far they are."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from calm.errors import CalmError
from calm.experiments.key_value_arithmetic.recipe import Recipe
from calm.experiments.key_value_arithmetic.stages import BASELINES, CURVES, STAGES, Stage, StageResult, needs, run_stage

Finished = Callable[[Stage, StageResult], None]

_messages: Any = None
"""In a worker process: the queue to the parent."""


class StageFailed(RuntimeError):
    """A stage ended with an error, which is the cause of this one."""


def run_stages(
    stages: Sequence[Stage], recipe: Recipe, seed: int, output_dir: Path, progress: Progress, finished: Finished
) -> None:
    """Run stages, each after those that it needs.

    Args:
        stages: what is left to do, in the order in which to start.
        recipe: sizes and lengths; `recipe.workers` is the number of processes, 1 for none besides this one.
        seed: of the whole run.
        output_dir: the run's folder.
        progress: where the bars go.
        finished: is called with each result.

    Raises:
        StageFailed: a stage ended with an error, in a process of its own; none is begun any more, and Python waits
            for those that run when it exits. With `recipe.workers` 1 the error itself is raised.
        CalmError: such a process was ended from outside.
    """
    bars = {stage.name: progress.add_task(stage.name, total=None, start=False, note="waiting") for stage in stages}
    if recipe.workers == 1:
        for stage in stages:

            def report(step: int, total: int, note: str, bar: TaskID = bars[stage.name]) -> None:
                progress.update(bar, completed=step, total=total, note=note)

            progress.start_task(bars[stage.name])
            finished(stage, run_stage(stage, recipe, seed, output_dir, report))
        return

    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    pool = ProcessPoolExecutor(recipe.workers, context, initializer=_start_worker, initargs=(messages,))
    waiting, running = list(stages), dict[Future[StageResult], Stage]()
    done = {stage.name for stage in (*STAGES, *BASELINES, *CURVES)} - set(bars)
    try:
        while waiting or running:
            # never more than there are workers, so that what is submitted next can still be chosen
            ready = [stage for stage in waiting if done.issuperset(needs(stage, recipe))]
            for stage in ready[: recipe.workers - len(running)]:
                waiting.remove(stage)
                progress.start_task(bars[stage.name])
                running[pool.submit(_run_in_worker, stage, recipe, seed, output_dir)] = stage
            for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise CalmError(
                        f"The process that trained {stage.name} was ended from outside (out of memory?). Finished "
                        "stages are kept: run again to go on."
                    ) from error
                except Exception as error:
                    raise StageFailed(f"Training {stage.name} failed: {type(error).__name__}: {error}") from error
                done.add(stage.name)
                progress.update(bars[stage.name], completed=result.steps, total=result.steps)  # stops its clock
                finished(stage, result)
            _show(messages, bars, progress)
    finally:
        for future in running:
            future.cancel()
        pool.shutdown(wait=not running, cancel_futures=True)


def new_progress() -> Progress:
    """Bars with the step, the elapsed time and a word on how it goes."""
    return Progress(
        TextColumn("{task.description:>13}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _show(messages: Any, bars: dict[str, TaskID], progress: Progress) -> None:
    while True:
        try:
            name, step, total, note = messages.get_nowait()
        except queue.Empty:
            return
        progress.update(bars[name], completed=step, total=total, note=note)


def _start_worker(messages: Any) -> None:
    global _messages
    _messages = messages
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a stack trace
    torch.set_num_threads(1)  # such small matrices gain nothing from a second thread
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """No stage goes on, while another process begins it anew, after whoever wanted it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(stage: Stage, recipe: Recipe, seed: int, output_dir: Path) -> StageResult:
    def report(step: int, total: int, note: str) -> None:
        _messages.put((stage.name, step, total, note))

    return run_stage(stage, recipe, seed, output_dir, report)
