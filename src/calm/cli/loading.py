"""Loads a composition and its tokenizer for the commands that generate, and other models for `calm evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from calm.cli.arguments import MOST_SEED, parse_augmenting
from calm.errors import CalmError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from calm.model import CalmForCausalLM

Model = Annotated[str, typer.Argument(help="Folder or hub name of a composition.")]
Anchor = Annotated[str | None, typer.Option(help="Where the anchor is now, if it has moved.")]
Augmenting = Annotated[
    list[str] | None, typer.Option(help="Where the augmenting model is now (NAME=PATH for several).")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (the GPU if there is one).")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens to generate; by default 256, or what fits into the context.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token each time; above: sample.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0: from all.")]
Seed = Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Seed of sampling.")]


def load(
    model: str, anchor: str | None, augmenting: list[str] | None, dtype: str, device: str | None
) -> tuple[CalmForCausalLM, PreTrainedTokenizerBase]:
    """Load a composition, on the GPU if there is one, and its tokenizer, set to pad on the left.

    Raises:
        CalmError: If either cannot be loaded, or if there is no such device.
    """
    import calm
    from calm.checkpoint import read_config
    from calm.data import load_tokenizer

    place = _usable(device)
    config = read_config(model)  # where there is no composition, that is to be said, not that it has no tokenizer
    tokenizer = load_tokenizer(model, anchor)
    composed = calm.CalmForCausalLM.from_pretrained(
        model,
        config=config,
        anchor=anchor,
        augmenting=parse_augmenting(augmenting) if augmenting else None,
        dtype=dtype,
    )
    composed.to(place)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return composed, tokenizer


def load_model(
    model: str, part: str | None, anchor: str | None, augmenting: list[str] | None, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a composition, a part of it ("anchor", or the name of an augmenting model), or any causal language model.

    Of an adapter's folder or name (PEFT's) it is the model that the adapter was trained on, with the adapter.

    Returns:
        The model, on the GPU if there is one, and the tokenizer; a part's is the composition's, so that all of them
        are asked the same.

    Raises:
        CalmError: If it cannot be loaded, if it is an adapter on a composition, or if there is no such device.
    """
    import calm
    from calm import sources
    from calm.data import load_tokenizer

    place = _usable(device)
    adapter = _adapted(model)
    source = sources.Source.parse(adapter or model)
    config = sources.load_config(source)
    if adapter is not None and isinstance(config, calm.CalmConfig):
        raise CalmError(
            f"{model!r} is an adapter on a composition, {adapter!r}, which no command loads: load the two in Python "
            '(docs/training.md, "LoRA on the anchor")'
        )
    if isinstance(config, calm.CalmConfig):
        if part is None or part == "composed":
            return load(model, anchor, augmenting, dtype, device)
        moved = parse_augmenting(augmenting) if augmenting else None
        where = anchor if part == "anchor" else moved.get(part) if isinstance(moved, dict) else moved
        tokenizer = load_tokenizer(model, anchor)
        loaded = sources.load_part(config, part, where, dtype=dtype)
    elif part is not None or anchor or augmenting:
        raise CalmError(f"{model!r} is not a composition, but a {config.model_type!r}: it has no parts to name.")
    else:
        tokenizer = load_tokenizer(model, adapter)
        loaded = sources.load_anchor(source, config, dtype=dtype)
        if adapter is not None:
            loaded.load_adapter(model)
    loaded.eval().to(place)
    return loaded, tokenizer


def _adapted(model: str) -> str | None:
    """The model that an adapter of PEFT's was trained on; None if this is no adapter.

    Raises:
        CalmError: If it is one, and peft is not installed, or it names no model.
    """
    from transformers.utils import find_adapter_config_file, is_peft_available

    try:
        file = find_adapter_config_file(model)
    except (OSError, ValueError):  # no such name, or no hub: that is to be said of the model
        file = None
    if file is None:
        return None
    if not is_peft_available():
        raise CalmError(f"{model!r} is an adapter of PEFT's, which is not installed: pip install 'calm-lm[peft]'")
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    if not base:
        raise CalmError(
            f"{model!r} is an adapter whose adapter_config.json names no base_model_name_or_path: write there which "
            "model it was trained on, or merge the two and evaluate the result"
        )
    return str(base)


def _usable(device: str | None) -> str:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # as it is unknown, not built for, or not there
        there = torch.accelerator.current_accelerator()
        raise CalmError(
            f"--device {device}: PyTorch cannot compute on it here; expected cpu{f' or {there.type}' if there else ''}"
        ) from error
    return device


def length(composed: CalmForCausalLM, prompt_length: int, max_new_tokens: int | None) -> int:
    """How many tokens to generate at most: as many as asked for, by default 256 within the smallest context."""
    if max_new_tokens is not None or composed.context_length is None:
        return max_new_tokens or 256
    return max(1, min(256, composed.context_length - prompt_length + 1))


def sampling(temperature: float, top_p: float, top_k: int, seed: int | None) -> dict[str, object]:
    """The arguments of `generate` for these options, to be used within `without_defaults`."""
    from transformers import set_seed

    if seed is not None:
        set_seed(seed)
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
