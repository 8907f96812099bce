"""fingerprints.py: the same weights have the same fingerprint in every precision, others have another."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from torch import nn

import calm
from calm import (
    CheckpointError,
    fingerprints,
)


def test_a_base_with_nan_is_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        damaged = factories.base("llama")
        damaged.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
        for models in ((damaged, factories.base("gpt2")), (factories.base("gpt2"), damaged)):
            with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN or infinite"):
                calm.compose(*models, 2)
        damaged.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"NaN or infinite"):
            calm.compose(tmp_path, factories.base("gpt2"), 2)


def test_nan_where_nothing_is_read_does_not_matter() -> None:
    damaged = factories.base("llama")
    damaged.model.layers[3].mlp.up_proj.weight.data[3, 3] = float("nan")
    calm.compose(factories.base("gpt2"), damaged, [(2, 3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints_hold_in_lower_precision(dtype: torch.dtype) -> None:
    recorded = fingerprints.fingerprint(factories.base("llama"))
    assert len(set(recorded.values())) == 3
    model = factories.base("llama").to(dtype)
    fingerprints.check_fingerprint(model, recorded, "it")
    model.model.norm.float()  # mixed, as quantizing and some loaders leave it
    if dtype != torch.float32:
        model.model.norm.weight.data = model.model.norm.weight.data.to(torch.float32)
    fingerprints.check_fingerprint(model, recorded, "it")
    model.lm_head.weight.data[5, 5] += 0.5
    with pytest.raises(CheckpointError, match=r"it are not those.*verify_bases=False"):
        fingerprints.check_fingerprint(model, recorded, "it")


def test_a_bfloat16_base_loaded_in_float32_is_the_same_base() -> None:
    recorded = fingerprints.fingerprint(factories.base("llama").bfloat16())
    fingerprints.check_fingerprint(factories.base("llama").bfloat16().float(), recorded, "it")
    with pytest.raises(CheckpointError):
        fingerprints.check_fingerprint(factories.base("llama"), recorded, "it")


def test_quantized_weights_have_one_fingerprint() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.arange(16, dtype=torch.int8).view(4, 4), requires_grad=False)
    recorded = fingerprints.fingerprint(model)
    assert list(recorded) == ["stored"]
    fingerprints.check_fingerprint(model, recorded, "it")
    model.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError):
        fingerprints.check_fingerprint(model, recorded, "it")


def test_weights_that_are_not_there_have_no_fingerprint() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    assert fingerprints.fingerprint(model) == {}
    fingerprints.check_fingerprint(model, {"float32": "x"}, "it")
