"""`calm compose`: composes models and saves the untrained composition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from calm.cli.arguments import MOST_SEED, Dtype, parse_augmenting, parse_connections, stdout_for
from calm.errors import CalmError


def compose(
    anchor: Annotated[str, typer.Argument(help="Name, folder or GGUF file of the anchor model.")],
    augmenting: Annotated[list[str], typer.Argument(help="Augmenting model, or several as NAME=PATH.")],
    out: Annotated[Path, typer.Option(help="Directory to save to.")],
    connections: Annotated[str, typer.Option(help="A number, or pairs such as 7:11,15:23.")] = "4",
    num_heads: Annotated[int | None, typer.Option(help="Attention heads (as many as the anchor's).")] = None,
    attention: Annotated[str, typer.Option(help="gated, normalized or paper.")] = "gated",
    attend: Annotated[str, typer.Option(help="causal or prompt.")] = "causal",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the new weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compose an anchor with one or several augmenting models and save the untrained composition."""
    models, pairs = parse_augmenting(augmenting), parse_connections(connections)
    if (out / "config.json").exists():
        raise CalmError(f"--out {out} already holds a model; give another directory")
    from transformers import set_seed

    import calm
    from calm.checkpoint import refuse_other_model
    from calm.data import load_tokenizer
    from calm.sources import Source, load_config

    refuse_other_model(out)  # weights without a configuration, too
    with stdout_for(as_json):
        load_config(Source.parse(anchor))  # where there is no model, that is to be said, not that it has no tokenizer
        tokenizer = load_tokenizer(anchor)
        set_seed(seed)
        model = calm.compose(
            anchor, models, pairs, num_heads=num_heads, attention=attention, attend=attend, dtype=dtype
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    trainable, total = model.get_nb_trainable_parameters()
    layers = [(c["augmenting"], c["augmenting_layer"], c["anchor_layer"]) for c in model.config.connections]
    if as_json:
        print(
            json.dumps(
                {"path": str(out), "connections": layers, "trainable_parameters": trainable, "parameters": total}
            )
        )
        return
    console = Console(soft_wrap=True, markup=False, emoji=False)
    for name, augmenting_layer, anchor_layer in layers:
        console.print(f"{name} layer {augmenting_layer} -> anchor layer {anchor_layer}")
    console.print(f"{trainable:,} composition parameters of {total:,} in all, saved to {out}")
    console.print(
        "It still answers as its anchor does. To have one trained: calm train RECIPE.yaml, which composes by itself"
    )
