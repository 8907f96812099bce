"""`calm demo`: two small models that each fail a task solve it together (the paper's key-value experiment)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calm.cli.arguments import MOST_SEED


def demo(
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of data, models and training.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the models, results.json and the plot.")] = Path("runs/demo"),
) -> None:
    """Train two small models that each fail a task, compose them, and see them solve it (minutes on two CPU cores)."""
    from calm.experiments.key_value_arithmetic.run import main

    main(preset="demo", seed=seed, output_dir=out)
