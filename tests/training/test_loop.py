"""The loop's own parts: steps that fp16's scaler skips, rows that fill up batches, statistics of the logged step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from bases import byte_tokenizer, sums, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import calm
from calm.data import CompletionCollator, load_examples, pack
from calm.errors import CalmError
from calm.training import Recipe, trainer
from calm.training.loop import CompositionTrainer, SaveAndStop, SortedSteps, WholeBatches
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


def scale_gradients(monkeypatch: pytest.MonkeyPatch, init_scale: float) -> None:
    """Scale as with fp16 on a GPU, by torch's scaler for CPUs: accelerate makes none there. It computes in float32."""
    original = CompositionTrainer.create_accelerator_and_postprocess

    def create(self: Any) -> None:
        original(self)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        self.accelerator.scaler = scaler
        self.accelerator.unscale_gradients = lambda *args: scaler.unscale_(self.optimizer.optimizer)

    monkeypatch.setattr(CompositionTrainer, "create_accelerator_and_postprocess", create)


def overflow(model: torch.nn.Module) -> None:
    next(weight for weight in model.parameters() if weight.grad is not None).grad.view(-1)[0] = math.inf


def weights(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.training.output_dir, f"checkpoint-{step}", "model.safetensors"))


def test_a_step_whose_scaled_gradients_overflow_is_skipped(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights stay, the scale is halved, and a resumed run goes on with that scale."""
    scale_gradients(monkeypatch, init_scale=2.0**16)
    ends = [RuntimeError("killed")]

    def act(step: int, model: torch.nn.Module) -> None:
        if step == 7 and ends:
            raise ends.pop()
        if step in (1, 4, 8):
            overflow(model)

    in_step(monkeypatch, act)
    recipe = make_recipe(max_steps=9, log_steps=1, save_steps=1, keep_checkpoints=99)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train(recipe)
    assert trainer.train(recipe, resume=True).resumed_from == 6

    logs = history(recipe)
    assert list(logs) == list(range(1, 10))
    assert all(math.isfinite(value) for log in logs.values() for value in log.values())
    assert [step for step, log in logs.items() if "grad_norm" not in log] == [1, 4, 8]
    assert all(("connection_0/gradient" in log) == ("grad_norm" in log) for log in logs.values())
    saved = [weights(recipe, step) for step in range(1, 10)]
    same = [all(torch.equal(weight, saved[at][name]) for name, weight in saved[at - 1].items()) for at in range(1, 9)]
    assert [step for step, stays in enumerate(same, start=2) if stays] == [4, 8]
    scaler = torch.load(Path(recipe.training.output_dir, "checkpoint-9", "scaler.pt"), weights_only=True)
    assert scaler["scale"] == 2.0 ** (16 - 3)


def test_gradients_that_overflow_at_every_scale_stop_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_gradients(monkeypatch, init_scale=4.0)  # then 2, 1, 0.5
    in_step(monkeypatch, lambda step, model: overflow(model))
    with pytest.raises(CalmError, match=r"at step 4 \(the gradient's norm is inf, with fp16's scale at 0.5\).*fp16"):
        trainer.train(make_recipe(max_steps=9))


def test_a_loss_that_is_not_a_number_is_not_skipped(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradients(monkeypatch, init_scale=2.0**16)
    with pytest.raises(CalmError, match=r"not a number at step 2 \(.*fp16's scale at 65536\)"):
        trainer.train(make_recipe(max_steps=9, learning_rate=1e38, warmup=0, max_grad_norm=1e30))


def test_fp16_without_a_gpu_is_refused_at_once(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    recipe = make_recipe(fp16=True)
    with pytest.raises(CalmError, match=r"training.fp16 = True: .*needs a GPU.*expected bf16: true"):
        trainer.train(recipe)
    assert not Path(recipe.training.output_dir).exists()


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


@given(st.lists(st.integers(2, 50), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 3))
def test_batches_are_filled_up_behind_the_last_row(lengths: list[int], batch_size: int, accumulation: int) -> None:
    """Every process gets whole batches, and the rows come in the order that they have without fillers."""
    rows = [{"input_ids": np.arange(length), "labels": np.arange(length)} for length in lengths]
    filled = WholeBatches(rows, batch_size)
    assert len(filled) % batch_size == 0 and len(filled) - len(rows) < batch_size
    found = list(filled)
    assert len(found) == len(filled) and all(a is b for a, b in zip(rows, found, strict=False))
    assert all((row["labels"] == -100).all() and len(row["input_ids"]) == min(lengths) for row in filled.fillers)
    sizes = [len(row["input_ids"]) for row in found]
    order = list(SortedSteps(sizes, batch_size * accumulation, 0, fillers=len(filled.fillers)))
    assert order == [*SortedSteps(lengths, batch_size * accumulation, 0), *range(len(rows), len(filled))]


@pytest.mark.parametrize(("attend", "packing"), [("causal", False), ("causal", True), ("prompt", False)])
def test_a_batch_of_fillers_alone_adds_nothing(
    tiny_bases: dict[str, str], tmp_path: Path, attend: str, packing: bool
) -> None:
    tokenizer = byte_tokenizer()
    rows = load_examples(write_jsonl(tmp_path / "x.jsonl", sums(5)), tokenizer, max_length=64)
    fillers = WholeBatches(pack(rows, 24) if packing else rows, 16).fillers
    model = factories.perturb(calm.compose(tiny_bases["anchor"], tiny_bases["augmenting"], 2, attend=attend)).train()
    batch = CompletionCollator.for_tokenizer(tokenizer)(fillers[:2])
    loss = model(**batch, skip_logits=True, num_items_in_batch=torch.tensor(3)).loss
    loss.backward()
    assert loss == 0
    assert all((weight.grad == 0).all() for weight in model.connections.parameters()), "zero, but there: others wait"
