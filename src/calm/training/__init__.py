"""Training a composition: a YAML recipe, checked before anything is loaded, and the transformers Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calm.training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from calm.training.trainer import TrainingInterrupted, TrainingResult, train

__all__ = ["Recipe", "TrainingInterrupted", "TrainingResult", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Imports the trainer, and torch with it, only when it is used: checking a recipe needs neither."""
    if name in __all__:
        from calm.training import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
