"""`calm train`: trains a composition from a recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from calm.cli.arguments import stdout_for


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a composition from a recipe. Ctrl-C saves a checkpoint first; --resume goes on exactly where it was."""
    from calm.training.recipe import load_recipe

    checked = load_recipe(recipe)
    from calm.training.trainer import TrainingInterrupted
    from calm.training.trainer import train as run

    try:
        with stdout_for(as_json):
            result = run(checked, resume=resume)
    except TrainingInterrupted as interruption:
        raise TrainingInterrupted(f"{interruption}; go on with: calm train {recipe} --resume") from interruption
    from torch import distributed

    tells = True
    if distributed.is_initialized():
        tells = distributed.get_rank() == 0
        distributed.destroy_process_group()  # left open, it may abort the process while Python ends
    if not tells:
        return
    if as_json:
        print(json.dumps(asdict(result)))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    ended = "stopped early" if result.stopped_early else "done"
    console.print(
        f"{ended} after {result.steps} steps, {result.seconds:.0f} s; the model of step {result.best_step} is in"
    )
    console.print(f"  {result.output_dir}  (training loss {result.train_loss:.4f}", end="")
    console.print(")" if result.eval_loss is None else f", evaluation loss {result.eval_loss:.4f})")
    console.print(f"try it: calm chat {result.output_dir}")
