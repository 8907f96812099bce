"""`calm inspect`: what a saved composition holds; reads its files only, loads no base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from calm.errors import CalmError


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a composition.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a saved composition holds: its bases, connections, parameters, and how it was trained."""
    from safetensors import SafetensorError, safe_open

    from calm.checkpoint import describe_reference, read_config

    config = read_config(path)
    parameters = 0
    try:
        for file in sorted(path.glob("model*.safetensors")):
            with safe_open(file, framework="np") as weights:
                shapes = (weights.get_slice(key).get_shape() for key in weights.keys())  # noqa: SIM118
                for shape in shapes:
                    size = 1
                    for length in shape:
                        size *= length
                    parameters += size
    except SafetensorError as error:
        raise CalmError(f"{file} is truncated or corrupted: {error}") from error
