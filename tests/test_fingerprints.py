"""fingerprints.py: the same weights have the same fingerprint in every precision, others have another."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

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
    fingerprints.check_fingerprint(model, {"fingerprint": recorded}, "it")
    model.model.norm.float()  # mixed, as quantizing and some loaders leave it
    if dtype != torch.float32:
        model.model.norm.weight.data = model.model.norm.weight.data.to(torch.float32)
    fingerprints.check_fingerprint(model, {"fingerprint": recorded}, "it")
    model.lm_head.weight.data[5, 5] += 0.5
    with pytest.raises(CheckpointError, match=r"it are not those.*verify_bases=False"):
        fingerprints.check_fingerprint(model, {"fingerprint": recorded}, "it")


def test_a_bfloat16_base_loaded_in_float32_is_the_same_base() -> None:
    recorded = fingerprints.fingerprint(factories.base("llama").bfloat16())
    fingerprints.check_fingerprint(factories.base("llama").bfloat16().float(), {"fingerprint": recorded}, "it")
    with pytest.raises(CheckpointError):
        fingerprints.check_fingerprint(factories.base("llama"), {"fingerprint": recorded}, "it")


def test_a_rounded_base_is_told_by_the_dtype_that_it_was_composed_in() -> None:
    """Float32 weights are the right ones if rounding them gives those recorded; another half precision is not."""
    rounded = fingerprints.fingerprint(factories.base("llama").bfloat16())
    reference = {"fingerprint": rounded, "dtype": "bfloat16"}
    for model in (
        factories.base("llama"),
        factories.base("llama").bfloat16(),
        factories.base("llama").bfloat16().half(),
    ):
        fingerprints.check_fingerprint(model, reference, "it")
    with pytest.raises(CheckpointError, match=r"composed in bfloat16: load it with dtype=torch\.bfloat16"):
        fingerprints.check_fingerprint(factories.base("llama").half(), reference, "it")
    with pytest.raises(CheckpointError, match=r"Load the right base, or"):
        fingerprints.check_fingerprint(factories.base("llama", seed=1), reference, "it")
    whole = {"fingerprint": fingerprints.fingerprint(factories.base("llama")), "dtype": "float32"}
    with pytest.raises(CheckpointError, match=r"in float16, recorded \w+\)\. Load the right base, or"):
        fingerprints.check_fingerprint(factories.base("llama", seed=1).half(), whole, "it")
    # from before there was a dtype in it: refused, but the error says what it takes
    with pytest.raises(CheckpointError, match=r"composed in bfloat16: load it with dtype=torch\.bfloat16"):
        fingerprints.check_fingerprint(factories.base("llama"), {"fingerprint": rounded}, "it")


def test_the_precision_of_a_model() -> None:
    model = factories.base("llama")
    assert fingerprints.precision_of(model) == "float32"
    assert fingerprints.precision_of(model.half()) == "float16"
    model.bfloat16().model.norm.float()  # as some loaders leave it
    model.model.embed_tokens.float()
    assert fingerprints.precision_of(model) == "bfloat16"


def test_fingerprints_do_not_change_from_release_to_release() -> None:
    """Saved compositions hold them."""
    model = nn.Linear(3, 2)
    model.load_state_dict({"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -1.0])})
    assert fingerprints.fingerprint(model) == {
        "float32": "9cc59e4cc8272463cbe110dd61ffb8d4",
        "bfloat16": "9c24529b0b269b690ac5c1bbd41c8ec9",
        "float16": "332aa5548187f5c40651f46293fc95c1",
    }


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def routed(tmp_path: Path) -> Path:
    """A model that chooses its experts by a bias, which is no parameter but a buffer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "vocab_size": factories.VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
    heads |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1, **sizes, **heads, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change_bias(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[BIAS][2] += value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_buffer_is_refused(part: str, dtype: torch.dtype, routed: Path, tmp_path: Path) -> None:
    bases = {"anchor": tmp_path / "llama", "augmenting": tmp_path / "llama"} | {part: routed}
    factories.base("llama").save_pretrained(tmp_path / "llama")
    model = factories.perturb(calm.compose(**bases, connections=[(1, 1)]))
    model.save_pretrained(tmp_path / "out")
    ids = factories.tokens(2, 9)
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "out")
    factories.assert_identical(loaded(ids).logits, model(ids).logits)
    calm.CalmForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    change_bias(routed, 5.0)
    with pytest.raises(CheckpointError, match=rf"weights of the {part}.*trained against"):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    changed = calm.CalmForCausalLM.from_pretrained(tmp_path / "out", verify_bases=False)
    assert not torch.equal(changed(ids).logits, model(ids).logits)


def test_nan_in_a_buffer_is_refused(routed: Path) -> None:
    change_bias(routed, float("nan"))
    with pytest.raises(CheckpointError, match=r"e_score_correction_bias.*NaN or infinite"):
        calm.compose(routed, routed, 1)


def test_buffers_count_when_they_are_saved() -> None:
    """Whole numbers as they are, in every precision; buffers that are computed anew not at all."""

    def model(saved: int, computed: int) -> nn.Module:
        made = nn.Linear(2, 2)
        for parameter in made.parameters():
            nn.init.ones_(parameter)
        made.register_buffer("table", torch.tensor([[1 << 40, saved]]))
        made.register_buffer("computed", torch.tensor(computed), persistent=False)
        return made

    recorded = fingerprints.fingerprint(model(1, 1))
    fingerprints.check_fingerprint(model(1, 2), {"fingerprint": recorded}, "it")
    fingerprints.check_fingerprint(model(1, 1).bfloat16(), {"fingerprint": recorded}, "it")
    for changed in (model(2, 1), model(2, 1).half()):
        with pytest.raises(CheckpointError):
            fingerprints.check_fingerprint(changed, {"fingerprint": recorded}, "it")


def test_quantized_weights_have_one_fingerprint() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.arange(16, dtype=torch.int8).view(4, 4), requires_grad=False)
    recorded = fingerprints.fingerprint(model)
    assert list(recorded) == ["stored"]
    fingerprints.check_fingerprint(model, {"fingerprint": recorded}, "it")
    model.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError):
        fingerprints.check_fingerprint(model, {"fingerprint": recorded}, "it")


def test_weights_that_are_not_there_have_no_fingerprint() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    assert fingerprints.fingerprint(model) == {}
    fingerprints.check_fingerprint(model, {"fingerprint": {"float32": "x"}}, "it")
