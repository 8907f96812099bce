"""Small training runs for the tests: their recipes, what they log and leave, and their end in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from bases import sums, write_jsonl
from safetensors.torch import load_file

from calm.training import Recipe
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
