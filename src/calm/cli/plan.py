"""`calm plan`: what a composition will cost, before any weight is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from calm.cli.arguments import parse_augmenting, parse_connections


def plan(
    anchor: Annotated[str, typer.Argument(help="Name or path of the anchor model.")],
    augmenting: Annotated[list[str], typer.Argument(help="Augmenting model, or several as NAME=PATH.")],
    connections: Annotated[str, typer.Option(help="A number, or pairs such as 7:11,15:23.")] = "4",
    num_heads: Annotated[int | None, typer.Option(help="Attention heads (as many as the anchor's).")] = None,
    attention: Annotated[str, typer.Option(help="normalized or paper.")] = "normalized",
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a composition will cost: parameters, memory and FLOPs. Reads configurations, no weights."""
    models, pairs = parse_augmenting(augmenting), parse_connections(connections)
    from calm.planning import plan as plan_composition

    planned = plan_composition(
        anchor,
        models,
        connections=pairs,
        num_heads=num_heads,
        attention=attention,
        sequence_length=sequence_length,
        batch_size=batch_size,
        dtype=dtype,
    )
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        Console().print(planned)
