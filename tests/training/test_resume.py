"""Exact resume, from whole checkpoints only, with the models and the recipe that it was begun with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import byte_tokenizer, save_base
from runs import DieAt, Killed, MakeRecipe, checkpoints, losses, weights

from calm.errors import CalmError
from calm.training import Recipe, trainer


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


def test_data_that_changed_under_its_name_is_told(make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture):
    recipe = make_recipe(max_steps=2)
    trainer.train(recipe)
    longer = make_recipe(max_steps=4)
    train = Path(longer.data.train)
    lines = train.read_text().splitlines(keepends=True)
    train.write_text("".join(lines[1:]))
    trainer.train(longer, resume=True)
    assert f"data.train: {train} holds something else" in caplog.text
    assert "data.eval" not in caplog.text
    caplog.clear()
    begun_with = Path(longer.training.output_dir, "recipe.json")
    fields = json.loads(begun_with.read_text())
    assert set(fields.pop("data_digests")) == {"data.train", "data.eval"}
    begun_with.write_text(json.dumps(fields))  # as an older version has left it
    trainer.train(make_recipe(max_steps=6), resume=True)
    assert "holds something else" not in caplog.text and "training.max_steps: 4 -> 6" in caplog.text


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
