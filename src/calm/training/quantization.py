"""The recipe's `quantization` in transformers' words: how bases are quantized while they are loaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from calm.errors import CalmError


def quantization_config(name: str | None, dtype: torch.dtype) -> Any:
    """The configuration for `from_pretrained`; both quantize weights alone, and have right gradients (issue 3).

    Args:
        name: `"int8"` (torchao: one scale for each output of a linear layer), `"nf4"` (bitsandbytes: 4 bits with a
            scale for each 64 weights, themselves quantized; arXiv 2305.14314), or `None`.
        dtype: What the products are computed in.

    Returns:
        A `TorchAoConfig`, a `BitsAndBytesConfig`, or `None`.

    Raises:
        CalmError: If the library that does it is missing or too old.
    """
    if name is None:
        return None
    library, available = (
        ("torchao", is_torchao_available) if name == "int8" else ("bitsandbytes", is_bitsandbytes_available)
    )
    if not available():
        raise CalmError(
            f"quantization = {name!r} needs {library}, which is not installed or too old for this transformers: "
            "pip install 'calm-lm[quantization]'"
        )
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
