"""Loggers of transformers, by the recipe's `report_to`: what they write is what the training log holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bases import sums, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from calm.training import trainer
from calm.training.recipe import check_recipe
from calm.training.statistics import STATISTICS


def test_tensorboard(tmp_path: Path, tiny_bases: dict[str, str]) -> None:
    """The loss, and each connection's statistics, for every logged step."""
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", sums(8)))}
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "log_steps": 1, "report_to": ["tensorboard"]}
    trainer.train(check_recipe({**tiny_bases, "connections": 2, "data": data, "training": training}))
    history = json.loads((tmp_path / "out" / "training_log.json").read_text())["history"]

    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    statistics = [f"connection_{i}/{statistic}" for i in range(2) for statistic in STATISTICS]
    for key in ("loss", *statistics):
        expected = [(log["step"], log[key]) for log in history if key in log]
        assert [step for step, _ in expected] == [1, 2, 3]
        found = [(event.step, event.value) for event in written.Scalars(f"train/{key}")]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
