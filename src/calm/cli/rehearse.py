"""`calm rehearse`: has the anchor write texts of its own, to be trained on beside the examples."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from calm.cli import loading
from calm.cli.arguments import MOST_SEED, Dtype, stdout_for
from calm.errors import CalmError


def rehearse(
    anchor: Annotated[str, typer.Argument(help="The anchor: a hub name, a folder or a .gguf file.")],
    number: Annotated[int, typer.Option(min=1, help="How many texts.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens of a text; take about the length of an example.")
    ] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the draws, with the batch size.")] = 0,
    dtype: Dtype = "auto",
    device: loading.Device = None,
) -> None:
    """Have the anchor write texts, as lines of a training file: learned beside the examples, they keep it as it is.

    Take a fifth of all that the training sees (its steps x its rows), so that none comes twice.
    """
    import calm
    from calm.sources import Source, load_config
    from calm.training.rehearsal import write

    if isinstance(load_config(Source.parse(anchor)), calm.CalmConfig):
        raise CalmError(f"{anchor!r} is a composition; name its anchor, which is to stay as it is")
    with stdout_for(as_json=True):
        model, tokenizer = loading.load_model(anchor, None, None, None, dtype, device)
        texts = write(model, tokenizer, number, batch_size, seed, max_new_tokens)
    for text in texts:
        print(json.dumps({"text": text}))
