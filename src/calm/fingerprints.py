"""Fingerprints: tell the weights that a composition was trained against from any others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from calm.errors import CheckpointError

FINGERPRINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOATS = set(FINGERPRINT_DTYPES.values())


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a base with a NaN or an infinity among its weights: everything downstream would be NaN.

    Raises:
        CheckpointError: Naming the weight.
    """
    for key, weight in _weights(model).items():
        if weight.is_floating_point() and not weight.is_meta and not torch.isfinite(weight).all():
            raise CheckpointError(
                f"The weight {key!r} of {name} holds NaN or infinite values: the base is damaged, load it anew."
            )


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digest every weight of a base, so that another one is told apart at loading.

    Integer checksums of the raw bits, which do not depend on device or order of summation. One digest for each dtype
    that the weights may be loaded in, because casting to a lower precision is deterministic.

    Args:
        model: The base.

    Returns:
        Digests by dtype name; a single one under `"stored"` for weights that are not plain floats (quantized); empty
        for weights that are not materialised.
    """
    weights = _weights(model)
    if any(weight.is_meta for weight in weights.values()):
        return {}
    if _is_quantized(model):
        return {"stored": _digest(weights, None)}
    return {name: _digest(weights, dtype) for name, dtype in FINGERPRINT_DTYPES.items()}


def _is_quantized(model: nn.Module) -> bool:
    return not all(weight.dtype in _FLOATS and not _has_parts(weight) for weight in model.parameters())


def _has_parts(weight: Tensor) -> bool:
    """Whether a tensor stands for others, as torchao's quantized ones do; it then claims the dtype that it replaces."""
    return is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, and the buffers that are saved with them, which count as much: routing biases, scales.

    Of a quantized model everything that it consists of, since codes alone do not tell weights apart.
    """
    saved = model.state_dict()
    if not _is_quantized(model):
        return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}
    parts: dict[str, Tensor] = {}
    stack = [(name, value) for name, value in saved.items() if isinstance(value, Tensor)]
    while stack:
        name, value = stack.pop()
        if _has_parts(value):
            stack += [(f"{name}.{part}", getattr(value, part)) for part in cast(Any, value).__tensor_flatten__()[0]]
        else:
            parts[name] = value
    return parts


def _digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> str:
    return combine({name: sums_of(name, weight, dtype) for name, weight in weights.items()})


def sums_of(name: str, weight: Tensor, dtype: torch.dtype | None) -> str:
    """One weight's part of a digest, for who sees the weights one after another.

    Args:
        name: As in the model's state dict.
        weight: The weight.
        dtype: What floats are cast to first; `None` takes them as they are.
    """
    data = weight.detach()
    if dtype is not None and weight.is_floating_point():  # buffers may be whole numbers
        data = data.to(dtype)
    data = data.contiguous()
    bits = data.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()])
    bits = bits.reshape(-1, bits.shape[-1] if bits.dim() else 1)
    part = f"{name}{tuple(weight.shape)}"
    for sums in (bits.sum(-1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)):  # of rows and of columns, placed
        part += f"{int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())},"
    return part


def combine(parts: Mapping[str, str]) -> str:
    """The digest of a model of which `sums_of` each weight are known, by name."""
    return hashlib.sha256("".join(part for _, part in sorted(parts.items())).encode()).hexdigest()[:32]


def weight_names(model: nn.Module) -> set[str]:
    """What a fingerprint is made of: the names of a model's weights; a model on the meta device will do."""
    return set(_weights(model))


def check_fingerprint(model: nn.Module, recorded: dict[str, str], name: str) -> None:
    """Refuse a base that is not the one a composition was trained against.

    Args:
        model: The base as loaded.
        recorded: From the checkpoint's reference; nothing is checked when it is empty.
        name: What to call the base in the error.

    Raises:
        CheckpointError: If its weights differ.
    """
    weights = _weights(model)
    if not recorded or any(weight.is_meta for weight in weights.values()):
        return
    quantized = _is_quantized(model)
    if quantized != ("stored" in recorded):
        now, then = ("quantized", "not") if quantized else ("not quantized", "quantized")
        raise CheckpointError(
            f"{name} is {now}, and was {then} when this composition was trained against it. Load it as it was, or pass "
            "verify_bases=False if the change is meant."
        )
    # with mixed dtypes the lowest precision decides, since casting down gives the same bits from either
    dtypes = {weight.dtype for weight in model.parameters()}
    key = "stored" if quantized else [k for k, dtype in FINGERPRINT_DTYPES.items() if dtype in dtypes][-1]
    found = _digest(weights, FINGERPRINT_DTYPES.get(key))
    if found != recorded.get(key):
        raise CheckpointError(
            f"The weights of {name} are not those that this composition was trained against (fingerprint {found}, "
            f"recorded {recorded.get(key)}). Load the right base, quantized and in the dtype as then if it is "
            "quantized, or pass verify_bases=False if the change is meant."
        )
