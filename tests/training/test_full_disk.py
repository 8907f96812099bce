"""A disk that is full: the last whole checkpoint stays, and the error says so."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MakeRecipe, checkpoints

import calm
from calm.errors import CalmError
from calm.training import trainer


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
