"""The models of a run: the anchor, and the vanilla, specialist and random augmenting models made to go with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from calm.backbones import layers_of, truncate_config
from calm.config import text_config
from calm.data import load_tokenizer
from calm.errors import CalmError


def load(name: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model on the GPU, if there is one, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device()).eval()


def device() -> str:
    """Where models run: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cut(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A smaller model: some layers of a larger one, with its embeddings, last norm and head.

    Args:
        model: the larger one; it stays as it is.
        layers: which, counted from 0, in ascending order.

    Raises:
        CalmError: it has no such layers, or layers of several kinds.
    """
    depth = len(layers_of(model))
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        raise CalmError(f"augmenting={tuple(layers)}: expected layers from 0 to {depth - 1}, each once, in order.")
    kinds = set(getattr(text_config(model.config), "layer_types", None) or ())
    if len(kinds) > 1:
        raise CalmError(
            f"augmenting={tuple(layers)}: the anchor's layers are of several kinds ({', '.join(sorted(kinds))}), and a "
            "cut would mistake one for another; give a smaller model by name."
        )
    config = copy.deepcopy(model.config)
    truncate_config(config, len(layers))
    smaller = AutoModelForCausalLM.from_config(config).to(model.dtype)
    prefix = next(name for name, module in model.named_modules() if module is layers_of(model)) + "."
    weights = {}
    for key, weight in model.state_dict().items():
        if key.startswith(prefix):
            index, _, rest = key.removeprefix(prefix).partition(".")
            if int(index) not in layers:
                continue
            key = f"{prefix}{layers.index(int(index))}.{rest}"
        weights[key] = weight.clone()
    smaller.load_state_dict(weights)
    return smaller.to(model.device).eval()


def keep_vocabulary(model: PreTrainedModel) -> None:
    """Leave the embeddings and the head of a cut as the larger model's, whatever it is trained on.

    Then its last layer goes on writing what the larger model's head reads, which is what a connection hands on
    (docs/dev/LOG.md, "identity behind a gate").
    """
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False)


def save_random(like: Path, folder: Path, seed: int) -> None:
    """Save a model of the same configuration with random weights (the paper's random `m_A`), with its tokenizer."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like)).save_pretrained(folder)
    load_tokenizer(like).save_pretrained(folder)
