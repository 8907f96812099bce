"""`calm plan`: what a composition will cost, before any weight is loaded; and how fast this machine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.filesize import decimal, pick_unit_and_suffix
from rich.table import Table

from calm.cli.arguments import parse_augmenting, parse_connections

if TYPE_CHECKING:
    from calm.planning import Plan


def plan(
    anchor: Annotated[str | None, typer.Argument(help="Name or path of the anchor model.")] = None,
    augmenting: Annotated[list[str] | None, typer.Argument(help="Augmenting model, or several as NAME=PATH.")] = None,
    connections: Annotated[str, typer.Option(help="A number, or pairs such as 7:11,15:23.")] = "4",
    num_heads: Annotated[int | None, typer.Option(help="Attention heads (as many as the anchor's).")] = None,
    attention: Annotated[str, typer.Option(help="gated, normalized or paper.")] = "gated",
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    processes: Annotated[int, typer.Option(min=1, help="Processes (GPUs) that train together.")] = 1,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Train with it: less memory, more time.")
    ] = False,
    calibration: Annotated[Path | None, typer.Option(help="Speed of the machine to train on.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Measure this machine first and write that here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a composition will cost: parameters, memory, FLOPs and time. Reads configurations, no weights.

    For the time it needs a calibration: `calm plan --calibrate FILE`, on the machine that will train.
    """
    if calibrate is not None and calibration is not None:
        raise typer.BadParameter("--calibrate measures anew what --calibration reads: give one of them.")
    if anchor is None and calibrate is None:
        raise typer.BadParameter("give an anchor and an augmenting model, or --calibrate FILE.")
    if anchor is not None and not augmenting:
        raise typer.BadParameter("give an augmenting model after the anchor.")
    if calibrate is not None and not calibrate.absolute().parent.is_dir():
        raise typer.BadParameter(f"--calibrate {calibrate}: there is no folder {calibrate.absolute().parent}.")
    models, pairs = parse_augmenting(augmenting or []), parse_connections(connections)
    from calm.calibration import calibrate as measure
    from calm.calibration import load_calibration
    from calm.planning import plan as plan_composition

    machine = load_calibration(calibration) if calibration is not None else None
    if calibrate is not None:
        machine = measure(dtype)
        machine.save(calibrate)
        if anchor is None:
            print(machine.model_dump_json(indent=2) if as_json else f"{machine.hardware} in {dtype}: {calibrate}")
            return
    assert anchor is not None

    planned = plan_composition(
        anchor,
        models,
        connections=pairs,
        num_heads=num_heads,
        attention=attention,
        sequence_length=sequence_length,
        batch_size=batch_size,
        dtype=dtype,
        processes=processes,
        activation_checkpointing=activation_checkpointing,
        calibration=machine,
    )
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
    else:
        Console().print(tables(planned))


def tables(plan: Plan) -> Group:
    """The plan as two tables: its parts, and what they come to."""
    tokens = plan.batch_size * plan.sequence_length
    parts = Table(
        "", "type", "layers", "parameters", "weights", "cache/token", "FLOPs/token", box=None, padding=(0, 1, 0, 0)
    )
    for column in parts.columns[2:]:
        column.justify = "right"
    for name, part in (("anchor", plan.anchor), *plan.augmenting.items(), ("connections", plan.connections)):
        parts.add_row(
            name,
            part.architecture,
            str(part.layers) if part.layers == part.layers_in_full else f"{part.layers} of {part.layers_in_full}",
            f"{part.parameters:,}",
            decimal(part.weight_bytes),
            decimal(part.cache_bytes // tokens),
            _flop(part.forward_flops / tokens),
        )
    batch = f"{plan.batch_size} x {plan.sequence_length} tokens"
    trained = plan.connections.parameters / plan.total_parameters
    totals = Table.grid(padding=(0, 2))
    for row in (
        (
            "connections",
            ", ".join(f"{p.augmenting} {p.augmenting_layer} -> {p.anchor_layer}" for p in plan.layer_pairs),
        ),
        ("attention", f"{plan.attention}, {plan.num_heads} heads"),
        ("trained", f"{plan.connections.parameters:,} of {plan.total_parameters:,} parameters ({trained:.2%})"),
        ("checkpoint", f"{decimal(plan.checkpoint_bytes)} (float32)"),
        (
            "memory to run",
            f"{decimal(plan.inference_bytes)}: weights {decimal(plan.weight_bytes)}, cache "
            f"{decimal(plan.cache_bytes)} ({batch}, {decimal(plan.cache_bytes_per_token)} a token)",
        ),
        (
            "memory to train",
            f"{decimal(plan.training_bytes)} at most: weights {decimal(plan.training_weight_bytes)}, AdamW "
            f"{decimal(plan.optimizer_bytes)}, then activations {decimal(plan.activation_bytes)} with logits or "
            f"gradients ({decimal(plan.gradient_bytes)}) ({batch}"
            f"{', activation checkpointing' if plan.activation_checkpointing else ''})",
        ),
        *(
            [
                (
                    f"each of {plan.processes}",
                    f"{decimal(plan.data_parallel_bytes)} with all weights (data parallel), "
                    f"{decimal(plan.sharded_bytes)} with its share of them (FSDP2)",
                )
            ]
            if plan.processes > 1
            else []
        ),
        ("forward", f"{_flop(plan.forward_flops_per_token)} a token"),
        (
            "training step",
            f"{_flop(plan.training_step_flops)} ({batch})"
            + (f", {plan.training_step_seconds:.3g} s on {plan.hardware}" if plan.hardware else ""),
        ),
    ):
        totals.add_row(*row)
    return Group(parts, totals)


def _flop(flops: float) -> str:
    unit, suffix = pick_unit_and_suffix(int(flops), ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], 1000)
    return f"{flops / unit:,.1f} {suffix}"
