"""Fingerprints: tell the weights that a composition was trained against from any others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from calm.errors import CheckpointError

FINGERPRINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module)\.")  # torch.compile's, activation checkpointing's
_PIECE = 2**22
_FLOATS = set(FINGERPRINT_DTYPES.values())


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a base with a NaN or an infinity among its weights: everything downstream would be NaN.

    Raises:
        CheckpointError: Naming the weight.
    """
    for key, weight in _weights(model).items():
        if weight.is_meta or not weight.is_floating_point():
            continue
        if weight.itemsize == 1:  # of 8 bits torch can only be asked when they are widened
            weight = weight.float()
        if not torch.isfinite(weight).all():
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


def precision_of(model: nn.Module) -> str:
    """The name of the dtype that a model was loaded in: of mixed ones, as some loaders leave them, the lowest.

    Of a quantized model it is that of its first floats, the embeddings; codes, too, may be stored as floats.
    """
    names = {dtype: name for name, dtype in FINGERPRINT_DTYPES.items()}
    found = [names[weight.dtype] for weight in model.parameters() if weight.dtype in names] or ["float32"]
    return found[0] if _is_quantized(model) else max(found, key=list(names.values()).index)


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
        found = dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}
        return {_WRAPPERS.sub("", name): weight for name, weight in found.items()}
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
    pieces = bits.split(max(_PIECE // max(bits.shape[-1], 1), 1))  # to sum up is to copy to 64 bits
    rows = torch.cat([piece.sum(-1, dtype=torch.int64) for piece in pieces])
    columns = torch.stack([piece.sum(0, dtype=torch.int64) for piece in pieces]).sum(0)
    for sums in (rows, columns):  # placed
        part += f"{int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())},"
    return part


def combine(parts: Mapping[str, str]) -> str:
    """The digest of a model of which `sums_of` each weight are known, by name."""
    return hashlib.sha256("".join(part for _, part in sorted(parts.items())).encode()).hexdigest()[:32]


def weight_names(model: nn.Module) -> set[str]:
    """What a fingerprint is made of: the names of a model's weights; a model on the meta device will do."""
    return set(_weights(model))


def check_fingerprint(model: nn.Module, reference: Mapping[str, Any], name: str) -> None:
    """Refuse a base that is not the one a composition was trained against.

    Weights in float32 are compared in the dtype that the composition was made in, where they may have been rounded.

    Args:
        model: The base as loaded.
        reference: From the checkpoint; nothing is checked when it has no `fingerprint`.
        name: What to call the base in the error.

    Raises:
        CheckpointError: If its weights differ.
    """
    weights = _weights(model)
    recorded: Mapping[str, str] = reference.get("fingerprint", {})
    if not recorded or any(weight.is_meta for weight in weights.values()):
        return
    quantized = _is_quantized(model)
    if quantized != ("stored" in recorded):
        now, then = ("quantized", "not") if quantized else ("not quantized", "quantized")
        raise CheckpointError(
            f"{name} is {now}, and was {then} when this composition was trained against it. Load it as it was, or pass "
            "verify_bases=False (in Python) if the change is meant."
        )
    # with mixed dtypes the lowest precision decides, since casting down gives the same bits from either
    key = "stored" if quantized else precision_of(model)
    if key == "float32":
        key = reference.get("dtype", key)
    found = _digest(weights, FINGERPRINT_DTYPES.get(key))
    if found == recorded.get(key):
        return
    advice = "Load the right base, quantized and in the dtype as then" if quantized else "Load the right base"
    dtype = None if quantized else reference.get("dtype") or _rounded_to(weights, recorded)
    if dtype not in (None, "float32", key):  # composed in float32, a base is known in any of the three
        advice = f"It was composed in {dtype}: load it with dtype=torch.{dtype}, and the right one"
    where = "as stored" if quantized else f"in {key}"
    raise CheckpointError(
        f"The weights of {name} are not those that this composition was trained against (fingerprint {found} {where}, "
        f"recorded {recorded.get(key)}). {advice}, or pass verify_bases=False (in Python) if the change is "
        "meant."
    )


def has_changed(model: nn.Module, reference: Mapping[str, Any]) -> bool:
    """Whether a base's weights are others than the recorded ones, in whichever of the recorded dtypes.

    Args:
        model: The base.
        reference: What is recorded of it.

    Returns:
        False, too, where it cannot be told: without a fingerprint, with weights that are not here, or quantized now or
        then (some kernels rearrange what they have run).
    """
    weights = _weights(model)
    recorded: Mapping[str, str] = reference.get("fingerprint", {})
    if not recorded or "stored" in recorded or any(weight.is_meta for weight in weights.values()):
        return False
    if _is_quantized(model):
        return False
    as_it_is = precision_of(model)  # first, since it is the likeliest and each digest reads all weights
    if _digest(weights, FINGERPRINT_DTYPES[as_it_is]) == recorded.get(as_it_is):
        return False
    return _rounded_to(weights, recorded) is None


def _rounded_to(weights: Mapping[str, Tensor], recorded: Mapping[str, str]) -> str | None:
    """The dtype in which weights are those of a fingerprint, for references from before they named one."""
    dtypes = {name: dtype for name, dtype in FINGERPRINT_DTYPES.items() if name in recorded}
    return next((name for name, dtype in dtypes.items() if _digest(weights, dtype) == recorded[name]), None)
