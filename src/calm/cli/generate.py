"""`calm generate`: completes prompts with a composition."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from calm.cli import loading
from calm.cli.arguments import Dtype, stdout_for
from calm.errors import CalmError


def generate(
    model: loading.Model,
    prompt: Annotated[list[str], typer.Argument(help="Prompts; - reads one from standard input.")],
    max_new_tokens: loading.MaxNewTokens = None,
    temperature: loading.Temperature = 0.0,
    top_p: loading.TopP = 1.0,
    top_k: loading.TopK = 0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams.")] = 1,
    seed: loading.Seed = None,
    off: Annotated[bool, typer.Option("--off", help="Switch the composition off: the bare anchor answers.")] = False,
    anchor: loading.Anchor = None,
    augmenting: loading.Augmenting = None,
    dtype: Dtype = "auto",
    device: loading.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Complete prompts; a single one streams. Prompts are taken as they are, without a chat template."""
    # what `echo` ends a line with is not part of the prompt, and would change the answer
    prompts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in prompt]
    if not all(prompts):
        raise CalmError("a prompt is empty; there is nothing to continue")
    from transformers import TextStreamer

    from calm.generation import without_defaults

    with stdout_for(as_json):
        composed, tokenizer = loading.load(model, anchor, augmenting, dtype, device)
        inputs = tokenizer(prompts, padding=len(prompts) > 1, return_tensors="pt").to(composed.device)
        streams = len(prompts) == 1 and num_beams == 1 and not as_json
        with without_defaults(composed), composed.composition_disabled() if off else nullcontext():
            outputs = composed.generate(
                **inputs,
                **loading.sampling(temperature, top_p, top_k, seed),
                max_new_tokens=loading.length(composed, inputs["input_ids"].shape[1], max_new_tokens),
                num_beams=num_beams,
                pad_token_id=tokenizer.pad_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None,
            )
    if streams:
        return
    completions = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if as_json:
        print(json.dumps([{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]))
        return
    for number, completion in enumerate(completions):
        if number:
            print("---")
        print(completion)
