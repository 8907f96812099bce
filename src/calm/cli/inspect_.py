"""`calm inspect`: what a saved composition holds; reads its files only, loads no base."""

from __future__ import annotations

import json
import math
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
    from calm.checkpoint import describe_reference, read_config

    config = read_config(path)
    log = path / "training_log.json"
    summary: dict[str, Any] = {
        "anchor": describe_reference(config.anchor_reference, config.anchor_config.model_type),
        "augmenting": {
            name: describe_reference(config.augmenting_references.get(name, {}), base.model_type)
            for name, base in config.augmenting_configs.items()
        },
        "connections": config.connections,
        "num_heads": config.num_heads,
        "attention": config.attention,
        "attend": config.attend,
        "composition_parameters": _count_parameters(path),
        "training": json.loads(log.read_text())["result"] if log.exists() else None,
    }
    if as_json:
        print(json.dumps(summary))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("anchor", summary["anchor"].replace("`", ""))
    for name, reference in summary["augmenting"].items():
        table.add_row(name, reference.replace("`", ""))
    for pair in config.layer_pairs:
        table.add_row("connection", f"{pair.augmenting} layer {pair.augmenting_layer} -> layer {pair.anchor_layer}")
    table.add_row("attention", f"{config.attention}, {config.num_heads} heads, attend {config.attend}")
    table.add_row("composition parameters", f"{summary['composition_parameters']:,}")
    for field, value in (summary["training"] or {}).items():
        table.add_row(f"training: {field.replace('_', ' ')}", str(value))
    Console(highlight=False).print(table)


def _count_parameters(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in sorted(path.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="np") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise CalmError(f"{file} is truncated or corrupted: {error}") from error
    return count
