"""SmolLM2-135M composed with its own first layers, as folders that vLLM can serve: for a benchmark and a test."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import calm
from calm.experiments.checkpoints import SMOLLM2_135M

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()
LAYERS = 10  # of the augmenting model
CONNECTIONS = 3
SHARE = 0.12  # of the residual stream's norm, that a connection injects


def smollm2_composition(folder: Path) -> calm.CalmForCausalLM:
    """Compose, with connections that matter, and save everything.

    Args:
        folder: Gets `anchor`, `augmenting` and `composed`.
    """
    source = SMOLLM2_135M.folder()
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole.save_pretrained(folder / "anchor")
    small = copy.deepcopy(whole)
    del small.model.layers[LAYERS:]
    small.config.num_hidden_layers = LAYERS
    small.save_pretrained(folder / "augmenting")
    tokenizer = AutoTokenizer.from_pretrained(source)
    for base in ("anchor", "augmenting"):
        tokenizer.save_pretrained(folder / base)
    model = calm.compose(str(folder / "anchor"), str(folder / "augmenting"), CONNECTIONS)
    _perturb(model, torch.tensor([tokenizer(TEXT).input_ids[:64]]))
    model.save_pretrained(folder / "composed")
    return model


def _perturb(model: calm.CalmForCausalLM, ids: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(7)
    for connection in model.connections:
        weight = connection.w_o.weight
        weight.data = torch.randn(weight.shape, generator=generator)
        torch.nn.init.ones_(connection.gate.bias)
        torch.nn.init.normal_(connection.gate.weight, generator=generator)

    def scale(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        factor = SHARE * args[0].norm() / output.norm()
        for strength in module.gate.parameters():
            strength.data *= factor
        return output * factor  # so that later connections are scaled on what they will get

    handles = [connection.register_forward_hook(scale) for connection in model.connections]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
