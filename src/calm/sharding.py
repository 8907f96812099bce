"""Weights that FSDP2 or DeepSpeed ZeRO-3 has spread over processes: gathered to be saved, spread as they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_zero3(weight: Tensor) -> bool:
    """Whether a weight is one of ZeRO-3's, of which a process has nothing but while its module runs."""
    return hasattr(weight, "ds_id")


def is_spread(module: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has spread some of a module's weights over processes."""
    return any(isinstance(weight, DTensor) or is_zero3(weight) for weight in module.parameters())


def whole(value: Any) -> Any:
    """A tensor of FSDP2 or ZeRO-3, whole and with a storage of its own, or all in a dictionary or list.

    Every process calls it.
    """
    if isinstance(value, Mapping):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    if not isinstance(value, Tensor):
        return value
    full = value.full_tensor().cpu() if isinstance(value, DTensor) else value
    # parts are gathered padded to one size: fewer rows than processes come as a view, which safetensors refuses
    return full if full.nbytes == full.untyped_storage().nbytes() else full.clone()


def spread(value: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, which every process has, as FSDP2 spread a weight of the same shape."""
    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


@contextmanager
def gathered(module: nn.Module, *, to_change: bool = False) -> Iterator[None]:
    """Within this context a module has its whole weights under ZeRO-3, too; a copy outlives it. Every process calls it.

    Args:
        module: Some part of the model.
        to_change: Spread what is in the weights at the end.
    """
    weights = [weight for weight in module.parameters() if is_zero3(weight)]
    if not weights:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if to_change else None):
        yield


@torch.no_grad()
def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights, by name, into a module, sharded or not. Every process calls it."""
    with gathered(module, to_change=True):
        for name, weight in module.named_parameters():
            weight.copy_(spread(weights[name], weight))


def optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state dict, spread as FSDP2 spread its weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        index: {key: spread(value, weights[index]) if isinstance(value, Tensor) else value for key, value in of.items()}
        for index, of in state["state"].items()
    }
    return {**state, "state": parts}
