"""Ten kills by SIGKILL, some of them while a checkpoint is written: the losses are those of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bases import sums, write_jsonl
from safetensors.torch import load_file

from calm.cli import main

pytestmark = pytest.mark.slow

STEPS = 60
FILES = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def calm_train(arguments: list[str], log: str) -> None:
    """The command `calm train`, in a process of its own."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    sys.argv = ["calm", "train", *arguments]
    main()


class Run:
    """A run whose process can be started, watched and killed.

    The processes are forked from one that has imported everything: that is what takes seconds.
    """

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["calm.training.trainer", "calm.model", "matplotlib.figure", __name__])

    def __init__(self, folder: Path, bases: dict[str, str]) -> None:
        self.out, self.log, self.recipe = folder / "out", folder / "log.txt", folder / "recipe.yaml"
        data = {
            "train": str(write_jsonl(folder / "train.jsonl", sums(22))),
            "eval": str(write_jsonl(folder / "eval.jsonl", sums(4, seed=1))),
        }
        training = {
            "output_dir": str(self.out),
            "max_steps": STEPS,
            "per_device_batch_size": 2,
            "learning_rate": 1e-2,
            "log_steps": 1,
            "eval_steps": 2,
            "save_steps": 2,
            "keep_checkpoints": 2,
        }
        self.recipe.write_text(yaml.safe_dump({**bases, "connections": 2, "data": data, "training": training}))

    def start(self, *options: str) -> Any:
        process = self.processes.Process(target=calm_train, args=([str(self.recipe), *options], str(self.log)))
        process.start()
        return process

    def to_the_end(self, *options: str) -> int:
        process = self.start(*options)
        process.join()
        return process.exitcode

    def checkpoints(self) -> set[Path]:
        return set(self.out.glob("checkpoint-*"))

    def unfinished(self) -> list[Path]:
        return list(self.out.glob(".saving-*"))

    def history(self) -> list[dict[str, float]]:
        """Everything logged but times, and the Trainer's own summary, which counts from the last start."""
        logged = json.loads((self.out / "training_log.json").read_text())["history"]
        timed = ("runtime", "per_second")
        return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in logged if "train_loss" not in log]


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    expected = {
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    if missing := expected - {path.name for path in checkpoint.iterdir()}:
        return f"{checkpoint.name} lacks {missing}"
    try:
        load_file(checkpoint / "model.safetensors")
        for path in checkpoint.glob("*.json"):
            json.loads(path.read_text())
        for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            if zipfile.ZipFile(path).testzip() is not None:
                return f"{path} is damaged"
    except Exception as error:
        return f"{checkpoint.name}: {error}"
    return None


def wait_until(condition: Callable[[], Any], process: Any) -> None:
    while not condition():
        assert process.is_alive(), "the run ended before it was to be killed"
        time.sleep(0.0005)


def test_ten_kills(tmp_path: Path, tiny_bases: dict[str, str]) -> None:
    """Two before the first checkpoint, four while one is written, the others anywhere after one more step."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, run = Run(tmp_path / "whole", tiny_bases), Run(tmp_path / "killed", tiny_bases)
    assert whole.to_the_end() == 0, whole.log.read_text()

    numbers = random.Random(0)
    kills = ["early"] * 2 + numbers.sample(["saving"] * 4 + ["anywhere"] * 4, 8)
    killed_while_saving = 0
    for kill in kills:
        before = run.checkpoints()
        process = run.start(*(["--resume"] if before else []))
        if kill == "early":
            time.sleep(numbers.uniform(0, 0.2))
        else:
            wait_until(lambda: run.checkpoints() - before, process)  # noqa: B023
            time.sleep(numbers.uniform(0, 0.1))
            if kill == "saving":
                wait_until(run.unfinished, process)
        process.kill()
        process.join()
        assert process.exitcode == -9
        killed_while_saving += bool(run.unfinished())
        assert [reason for path in run.checkpoints() if (reason := broken(path))] == []
        if kill == "early":
            assert run.to_the_end("--resume") == 1
            assert "holds no checkpoint to resume from; start the run without --resume" in run.log.read_text()
    assert killed_while_saving >= 3
    assert run.to_the_end("--resume") == 0, run.log.read_text()

    assert run.history() == whole.history()
    assert sum("loss" in log for log in whole.history()) == STEPS
    assert not run.unfinished() and not list(run.out.glob(".deleting-*"))
    weights, expected = (load_file(it.out / "model.safetensors") for it in (run, whole))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    for path in run.checkpoints():  # negative control: the check above would have noticed a half of one
        for file in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            content = (path / file).read_bytes()
            (path / file).write_bytes(content[: len(content) // 2])
            assert broken(path)
            (path / file).write_bytes(content)
        assert broken(path) is None
