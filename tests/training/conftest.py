"""Fixtures of the training tests: recipes in the test's own folder, a run to compare with, a run's sudden end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DieAt, Killed, MakeRecipe, recipe_in

from calm.training import Recipe, trainer


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_bases: dict[str, str]) -> MakeRecipe:
    """Makes recipes (see `recipe_in`) in the test's own folder."""
    return partial(recipe_in, tmp_path, tiny_bases)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_bases: dict[str, str]) -> Recipe:
    """A recipe whose run went through without interruption."""
    recipe = recipe_in(tmp_path_factory.mktemp("whole"), tiny_bases)
    trainer.train(recipe)
    return recipe


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
