"""How the command line writes models, connections and dtypes: NAME=PATH, and 4 or 7:11,15:23."""

from __future__ import annotations

import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MOST_SEED = 2**32 - 1
"""What `transformers.set_seed` takes: NumPy's limit."""

Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the bases' weights.")]


def parse_augmenting(models: list[str]) -> str | dict[str, str]:
    """One augmenting model by name or path (which may have a "=", behind what cannot be a name), or NAME=PATH of each.

    Raises:
        typer.BadParameter: If several are given and one has no name, or if a name is given twice.
    """
    if len(models) == 1 and not (models[0].partition("=")[0].isidentifier() and "=" in models[0]):
        return models[0]
    named: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{model!r}: several augmenting models are written NAME=PATH, e.g. code=./coder")
        if name in named:
            raise typer.BadParameter(f"two augmenting models are named {name!r}")
        named[name] = path
    return named


def parse_connections(text: str) -> int | list[tuple[int, int]]:
    """A number of connections, or pairs of an augmenting layer and an anchor layer: "7:11,15:23".

    Raises:
        typer.BadParameter: If it is neither.
    """
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        pairs = (pair.split(":") for pair in text.split(","))
        return [(int(augmenting), int(anchor)) for augmenting, anchor in pairs]
    raise typer.BadParameter(
        f"{text!r}: expected a number, or pairs AUGMENTING_LAYER:ANCHOR_LAYER joined by commas, e.g. 7:11,15:23"
    )


def check_writable(file: Path) -> None:
    """Refuse, before long work, a file that could not be written after it; its folder is made.

    Raises:
        typer.BadParameter: If it is a folder, or if its folder cannot be made or written to.
    """
    if file.is_dir():
        raise typer.BadParameter(f"{str(file)!r} is a folder: name a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{str(file.parent)!r} cannot be made: {error}") from error
    if not os.access(file.parent, os.W_OK):
        raise typer.BadParameter(f"{str(file.parent)!r} cannot be written to")


def stdout_for(as_json: bool) -> AbstractContextManager[Any]:
    """While a command with --json works, everything that it prints goes to standard error."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()
