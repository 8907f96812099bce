"""Checkpoints of a sharded run (FSDP2) are those of any other run: whole tensors, the connections' only.

What accelerate would write is the frozen bases once more, and states that only as many processes could read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any) -> Any:
    """A state dict with its sharded tensors gathered, on the CPU; every process has to call it."""
    if isinstance(value, Mapping):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def like(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as a weight is."""
    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


def optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state dict, sharded as its weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    sharded = {
        index: {key: like(part, weights[index]) if isinstance(part, Tensor) else part for key, part in parts.items()}
        for index, parts in state["state"].items()
    }
    return {**state, "state": sharded}


@torch.no_grad()
def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights, by name, into a sharded module."""
    for name, weight in module.named_parameters():
        weight.copy_(like(weights[name], weight))
