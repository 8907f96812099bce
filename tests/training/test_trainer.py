"""Training: what is trained, exact resume, whole checkpoints only, the best model kept, errors that stop it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bases import byte_tokenizer, save_base, sums, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import RandomSampler
from transformers import BloomConfig, BloomForCausalLM

import calm
from calm.data import CompletionCollator, load_examples, load_tokenizer, pack
from calm.errors import CalmError
from calm.training import Recipe, trainer
from calm.training.loop import SortedSteps
from calm.training.recipe import check_recipe

MakeRecipe = Callable[..., Recipe]
DieAt = Callable[[int], AbstractContextManager[None]]


def recipe_in(
    folder: Path,
    bases: dict[str, str],
    out: str = "out",
    *,
    evaluates: bool = True,
    top: dict[str, Any] | None = None,
    **training: Any,
) -> Recipe:
    """A recipe of 12 steps of 2 x 2 examples over 22 (two epochs and a bit), every step logged."""
    data = {"train": str(write_jsonl(folder / "train.jsonl", sums(22)))}
    if evaluates:
        data["eval"] = str(write_jsonl(folder / "eval.jsonl", sums(4, seed=1)))
        training = {"eval_steps": 2} | training
    settings = {
        "output_dir": str(folder / out),
        "max_steps": 12,
        "per_device_batch_size": 2,
        "gradient_accumulation": 2,
        "log_steps": 1,
        "save_steps": 4,
        "learning_rate": 1e-2,
    }
    fields = {"connections": 2, **bases, "data": data, "training": settings | training}
    return check_recipe(fields | (top or {}))


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_bases: dict[str, str]) -> MakeRecipe:
    """Makes recipes (see `recipe_in`) in the test's own folder."""
    return partial(recipe_in, tmp_path, tiny_bases)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_bases: dict[str, str]) -> Recipe:
    """A recipe whose run went through without interruption."""
    recipe = recipe_in(tmp_path_factory.mktemp("whole"), tiny_bases)
    trainer.train(recipe)
    return recipe


def log_of(recipe: Recipe) -> dict[str, Any]:
    return json.loads(Path(recipe.training.output_dir, "training_log.json").read_text())


def losses(recipe: Recipe) -> dict[str, dict[int, float]]:
    """Everything logged that resuming must reproduce, by name and step."""
    history = log_of(recipe)["history"]
    return {
        key: {log["step"]: log[key] for log in history if key in log}
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss")
    }


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def checkpoints(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in Path(recipe.training.output_dir).glob("*checkpoint*"))


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> DieAt:
    """Makes training die within the given optimiser step."""

    @contextmanager
    def dying(step: int) -> Iterator[None]:
        original = trainer.CompositionTrainer.training_step

        def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == step - 1:
                raise Killed
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.CompositionTrainer, "training_step", training_step)
            yield

    return dying


def test_training_lowers_the_loss_and_changes_only_the_connections(make_recipe: MakeRecipe, tiny_bases: dict[str, str]):
    recipe = make_recipe(max_steps=30)
    before = {name: weights(folder) for name, folder in tiny_bases.items()}
    result = trainer.train(recipe)
    out = recipe.training.output_dir
    evaluated = losses(recipe)["eval_loss"]
    assert evaluated[30] < evaluated[2] - 0.1
    assert all(torch.equal(w, before[n][k]) for n, f in tiny_bases.items() for k, w in weights(f).items())
    assert all(key.startswith("connections.") for key in weights(out))
    assert all(w.abs().max() > 0 for w in weights(out).values()), "also the gates, which start at zero"
    assert result.trainable_parameters == sum(w.numel() for w in weights(out).values())
    assert result.eval_loss == min(evaluated.values()) == evaluated[result.best_step]
    assert log_of(recipe)["result"] == {**log_of(recipe)["result"], "steps": 30, "train_examples": 22}
    assert Path(out, "loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(out), load_tokenizer(out)
    assert model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=2).shape[1] > 5


@pytest.mark.parametrize("died_in_step", [6, 11])  # within the first epoch (5.5 steps), and the second
def test_resumed_run_is_exactly_the_uninterrupted_one(
    whole: Recipe, make_recipe: MakeRecipe, die_at: DieAt, died_in_step: int
):
    halves = make_recipe()
    with die_at(died_in_step), pytest.raises(Killed):
        trainer.train(halves)
    assert not Path(halves.training.output_dir, "training_log.json").exists()
    result = trainer.train(halves, resume=True)
    assert result.resumed_from == {6: 4, 11: 10}[died_in_step], "10: a best model, between the regular saves"
    assert losses(halves) == losses(whole)
    assert list(losses(whole)["loss"]) == list(range(1, 13))
    first, second = weights(whole.training.output_dir), weights(halves.training.output_dir)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_resume_test_would_notice_lost_random_state_or_data_order(
    whole: Recipe, make_recipe: MakeRecipe, die_at: DieAt, monkeypatch: pytest.MonkeyPatch
):
    """Negative control: without the random state (dropout), or with other data, the loss differs at once."""
    halves = make_recipe()
    with die_at(6), pytest.raises(Killed):
        trainer.train(halves)

    def loss_of_step_5(name: str | None, broken: Any = None) -> float:
        found: dict[int, float] = {}
        with monkeypatch.context() as patch, die_at(6), pytest.raises(Killed):
            patch.setattr(
                trainer.CompositionTrainer, "log", lambda self, logs, *_: found.update({self.state.global_step: logs})
            )
            if name:
                patch.setattr(name, broken)
            trainer.train(halves, resume=True)
        return found[5]["loss"]

    correct = losses(whole)["loss"][5]
    assert loss_of_step_5(None) == correct
    assert loss_of_step_5("transformers.Trainer._load_rng_state", lambda *_: None) != correct
    assert loss_of_step_5("transformers.trainer.skip_first_batches", lambda loader, count: loader) != correct


def test_attention_implementation_of_the_bases(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    """The recipe's reaches both bases; one that is not installed is an error before training."""
    original, seen = trainer.CompositionTrainer.training_step, set()

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.add((model.anchor.config._attn_implementation, model.augmenting["augmenting"].config._attn_implementation))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.CompositionTrainer, "training_step", training_step)
    trainer.train(make_recipe(top={"attn_implementation": "eager"}, evaluates=False, max_steps=1))
    assert seen == {("eager", "eager")}
    with pytest.raises(CalmError, match=r"Cannot load .*[Ff]lash"):
        trainer.train(make_recipe("flash", top={"attn_implementation": "flash_attention_2"}))


def test_logged_means_are_the_same_when_logging_is_coarser_than_saving(make_recipe: MakeRecipe, die_at: DieAt):
    settings = {"evaluates": False, "log_steps": 5, "save_steps": 4}
    whole, halves = make_recipe("whole", **settings), make_recipe("halves", **settings)
    trainer.train(whole)
    with die_at(6), pytest.raises(Killed):
        trainer.train(halves)
    trainer.train(halves, resume=True)
    assert losses(halves) == losses(whole)
    assert list(losses(whole)["loss"]) == [4, 5, 8, 10, 12]


def test_gradient_accumulation_is_one_large_batch(make_recipe: MakeRecipe, tmp_path: Path):
    """The mean is over the completion tokens of the whole step, however it is cut into batches."""
    folders = {
        name: str(save_base(tmp_path / name, byte_tokenizer(), seed=seed, attention_dropout=0.0))
        for seed, name in enumerate(("anchor", "augmenting"))
    }
    recipes = [
        make_recipe(
            f"{size}",
            top=folders,
            evaluates=False,
            max_steps=4,
            per_device_batch_size=size,
            gradient_accumulation=4 // size,
        )
        for size in (4, 1)
    ]
    for recipe in recipes:
        trainer.train(recipe)
    large, small = (losses(recipe)["loss"] for recipe in recipes)
    assert large == pytest.approx(small, rel=1e-5)


def test_early_stop_keeps_the_best_model_and_its_patience_survives_a_resume(
    make_recipe: MakeRecipe, tmp_path: Path, die_at: DieAt
):
    """The evaluation loss first falls (answers are digits) and then rises (they are other ones)."""
    rows = {name: [{"prompt": f"{i}+1=", "completion": name} for i in range(20)] for name in "91"}
    data = {
        "train": str(write_jsonl(tmp_path / "9.jsonl", rows["9"])),
        "eval": str(write_jsonl(tmp_path / "1.jsonl", rows["1"][:4])),
    }
    settings = {"top": {"data": data}, "max_steps": 60, "early_stopping_patience": 3, "keep_checkpoints": 1}
    recipe = make_recipe(**settings, save_steps=60)
    result = trainer.train(recipe)
    evaluated = losses(recipe)["eval_loss"]
    best = min(evaluated, key=evaluated.__getitem__)
    assert result.stopped_early
    assert 2 < best == result.best_step == result.steps - 2 * 3
    assert f"checkpoint-{best}" in checkpoints(recipe), "though 60 steps lie between regular checkpoints"

    out = recipe.training.output_dir
    best_weights = weights(Path(out, f"checkpoint-{best}"))
    assert all(torch.equal(w, best_weights[k]) for k, w in weights(out).items())
    assert evaluated[result.steps] > evaluated[best] + 0.01, "the last model is worse, so it can be told apart"
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(out), load_tokenizer(out)
    with torch.no_grad():
        batch = CompletionCollator.for_tokenizer(tokenizer)(load_examples(data["eval"], tokenizer, max_length=64))
        assert model(**batch).loss.item() == pytest.approx(evaluated[best], rel=1e-5)

    halves = make_recipe("halves", **settings, save_steps=2)
    with die_at(result.steps - 1), pytest.raises(Killed):  # after two of three evaluations without improvement
        trainer.train(halves)
    resumed = trainer.train(halves, resume=True)
    assert (resumed.steps, resumed.best_step, resumed.eval_loss) == (result.steps, best, result.eval_loss)
    patient = make_recipe("halves", **settings | {"early_stopping_patience": 5}, save_steps=2)
    assert trainer.train(patient, resume=True).steps == best + 2 * 5, "the recipe's patience, and three waited already"


def test_rates_are_the_recipes_after_a_resume(make_recipe: MakeRecipe, die_at: DieAt, monkeypatch: pytest.MonkeyPatch):
    """From the first step on and in each group of weights, as in a run that had them from the beginning."""
    used: dict[int, list[tuple[float, float]]] = {}
    original = trainer.CompositionTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        groups = self.optimizer.param_groups
        used[self.state.global_step + 1] = [(group["lr"], group["weight_decay"]) for group in groups]
        return original(self, *args, **kwargs)

    with die_at(6), pytest.raises(Killed):
        trainer.train(make_recipe("halves", evaluates=False))
    monkeypatch.setattr(trainer.CompositionTrainer, "training_step", training_step)
    changed = {"evaluates": False, "learning_rate": 3e-3, "weight_decay": 0.1, "lr_scheduler": "linear"}
    whole, halves = make_recipe("whole", **changed), make_recipe("halves", **changed)
    trainer.train(whole)
    expected = {step: rates for step, rates in used.items() if step > 4}
    used.clear()
    assert trainer.train(halves, resume=True).resumed_from == 4
    assert used == expected
    assert [decay for _, decay in used[5]] == [0.1, 0.0]
    logged = losses(halves)["learning_rate"]
    assert {step: logged[step] for step in used} == {step: groups[0][0] for step, groups in used.items()}


def test_the_log_of_an_older_run_is_not_taken_for_that_of_a_new_one(make_recipe: MakeRecipe, die_at: DieAt):
    """Whose checkpoints were deleted; nothing of it is lost unless its log is deleted, too."""
    recipe = make_recipe(evaluates=False)
    out = Path(recipe.training.output_dir)
    trainer.train(recipe)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = (out / "training_log.json").read_bytes()
    with pytest.raises(CalmError, match=r"already holds a finished run \(its training_log.json, .*delete that file"):
        trainer.train(recipe)
    assert (out / "training_log.json").read_bytes() == before
    (out / "training_log.json").unlink()
    with die_at(6), pytest.raises(Killed):
        trainer.train(recipe)
    assert trainer.train(recipe, resume=True).resumed_from == 4


def full_disk_in_torch_save(patch: pytest.MonkeyPatch) -> None:
    original = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(value, path, *args, **kwargs)
        if "checkpoint-8" in str(path):
            os.truncate(path, 10)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    patch.setattr(torch, "save", save)


def full_disk_in_flush(patch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if "checkpoint-8" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    patch.setattr(os, "fsync", fsync)


def full_disk_in_safetensors(patch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    from calm import checkpoint

    original = checkpoint.save_torch_state_dict

    def save(weights: Any, folder: Any, **kwargs: Any) -> None:
        original(weights, folder, **kwargs)
        if "checkpoint-8" in str(folder):
            os.truncate(Path(folder, "model.safetensors"), 10)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    patch.setattr(checkpoint, "save_torch_state_dict", save)


@pytest.mark.parametrize("fill", [full_disk_in_torch_save, full_disk_in_flush, full_disk_in_safetensors])
def test_disk_that_fills_while_saving_leaves_the_last_good_checkpoint(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
):
    recipe = make_recipe(evaluates=False)
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(
            CalmError, match=r"step 8 could not be written.*No space left.*checkpoint-4 is whole.*--resume"
        ):
            trainer.train(recipe)
    assert checkpoints(recipe) == ["checkpoint-4"]
    calm.CalmForCausalLM.from_pretrained(Path(recipe.training.output_dir, "checkpoint-4"))
    assert trainer.train(recipe, resume=True).resumed_from == 4
    assert checkpoints(recipe) == ["checkpoint-12", "checkpoint-8"]


def test_disk_that_is_really_full_leaves_the_last_good_checkpoint(make_recipe: MakeRecipe, small_disk: Path):
    recipe = make_recipe(evaluates=False, output_dir=str(small_disk / "out"), save_steps=2, keep_checkpoints=9)
    with pytest.raises(CalmError, match=r"could not be written.*is whole and stays"):
        trainer.train(recipe)
    whole = checkpoints(recipe)
    assert whole == ["checkpoint-2", "checkpoint-4"][: len(whole)]
    assert whole
    for name in whole:
        calm.CalmForCausalLM.from_pretrained(Path(recipe.training.output_dir, name))
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert f"checkpoint-{trainer.train(recipe, resume=True).resumed_from}" == whole[-1]


def test_full_disk_at_the_very_end_names_the_checkpoint(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    def write(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "_write_log", write)
    with pytest.raises(CalmError, match=r"training is done and .*checkpoint-12 holds the model, .*No space left"):
        trainer.train(make_recipe(evaluates=False))


def test_what_a_kill_while_saving_leaves_is_not_resumed_from(make_recipe: MakeRecipe, die_at: DieAt):
    recipe = make_recipe(evaluates=False)
    with die_at(6), pytest.raises(Killed):
        trainer.train(recipe)
    half = Path(recipe.training.output_dir, ".saving-checkpoint-6", "checkpoint-6")
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert trainer.train(recipe, resume=True).resumed_from == 4
    assert checkpoints(recipe) == ["checkpoint-12", "checkpoint-8"], "the staging directory is gone, too"
    assert weights(Path(recipe.training.output_dir, "checkpoint-8"))


@pytest.mark.parametrize("doomed", ["checkpoint-4", "recipe.json"])
def test_a_kill_while_deleting_or_beginning_leaves_nothing_half(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, die_at: DieAt, doomed: str
):
    """An old checkpoint that is being deleted is no checkpoint any more; a recipe is written as a whole."""
    recipe = make_recipe(evaluates=False)
    out = Path(recipe.training.output_dir)
    rmtree, write_text = shutil.rmtree, Path.write_text

    def delete(path: Any, **kwargs: Any) -> None:
        if Path(path).name.endswith(doomed) and not Path(path).name.startswith(".saving-"):
            next(Path(path).iterdir()).unlink()
            raise Killed
        rmtree(path, **kwargs)

    def write(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if path.name.endswith(doomed) and checkpoints(recipe):
            write_text(path, text[: len(text) // 2])
            raise Killed
        return write_text(path, text, *args, **kwargs)

    with die_at(10), pytest.raises(Killed):
        trainer.train(recipe)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", delete)
        patch.setattr(Path, "write_text", write)
        trainer.train(recipe, resume=True)
    visible = [set(path.iterdir()) for path in out.glob("checkpoint-*")]
    assert len(visible) >= 2 and {len(files) for files in visible} == {len(visible[0])}, "all have all their files"
    json.loads((out / "recipe.json").read_text())
    trainer.train(recipe, resume=True)
    assert checkpoints(recipe) == ["checkpoint-12", "checkpoint-8"]


def damaged_by(content: Any) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        if content is None:
            (checkpoint / "optimizer.pt").unlink()
        elif isinstance(content, bytes):
            (checkpoint / "optimizer.pt").write_bytes(content)
        else:
            torch.save(content(torch.load(checkpoint / "optimizer.pt")), checkpoint / "optimizer.pt")

    return damage


def narrower(state: dict[str, Any]) -> dict[str, Any]:
    state["state"][3] |= {name: value[:, :5] for name, value in state["state"][3].items() if value.dim()}
    return state


def of_fewer_weights(state: dict[str, Any]) -> dict[str, Any]:
    state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (narrower, r"'exp_avg' has shape \(32, 5\) for a weight of shape \(32, 32\): .*of another composition"),
        (of_fewer_weights, "it cannot be read: loaded state dict contains a parameter group that doesn't match"),
        (b"PK half of a file", "it cannot be read: "),
        (None, "it is not there"),
    ],
)
def test_an_optimiser_state_that_does_not_fit_is_refused(
    make_recipe: MakeRecipe, die_at: DieAt, content: Any, reason: str
):
    recipe = make_recipe(evaluates=False)
    with die_at(10), pytest.raises(Killed):
        trainer.train(recipe)
    last = Path(recipe.training.output_dir, "checkpoint-8")
    damaged_by(content)(last)
    with pytest.raises(CalmError, match=rf"(?s)optimiser state in .*checkpoint-8 cannot be used: {reason}.*take that"):
        trainer.train(recipe, resume=True)
    shutil.rmtree(last)
    assert trainer.train(recipe, resume=True).resumed_from == 4


def test_other_batches_are_only_reported_if_a_step_has_other_examples(
    make_recipe: MakeRecipe, die_at: DieAt, caplog: pytest.LogCaptureFixture
):
    with die_at(6), pytest.raises(Killed):
        trainer.train(make_recipe(evaluates=False))
    same, other = {"per_device_batch_size": 4, "gradient_accumulation": 1}, {"gradient_accumulation": 3}
    with die_at(10), pytest.raises(Killed):
        trainer.train(make_recipe(evaluates=False, **same), resume=True)
    assert "the recipe has changed" not in caplog.text
    trainer.train(make_recipe(evaluates=False, **other), resume=True)
    assert "training.gradient_accumulation: 1 -> 3" in caplog.text
    assert "examples of an optimiser step: 4 -> 6 (" in caplog.text
    last = Path(make_recipe().training.output_dir, "checkpoint-12")
    for process in (0, 1):  # as two processes leave it
        shutil.copy(last / "rng_state.pth", last / f"rng_state_{process}.pth")
    trainer.train(make_recipe(evaluates=False, **other), resume=True)
    assert "examples of an optimiser step: 12 -> 6 (" in caplog.text


def test_loss_that_is_not_a_number_stops_the_run(make_recipe: MakeRecipe):
    recipe = make_recipe(learning_rate=1e38, warmup=0, max_grad_norm=1e30)
    with pytest.raises(CalmError, match=r"not a number at step 2 .*norm is nan.*lower training.learning_rate"):
        trainer.train(recipe)
    assert not Path(recipe.training.output_dir, "model.safetensors").exists()


def test_gradient_that_is_not_a_number_stops_before_it_reaches_the_weights(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(CalmError, match="not a number at step 1 "):
        trainer.train(make_recipe())


def test_two_runs_are_not_mixed_in_one_directory(make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture):
    with pytest.raises(CalmError, match="no checkpoint to resume from"):
        trainer.train(make_recipe(), resume=True)
    first = trainer.train(make_recipe(max_steps=4))
    with pytest.raises(CalmError, match=r"already holds a run's checkpoints \(the last is checkpoint-4\)"):
        trainer.train(make_recipe(max_steps=4))
    with pytest.raises(CalmError, match=r"trained with another connections \(connections: 2 -> 1\)"):
        trainer.train(make_recipe(max_steps=4, top={"connections": 1}), resume=True)
    assert trainer.train(make_recipe(max_steps=4), resume=True) == first
    assert "this run is finished" in caplog.text
    assert "the recipe has changed" not in caplog.text
    longer = make_recipe(max_steps=8, eval_steps=1)
    assert trainer.train(longer, resume=True).steps == 8
    assert "training.max_steps: 4 -> 8" in caplog.text
    assert list(losses(longer)["eval_loss"]) == [2, 4, 5, 6, 7, 8], "what the recipe says now holds from now on"


def test_run_that_was_killed_between_its_last_step_and_its_end_is_only_ended(make_recipe: MakeRecipe):
    recipe = make_recipe(max_steps=4)
    first = trainer.train(recipe)
    out = Path(recipe.training.output_dir)
    final = weights(out)
    (out / "training_log.json").unlink()
    (out / "model.safetensors").unlink()
    again = trainer.train(recipe, resume=True)
    assert (again.steps, again.best_step, again.eval_loss) == (4, first.best_step, first.eval_loss)
    assert all(torch.equal(w, final[k]) for k, w in weights(out).items())


def test_a_run_is_resumed_with_the_models_where_the_recipe_says_they_are(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    tiny_bases: dict[str, str],
    whole: Recipe,
    die_at: DieAt,
    caplog: pytest.LogCaptureFixture,
):
    bases = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in tiny_bases.items()}
    with die_at(7), pytest.raises(Killed):
        trainer.train(make_recipe(top=bases))
    moved = {name: str(shutil.move(folder, tmp_path / f"{name}-moved")) for name, folder in bases.items()}
    with pytest.raises(CalmError, match=r"another augmenting \(augmenting: '.*' -> \{'other'"):
        trainer.train(make_recipe(top=moved | {"augmenting": {"other": moved["augmenting"]}}), resume=True)
    recipe = make_recipe(top=moved)
    assert trainer.train(recipe, resume=True).resumed_from == 6
    assert losses(recipe) == losses(whole)
    assert f"anchor: '{bases['anchor']}' -> '{moved['anchor']}'" in caplog.text
    assert "they have to be the same ones" in caplog.text and "will not be what" not in caplog.text
    saved = json.loads(Path(recipe.training.output_dir, "config.json").read_text())
    assert saved["anchor_reference"]["name_or_path"] == moved["anchor"]
    assert saved["augmenting_references"]["augmenting"]["name_or_path"] == moved["augmenting"]

    other = make_recipe(top=moved | {"anchor": str(save_base(tmp_path / "other", byte_tokenizer(), seed=7))})
    with pytest.raises(CalmError, match="not those that this composition was trained against"):
        trainer.train(other, resume=True)


def test_a_model_that_a_recipe_no_longer_names_is_noticed(make_recipe: MakeRecipe, tiny_bases: dict[str, str]):
    two = {"one": tiny_bases["augmenting"], "two": tiny_bases["augmenting"]}
    trainer.train(make_recipe(top={"augmenting": two}, max_steps=2))
    del two["two"]
    with pytest.raises(CalmError, match=r"another augmenting\.two \(augmenting\.two: '.*' -> None\)"):
        trainer.train(make_recipe(top={"augmenting": two}, max_steps=4), resume=True)


def test_a_base_that_changed_since_is_not_resumed_with(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_bases: dict[str, str]
):
    anchor = shutil.copytree(tiny_bases["anchor"], tmp_path / "anchor")
    recipe = make_recipe(top={"anchor": str(anchor)}, max_steps=4)
    trainer.train(recipe)
    save_base(anchor, byte_tokenizer(), seed=7)
    with pytest.raises(CalmError, match="not those that this composition was trained against"):
        trainer.train(make_recipe(top={"anchor": str(anchor)}, max_steps=6), resume=True)


def test_examples_longer_than_the_smaller_context_are_dropped(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The bases' context is 64 tokens, max_length 1024 by default."""
    rows = [*sums(8), {"prompt": "x" * 70, "completion": "y"}]
    data = {"train": str(write_jsonl(tmp_path / "long.jsonl", rows))}
    result = trainer.train(make_recipe(top={"data": data}, evaluates=False, max_steps=3))
    assert result.train_examples == 8
    assert "dropped 1 of 9 examples, longer than max_length = 64" in caplog.text


def packed_data(tmp_path: Path, **kwargs: Any) -> dict[str, Any]:
    return {"train": str(write_jsonl(tmp_path / "train.jsonl", sums(22))), "packing": True, **kwargs}


def test_packed_and_unpacked_training_are_the_same(make_recipe: MakeRecipe, tmp_path: Path):
    """One step over all examples: the same loss, gradient and weights, whatever rows they lie in."""
    bases = {
        role: str(save_base(tmp_path / role, byte_tokenizer(), seed=seed, attention_dropout=0.0))
        for seed, role in enumerate(("anchor", "augmenting"))
    }
    found = []
    for name, packing in (("packed", True), ("apart", False)):
        recipe = make_recipe(
            name,
            top={"data": packed_data(tmp_path, packing=packing), **bases},
            evaluates=False,
            **{"max_steps": 1, "per_device_batch_size": 22, "gradient_accumulation": 1, "save_steps": 1},
        )
        result = trainer.train(recipe)
        assert result.train_examples == 22
        log = next(log for log in log_of(recipe)["history"] if "loss" in log)
        found.append((log["loss"], log["grad_norm"], weights(recipe.training.output_dir)))
    (loss, norm, trained), (loss_apart, norm_apart, trained_apart) = found
    assert loss == pytest.approx(loss_apart, rel=1e-5) and norm == pytest.approx(norm_apart, rel=1e-4)
    for name in trained:
        torch.testing.assert_close(trained[name], trained_apart[name], rtol=1e-3, atol=1e-4)


def test_packed_rows_hold_every_example_once_and_none_is_cut(tmp_path: Path):
    rows = load_examples(write_jsonl(tmp_path / "x.jsonl", sums(50)), byte_tokenizer(), max_length=64)
    packs = pack(rows, 64)
    assert len(packs) < 25 and all(len(p["input_ids"]) <= 64 for p in packs)
    documents = []
    for packed in packs:
        starts = [*np.flatnonzero(packed["position_ids"] == 0), len(packed["input_ids"])]
        for start, end in itertools.pairwise(starts):
            assert packed["position_ids"][start:end].tolist() == list(range(end - start))
            assert packed["labels"][start] == -100, "an example would be predicted from the one before it"
            documents.append((packed["input_ids"][start:end].tolist(), packed["labels"][start:end].tolist()))
    expected = [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]
    assert sorted(documents) == sorted(expected)


def test_resumed_packed_run_is_the_uninterrupted_one(make_recipe: MakeRecipe, tmp_path: Path, die_at: DieAt):
    settings = {"top": {"data": packed_data(tmp_path)}, "evaluates": False}
    trainer.train(make_recipe("whole", **settings))
    with die_at(7), pytest.raises(Killed):
        trainer.train(make_recipe("killed", **settings))
    trainer.train(make_recipe("killed", **settings), resume=True)
    assert losses(make_recipe("killed", **settings)) == losses(make_recipe("whole", **settings))


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
def test_bases_that_cannot_be_packed_are_refused(make_recipe: MakeRecipe, tmp_path: Path, role: str):
    """BLOOM knows no positions to restart."""
    config = BloomConfig(vocab_size=len(byte_tokenizer()), hidden_size=32, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    recipe = make_recipe(top={"data": packed_data(tmp_path), role: str(tmp_path / "bloom")}, evaluates=False)
    with pytest.raises(CalmError, match=r"packing = True.*'bloom'.*packing: false"):
        trainer.train(recipe)


def test_steps_are_drawn_at_random_and_their_batches_hold_examples_of_about_equal_length():
    lengths = [n % 40 + 3 for n in range(1003)]
    sampler = SortedSteps(lengths, 32, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(1003)) and order == list(sampler)

    def padded(order: Iterable[int]) -> int:
        indices = list(order)
        return sum(8 * max(lengths[i] for i in indices[at : at + 8]) for at in range(0, len(indices), 8))

    assert padded(order) < 1.3 * sum(lengths)
    assert padded(RandomSampler(lengths, generator=torch.Generator().manual_seed(0))) > 1.6 * sum(lengths)
    means = [np.mean([lengths[i] for i in order[at : at + 32]]) for at in range(0, 992, 32)]
    assert np.std(means) < 1.5 * np.std(lengths) / 32**0.5  # were they equally long: np.std(lengths)
    sampler.set_epoch(1)
    assert list(sampler) != order


@given(st.lists(st.integers(2, 50), min_size=1, max_size=100), st.integers(1, 40))
def test_every_example_comes_once_an_epoch_and_a_longest_one_first(lengths: list[int], step_size: int):
    order = list(SortedSteps(lengths, step_size, seed=0))
    assert sorted(order) == list(range(len(lengths)))
    assert lengths[order[0]] == max(lengths)


def test_statistics_say_which_connections_are_used(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    """All add nothing at first; one whose gradients are taken away never does."""
    original = trainer.CompositionTrainer.training_step
    gates: dict[int, float] = {}
    states: list[torch.Tensor] = []

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        first, second = model.connections
        handle = first.register_forward_hook(lambda module, args, output: states.append(args[0].detach().double()))
        loss = original(self, model, *args, **kwargs)
        handle.remove()
        for weight in second.parameters():
            weight.grad = None
        normed = torch.nn.functional.rms_norm(states[-1], states[-1].shape[-1:])
        opened = first.gate.bias * states[-1].shape[-1] / 8 + normed @ first.gate.weight[0].double()
        gates[self.state.global_step + 1] = opened.mean().item()
        return loss

    monkeypatch.setattr(trainer.CompositionTrainer, "training_step", training_step)
    recipe = make_recipe()
    trainer.train(recipe)
    logs = [log for log in log_of(recipe)["history"] if "loss" in log]
    assert len(logs) == 12
    assert logs[0]["connection_0/injection"] == logs[-1]["connection_1/injection"] == 0
    assert logs[-1]["connection_0/injection"] > 0.01
    assert [log["connection_0/gate"] for log in logs] == pytest.approx([gates[log["step"]] for log in logs])
    assert abs(logs[-1]["connection_0/gate"]) > 0.01 and logs[-1]["connection_1/gate"] == 0
    assert logs[-1]["connection_0/gradient"] > 0 and logs[-1]["connection_1/gradient"] == 0
    assert all(0 < log[f"connection_{i}/entropy"] < np.log(64) for log in logs for i in (0, 1))
    assert (Path(recipe.training.output_dir) / "connections.png").stat().st_size > 1000


def test_a_logger_that_is_not_there_is_refused_at_once(make_recipe: MakeRecipe):
    with pytest.raises(CalmError, match=r"training.report_to = 'nonsense': not installed"):
        trainer.train(make_recipe(report_to=["nonsense"]))


def test_activation_checkpointing_trains_the_same(make_recipe: MakeRecipe, whole: Recipe):
    recipe = make_recipe(activation_checkpointing=True)
    trainer.train(recipe)
    for key, expected in losses(whole).items():
        assert losses(recipe)[key] == pytest.approx(expected, rel=1e-4), key


def test_activation_checkpointing_that_transformers_gets_wrong_is_refused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    """Before its TrainingArguments are made, which do not know the word either."""

    def of_that_version(**kwargs: Any) -> None:
        raise TypeError(f"unexpected keyword arguments {list(kwargs)}")

    monkeypatch.setattr(transformers, "__version__", "5.22.1")
    monkeypatch.setattr(trainer, "TrainingArguments", of_that_version)
    with pytest.raises(CalmError, match=r"Activation checkpointing.* needs transformers 5.23 or later, found 5.22.1"):
        trainer.train(make_recipe(activation_checkpointing=True))


@pytest.mark.parametrize("settings", [{"top": {"dtype": "bfloat16"}}, {"bf16": True}])
def test_bfloat16(make_recipe: MakeRecipe, settings: dict[str, Any]):
    recipe = make_recipe(max_steps=20, eval_steps=10, save_steps=20, **settings)
    trainer.train(recipe)
    evaluated = losses(recipe)["eval_loss"]
    assert evaluated[20] < evaluated[10] - 0.02
    # the frozen models may be in bfloat16; what is trained and saved never is
    assert {w.dtype for w in weights(recipe.training.output_dir).values()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_bases(make_recipe: MakeRecipe, die_at: DieAt, quantization: str):
    """The loss falls also after evaluations, a resumed run is the same, and what was trained is found again."""
    settings = {"top": {"quantization": quantization}, "max_steps": 20, "eval_steps": 4}
    whole, halves = make_recipe("whole", **settings), make_recipe("halves", **settings)
    trainer.train(whole)
    evaluated = losses(whole)["eval_loss"]
    assert evaluated[20] < evaluated[8] < evaluated[4]
    with die_at(6), pytest.raises(Killed):
        trainer.train(halves)
    trainer.train(halves, resume=True)
    assert losses(halves) == losses(whole)
    assert {w.dtype for w in weights(whole.training.output_dir).values()} == {torch.float32}
    model = calm.CalmForCausalLM.from_pretrained(whole.training.output_dir, dtype="auto")
    names = {type(weight).__name__ for weight in (*model.anchor.parameters(), *model.augmenting.parameters())}
    assert names == {"Parameter", {"int8": "Int8Tensor", "nf4": "Params4bit"}[quantization]}
    with pytest.raises(CalmError, match=r"trained with another quantization \(quantization: '\w+' -> None\)"):
        trainer.train(make_recipe("whole", max_steps=30), resume=True)


def test_a_missing_quantization_library_is_named_at_once(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("calm.training.quantization.is_torchao_available", lambda: False)
    with pytest.raises(CalmError, match=r"quantization = 'int8' needs torchao.*pip install 'calm-lm\[quantization\]'"):
        trainer.train(make_recipe(top={"quantization": "int8"}))
