"""Kept outputs of augmenting models: the same training as with models that run, which then need not even be loaded."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bases import byte_tokenizer, save_base, sums, write_jsonl
from safetensors.torch import load_file, save_file

import calm
from calm import sources
from calm.data import CompletionCollator, load_examples
from calm.errors import CalmError
from calm.training import Recipe, augmenting_outputs, trainer
from calm.training.recipe import check_recipe


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, str]:
    """Without dropout, whose random numbers would hide small differences."""
    return {
        role: str(save_base(tmp_path / role, byte_tokenizer(), seed=seed, width=width, attention_dropout=0.0))
        for seed, (role, width) in enumerate((("anchor", 32), ("augmenting", 24)))
    }


def recipe_in(folder: Path, bases: dict[str, Any], out: str, **data: Any) -> Recipe:
    """Eight steps of 3 examples over 10, evaluated twice."""
    data = {
        "train": str(write_jsonl(folder / "train.jsonl", sums(10))),
        "eval": str(write_jsonl(folder / "eval.jsonl", sums(4, seed=1))),
        **data,
    }
    training = {"output_dir": str(folder / out), "max_steps": 8, "per_device_batch_size": 3, "learning_rate": 1e-2}
    return check_recipe({**bases, "connections": 2, "data": data, "training": training | {"log_steps": 1} | STEPS})


STEPS = {"eval_steps": 4, "save_steps": 4}


def losses(recipe: Recipe) -> list[float]:
    history = json.loads(Path(recipe.training.output_dir, "training_log.json").read_text())["history"]
    return [log[key] for log in history for key in ("loss", "eval_loss") if key in log]


def no_augmenting_model(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an augmenting model was loaded")

    patch.setattr(sources, "load_augmenting", refuse)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_losses_are_those_of_models_that_run(
    tmp_path: Path, bases: dict[str, str], where: str, packing: bool
) -> None:
    length = {"packing": packing, "max_length": 24}
    run = recipe_in(tmp_path, bases, "run", **length)
    kept = recipe_in(tmp_path, bases, "kept", augmenting_outputs=where, **length)
    trainer.train(run)
    trainer.train(kept)
    assert losses(kept) == pytest.approx(losses(run), rel=1e-5)
    first, second = (load_file(Path(r.training.output_dir, "model.safetensors")) for r in (run, kept))
    for key, weight in first.items():
        torch.testing.assert_close(second[key], weight, rtol=1e-3, atol=1e-5)


def test_the_comparison_would_notice_outputs_that_are_off_by_a_token(
    tmp_path: Path, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control, with the tolerance of the comparison."""
    kept, wrong = (recipe_in(tmp_path, bases, out, augmenting_outputs="memory") for out in ("kept", "wrong"))
    trainer.train(kept)
    of_row = augmenting_outputs.KeptOutputs.of_row
    monkeypatch.setattr(
        augmenting_outputs.KeptOutputs,
        "of_row",
        lambda self, index: {key: output.roll(1, 0) for key, output in of_row(self, index).items()},
    )
    trainer.train(wrong)
    assert losses(wrong) != pytest.approx(losses(kept), rel=1e-5)


def test_a_later_run_does_not_load_the_augmenting_model(
    tmp_path: Path, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"augmenting_outputs": "disk", "augmenting_outputs_dir": str(tmp_path / "kept")}
    first, second = (recipe_in(tmp_path, bases, name, **common) for name in ("first", "second"))
    trainer.train(first)
    with monkeypatch.context() as patch:
        no_augmenting_model(patch)
        trainer.train(second)
        assert losses(second) == losses(first)
        shutil.rmtree(Path(second.training.output_dir, "checkpoint-8"))
        Path(second.training.output_dir, "training_log.json").unlink()
        assert trainer.train(second, resume=True).resumed_from == 4
        assert losses(second) == losses(first)
    configs = [json.loads(Path(r.training.output_dir, "config.json").read_text()) for r in (first, second)]
    assert configs[0]["augmenting_references"]["augmenting"]["fingerprint"]
    assert configs[0]["augmenting_references"] == configs[1]["augmenting_references"]

    moved = Path(shutil.copytree(bases["augmenting"], tmp_path / "moved"))
    with monkeypatch.context() as patch:
        no_augmenting_model(patch)
        third = recipe_in(tmp_path, bases | {"augmenting": str(moved)}, "moved_out", **common)
        trainer.train(third)
    reference = json.loads(Path(third.training.output_dir, "config.json").read_text())["augmenting_references"]
    assert reference["augmenting"]["name_or_path"] == str(moved), "where it is now, not where it was"
    assert reference["augmenting"]["fingerprint"] == configs[0]["augmenting_references"]["augmenting"]["fingerprint"]

    # another augmenting model, other layers or other data are not taken for what was kept
    weights = load_file(Path(bases["augmenting"], "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] += 1e-3
    save_file(weights, Path(bases["augmenting"], "model.safetensors"), {"format": "pt"})
    with monkeypatch.context() as patch:
        no_augmenting_model(patch)
        with pytest.raises(AssertionError, match="an augmenting model was loaded"):
            trainer.train(recipe_in(tmp_path, bases, "third", **common))


def test_outputs_of_another_model_are_not_resumed_with(tmp_path: Path, bases: dict[str, str]) -> None:
    """Kept by another run, they spare loading the model, whose weights have to be the right ones nevertheless."""
    common = {"augmenting_outputs": "disk", "augmenting_outputs_dir": str(tmp_path / "kept")}
    other = bases | {"augmenting": str(save_base(tmp_path / "other", byte_tokenizer(), seed=5, width=24))}
    for models, out in ((bases, "first"), (other, "second")):
        trainer.train(recipe_in(tmp_path, models, out, **common))
    with pytest.raises(CalmError, match=r"augmenting: '.*other' holds other weights.*checkpoint-8 was trained against"):
        trainer.train(recipe_in(tmp_path, other, "first", **common), resume=True)


def test_what_is_kept_is_named_by_everything_that_it_depends_on(bases: dict[str, str]) -> None:
    rows = [{"input_ids": torch.arange(4).numpy()}, {"input_ids": torch.arange(3).numpy()}]
    shifted = [{"input_ids": torch.arange(3).numpy()}, {"input_ids": torch.arange(4).numpy()}]
    augmenting, other = {"augmenting": bases["augmenting"]}, {"augmenting": bases["anchor"]}
    keys = [
        augmenting_outputs.key_of(models, {"augmenting": layers}, data, precision)
        for models, layers, data, precision in (
            (augmenting, [1], rows, "float32"),
            (other, [1], rows, "float32"),
            (augmenting, [0, 1], rows, "float32"),
            (augmenting, [1], shifted, "float32"),
            (augmenting, [1], rows, "bfloat16"),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == augmenting_outputs.key_of(augmenting, {"augmenting": [1]}, rows, "float32")
    config = Path(bases["augmenting"], "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    assert keys[0] != augmenting_outputs.key_of(augmenting, {"augmenting": [1]}, rows, "float32")


def test_a_directory_that_is_cut_off_is_refused(tmp_path: Path, bases: dict[str, str]) -> None:
    common = {"augmenting_outputs": "disk", "augmenting_outputs_dir": str(tmp_path / "kept")}
    trainer.train(recipe_in(tmp_path, bases, "first", **common))
    for file in (tmp_path / "kept").glob("*/outputs.bin"):
        with file.open("r+b") as opened:
            opened.truncate(100)
    with pytest.raises(CalmError, match=r"outputs.bin has 100 bytes, expected .*: it is damaged; delete"):
        trainer.train(recipe_in(tmp_path, bases, "second", **common))


Keep = Callable[..., augmenting_outputs.KeptOutputs]


@pytest.fixture
def keep(tmp_path: Path, bases: dict[str, str]) -> Keep:
    """Keeps the outputs for ten examples, two at a time."""
    tokenizer = byte_tokenizer()
    rows = load_examples(write_jsonl(tmp_path / "kept.jsonl", sums(10)), tokenizer, max_length=64)
    model = calm.compose(bases["anchor"], bases["augmenting"], connections=2)
    collator = CompletionCollator.for_tokenizer(tokenizer)
    return partial(augmenting_outputs.keep, model, rows, collator, Accelerator(cpu=True), 2)


def call_at_the_third_batch(patch: pytest.MonkeyPatch, call: Callable[[], None]) -> None:
    original, batches = augmenting_outputs._outputs, []

    def outputs(*args: Any) -> dict[str, torch.Tensor]:
        batches.append(args)
        if len(batches) == 3:
            call()
        return original(*args)

    patch.setattr(augmenting_outputs, "_outputs", outputs)


def test_runs_that_keep_the_same_at_once_leave_one_another_alone(
    tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins and comes half-way while the first is half-way, and ends after it: both have all outputs."""
    expected = keep().states
    path = tmp_path / "shared" / "key"
    half_way, first_is_done = threading.Event(), threading.Event()
    found: dict[str, torch.Tensor] = {}

    def wait() -> None:
        half_way.set()
        assert first_is_done.wait(60)

    def run_second() -> None:
        try:
            found["second"] = keep(path).states
        finally:
            half_way.set()

    second = threading.Thread(target=run_second)

    def start_second() -> None:
        call_at_the_third_batch(monkeypatch, wait)
        second.start()
        assert half_way.wait(60)

    call_at_the_third_batch(monkeypatch, start_second)
    try:
        found["first"] = keep(path).states
    finally:
        first_is_done.set()
        second.join(60)
    assert found.keys() == {"first", "second"}
    assert all(torch.equal(states, expected) for states in found.values())
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]


def test_only_a_killed_run_leaves_a_folder_which_the_next_one_names(
    tmp_path: Path, keep: Keep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not deleted: another computer may be writing it."""
    left = tmp_path / "shared" / ".unfinished-key-of-another-run"
    left.mkdir(parents=True)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at_the_third_batch(patch, interrupt)
        keep(left.with_name("key"))
    assert list(left.parent.iterdir()) == [left]
    keep(left.with_name("key"))
    assert {entry.name for entry in left.parent.iterdir()} == {"key", left.name}
    assert f"delete what killed ones left: {left}" in caplog.text


def test_no_space_left(tmp_path: Path, bases: dict[str, str], small_disk: Path) -> None:
    """A real file system that is too small: an error, nothing half-kept, and other settings still train."""
    (tmp_path / "train.jsonl").touch()
    recipe = recipe_in(tmp_path, bases, "out", augmenting_outputs="disk", augmenting_outputs_dir=str(small_disk))
    write_jsonl(tmp_path / "train.jsonl", sums(500))
    with pytest.raises(CalmError, match=r"augmenting models' outputs, .* bytes, could not be written.*No space left"):
        trainer.train(recipe)
    assert not list(small_disk.iterdir())


def test_a_directory_without_disk_is_refused(tmp_path: Path, bases: dict[str, str]) -> None:
    with pytest.raises(CalmError, match=r"data.augmenting_outputs_dir = 'kept'.*expected augmenting_outputs: disk"):
        recipe_in(tmp_path, bases, "out", augmenting_outputs_dir="kept")
