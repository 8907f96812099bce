"""A training step of CALM-pytorch, as near to ours as its interface allows; README.md says what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from CALM_pytorch import CALM, AugmentParams
from CALM_pytorch.CALM import Recorder
from parts import adamw
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from calm.connections import LayerPair


def calm_pytorch_step(
    width: int, depths: tuple[int, int], vocabulary: int, pairs: Iterable[LayerPair], input_ids: Tensor
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """Compose two x-transformers with random weights.

    Args:
        width: Of both models, with heads of 64 numbers.
        depths: Layers of the anchor and of the augmenting model.
        vocabulary: Number of tokens.
        pairs: Which layers to connect.
        input_ids: Int64 `[batch, length]`: what both models read, and the labels.

    Returns:
        The composed model, its optimizer, and a training step.
    """
    heads = width // 64
    anchor, augmenting = (
        TransformerWrapper(
            num_tokens=vocabulary,
            max_seq_len=input_ids.shape[1],
            attn_layers=Decoder(dim=width, depth=depth, heads=heads, attn_flash=True),
        )
        for depth in depths
    )
    model = CALM(
        anchor,
        AugmentParams(
            model=augmenting,
            connections=tuple((pair.augmenting_layer + 1, pair.anchor_layer + 1) for pair in pairs),
        ),
        attn_kwargs={"linear_project_context": True, "pre_rmsnorm": True, "flash": True, "heads": heads},
    )
    optimizer = adamw(model.parameters())
    hooks = [hook for module in anchor.modules() for hook in module._forward_hooks.values()]
    recorders = [hook for hook in hooks if isinstance(hook, Recorder)]

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids, prompt=input_ids).backward()
        optimizer.step()
        for recorder in recorders:  # which would keep the anchor's states of all steps
            recorder.output.clear()
            recorder.modules.clear()

    return model, optimizer, step
