"""`calm inspect`: what a saved composition holds, from its files alone; with a prompt, what its connections do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from calm.cli import loading
from calm.cli.arguments import Dtype, stdout_for
from calm.errors import CalmError


def inspect(
    model: loading.Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Look at what each connection does with this text; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="With --prompt: most tokens to produce.")] = 16,
    output: Annotated[
        Path | None, typer.Option(help="With --prompt: folder of the pages and pictures; by default runs/inspect.")
    ] = None,
    anchor: loading.Anchor = None,
    augmenting: loading.Augmenting = None,
    dtype: Dtype = "auto",
    device: loading.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a composition holds and how it was trained; with --prompt, which connections are used, and for what.

    Without --prompt its files alone are read. With it, the prompt is continued greedily, and a page and pictures show
    where each connection looks and what the next tokens would be without it.
    """
    if prompt is None:
        if output is not None:
            raise typer.BadParameter("--output is for what --prompt writes: give a --prompt, or leave it out")
        _show_files(model, as_json)
        return
    from calm.inspection import report

    output = output or Path("runs/inspect")
    report.check(prompt, output)
    with stdout_for(as_json):
        composed, tokenizer = loading.load(model, anchor, augmenting, dtype, device)
        reports = report.write(composed, tokenizer, prompt, max_new_tokens, output)
    if as_json:
        print(json.dumps(reports))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    for one in reports:
        table = Table("connection", "adds", "entropy", "moves when off", "KL", box=None, padding=(0, 2, 0, 0))
        for row in one["connections"]:
            reach = ("", "") if row["injection"] is None else (f"{row['injection']:.2f}", f"{row['entropy']:.2f} nats")
            table.add_row(row["name"], *reach, f"{100 * row['moved']:.0f}%", f"{row['kl']:.2f} nats")
        console.print(f"{one['prompt']}{one['completion']}", style="bold")
        console.print(table)
        console.print(f"{one['page']} shows the rest.\n", soft_wrap=True)


def _show_files(model: str, as_json: bool) -> None:
    from calm.checkpoint import describe_reference, read_config

    config = read_config(model)
    log = Path(model, "training_log.json")
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
        "composition_parameters": _count_parameters(model),
        "training": _read_result(log) if log.exists() else None,
    }
    if as_json:
        print(json.dumps(summary))
        return
    table = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.columns[1].overflow = "fold"  # a path that is cut off is none
    table.add_row("anchor", summary["anchor"].replace("`", ""))
    for name, reference in summary["augmenting"].items():
        table.add_row(name, reference.replace("`", ""))
    for pair in config.layer_pairs:
        table.add_row("connection", f"{pair.augmenting} layer {pair.augmenting_layer} -> layer {pair.anchor_layer}")
    table.add_row("attention", f"{config.attention}, {config.num_heads} heads, attend {config.attend}")
    table.add_row("composition parameters", f"{summary['composition_parameters']:,}")
    for field, value in (summary["training"] or {}).items():
        table.add_row(f"training: {field.replace('_', ' ')}", str(value))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _read_result(log: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(log.read_text())["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalmError(f"{log} is no log of a training, or a damaged one: {error!r}") from error


def _count_parameters(model: str) -> int:
    from safetensors import SafetensorError, safe_open

    from calm.checkpoint import weight_files

    count = 0
    for file in weight_files(model):
        try:
            with safe_open(file, framework="np") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise CalmError(f"{file} is truncated or corrupted: {error}") from error
    return count
