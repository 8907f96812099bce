"""The loop's own parts: statistics of the logged step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import sums, write_jsonl

from calm.training import Recipe, trainer
from calm.training.loop import CompositionTrainer, SaveAndStop
from calm.training.recipe import check_recipe

MakeRecipe = Callable[..., Recipe]
Log = dict[str, float]


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_bases: dict[str, str]) -> MakeRecipe:
    """Makes recipes of steps of four examples; a run's folder holds nothing of another one's."""
    train = str(write_jsonl(tmp_path / "train.jsonl", sums(22)))

    def make(out: str = "out", **training: Any) -> Recipe:
        settings = {"output_dir": str(tmp_path / out), "per_device_batch_size": 4, "learning_rate": 1e-2}
        fields = {**tiny_bases, "connections": 2, "data": {"train": train}}
        return check_recipe(fields | {"training": settings | training})

    return make


def logged(file: str | Path, key: str) -> dict[int, Log]:
    """What was logged with the training loss, by step."""
    return {int(log["step"]): log for log in json.loads(Path(file).read_text())[key] if "loss" in log}


def history(recipe: Recipe) -> dict[int, Log]:
    return logged(Path(recipe.training.output_dir, "training_log.json"), "history")


def in_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, torch.nn.Module], None]) -> None:
    """Have something done, with the step's number and the model, when the gradients of each step are there."""
    original = CompositionTrainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, model, *args, **kwargs)
        act(self.state.global_step + 1, model)
        return loss

    monkeypatch.setattr(CompositionTrainer, "training_step", training_step)


def test_the_last_step_is_measured_whatever_is_logged(make_recipe: MakeRecipe) -> None:
    each, seldom = make_recipe("each", max_steps=7, log_steps=1), make_recipe("seldom", max_steps=7, log_steps=5)
    for recipe in (each, seldom):
        trainer.train(recipe)
    expected, found = (
        {step: {name: value for name, value in log.items() if "connection_" in name} for step, log in logs.items()}
        for logs in (history(each), history(seldom))
    )
    assert list(found) == [5, 7] and expected[5] != expected[7] and len(expected[7]) == 8
    assert found == {step: expected[step] for step in (5, 7)}


def test_a_step_that_is_logged_unforeseen_shows_no_other_steps_statistics(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step(monkeypatch, lambda step, _: monkeypatch.setattr(SaveAndStop, "requested", step == 6))
    recipe = make_recipe(max_steps=9, log_steps=5)
    with pytest.raises(trainer.TrainingInterrupted):
        trainer.train(recipe)
    logs = logged(Path(recipe.training.output_dir, "checkpoint-6", "trainer_state.json"), "log_history")
    assert list(logs) == [5, 6]
    assert [any("connection_" in name for name in log) for log in logs.values()] == [True, False]
