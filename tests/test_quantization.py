"""Quantized bases (torchao and bitsandbytes, on the CPU): right gradients, float32 connections, the same again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bases import byte_tokenizer, save_base
from factories import assert_same, perturb, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

import calm
from calm.errors import CheckpointError

# How far a quantized layer may be from the same one with dequantized weights: bitsandbytes' 8 bits round what comes in
# to 8 bits as well, and multiply in float16.
TOLERANCE = {"int8": 1e-5, "int4": 1e-5, "nf4": 1e-5, "bitsandbytes int8": 0.05}


def quantization(name: str) -> Any:
    return {
        "int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
        "int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        "nf4": lambda: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }[name]()


every_quantization = pytest.mark.parametrize("name", list(TOLERANCE))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Wide enough for groups of weights, and without dropout."""
    folder, tokenizer = tmp_path_factory.mktemp("bases"), byte_tokenizer()
    anchor = save_base(folder / "anchor", tokenizer, seed=0, width=128, attention_dropout=0.0)
    return str(anchor), str(save_base(folder / "augmenting", tokenizer, seed=1, width=64, attention_dropout=0.0))


def dequantized(base: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """`plain` with the weights that `base` stands for."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            plain.get_submodule(name).weight.data = plain_weight(module.weight)
    return plain


def plain_weight(weight: Any) -> Tensor:
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        return weight.data * weight.SCB.view(-1, 1) / 127
    return weight.dequantize()


def loss_and_gradients(model: calm.CalmForCausalLM) -> tuple[Tensor, Tensor]:
    ids = tokens(2, 12)
    loss = model.train()(ids, labels=ids, skip_logits=True).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.connections.parameters()])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@every_quantization
def test_loss_and_gradients_are_those_of_the_dequantized_bases(bases: tuple[str, str], name: str) -> None:
    """The unquantized bases are the negative control: further away than the dequantized ones."""
    model = calm.compose(*bases, 2, quantization_config=quantization(name))
    plain, reference = calm.compose(*bases, 2), calm.compose(*bases, 2)
    for base in ("anchor", "augmenting.augmenting"):
        dequantized(model.get_submodule(base), reference.get_submodule(base))
    perturb(model)  # an evaluation, after which there have to be gradients still
    for other in (plain, reference):
        other.connections.load_state_dict(model.connections.state_dict())
    assert {weight.dtype for weight in model.connections.parameters()} == {torch.float32}
    assert any(weight.dtype == torch.uint8 or type(weight) is not nn.Parameter for weight in model.anchor.parameters())
    (loss, gradients), (expected_loss, expected_gradients) = loss_and_gradients(model), loss_and_gradients(reference)
    assert distance(loss, expected_loss) < TOLERANCE[name]
    assert distance(gradients, expected_gradients) < TOLERANCE[name]
    assert distance(loss_and_gradients(plain)[1], expected_gradients) > min(0.01, 20 * TOLERANCE[name])
    assert all(weight.grad is None for weight in (*model.anchor.parameters(), *model.augmenting.parameters()))


@every_quantization
def test_generation_saving_and_loading(bases: tuple[str, str], tmp_path: Path, name: str) -> None:
    """The saved composition remembers how its bases were loaded, and refuses them loaded otherwise."""
    model = perturb(calm.compose(*bases, 2, quantization_config=quantization(name)))
    model.save_pretrained(tmp_path)
    ids, tolerance = tokens(1, 6), max(TOLERANCE[name], 3e-5)
    steps = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(steps.sequences).logits
    assert_same(torch.stack(steps.logits, 1), logits[:, -5:-1], tolerance)

    for dtype in ("auto", torch.float32):
        loaded = calm.CalmForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(CheckpointError, match="the anchor is not quantized, and was quantized when"):
        calm.CalmForCausalLM.from_pretrained(tmp_path, quantization_config=None)
    calm.CalmForCausalLM.from_pretrained(tmp_path, quantization_config=None, verify_bases=False)
    other = "nf4" if name == "int8" else "int8"
    with pytest.raises(CheckpointError, match="not those that this composition was trained against"):
        calm.CalmForCausalLM.from_pretrained(tmp_path, quantization_config=quantization(other))


@every_quantization
def test_another_scale_is_another_base(bases: tuple[str, str], tmp_path: Path, name: str) -> None:
    """A weight twice as large has the same codes; what tells it apart are its scales."""
    anchor = shutil.copytree(bases[0], tmp_path / "anchor")
    calm.compose(anchor, bases[1], 2, quantization_config=quantization(name)).save_pretrained(tmp_path / "composed")
    calm.CalmForCausalLM.from_pretrained(tmp_path / "composed")
    weights = load_file(anchor / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(weights, anchor / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the anchor are not those"):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "composed")


@every_quantization
def test_loaded_quantized_models(bases: tuple[str, str], tmp_path: Path, name: str) -> None:
    """One is quantized, the other is not; the composition starts as the anchor and is found again."""
    anchor = AutoModelForCausalLM.from_pretrained(bases[0], quantization_config=quantization(name))
    plain = AutoModelForCausalLM.from_pretrained(bases[1])
    ids = tokens(2, 9)
    model = calm.compose(anchor, plain, 2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, anchor(ids).logits)
    perturb(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())["anchor_config"]
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {weight.dtype for weight in loaded.augmenting.parameters()} == {torch.float32}


@every_quantization
def test_bases_that_are_stored_quantized(bases: tuple[str, str], tmp_path: Path, name: str) -> None:
    for part, base in zip(("anchor", "augmenting"), bases, strict=True):
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization(name))
        model.save_pretrained(tmp_path / part)
        byte_tokenizer().save_pretrained(tmp_path / part)
    model = perturb(calm.compose(tmp_path / "anchor", tmp_path / "augmenting", 2))
    assert "loaded_with" not in model.config.anchor_reference
    model.save_pretrained(tmp_path / "composed")
    loaded, ids = calm.CalmForCausalLM.from_pretrained(tmp_path / "composed"), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_quantization
def test_one_quantized_model_as_both(bases: tuple[str, str], tmp_path: Path, name: str) -> None:
    model = perturb(calm.compose(bases[0], bases[0], 2, quantization_config=quantization(name)))
    shared = {id(weight) for weight in model.anchor.parameters()}
    assert all(id(weight) in shared for weight in model.augmenting.parameters())
    model.save_pretrained(tmp_path)
    loaded, ids = calm.CalmForCausalLM.from_pretrained(tmp_path), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_nan_in_a_scale_is_refused(bases: tuple[str, str], tmp_path: Path) -> None:
    anchor = shutil.copytree(bases[0], tmp_path / "anchor")
    weights = load_file(anchor / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, anchor / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight.* holds NaN"):
        calm.compose(anchor, bases[1], 2, quantization_config=quantization("int8"))


class EightBitLinear(nn.Module):
    """A linear layer as checkpoints in FP8 store it: 8-bit floats and a scale, multiplied when it is run."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.weight_scale_inv).T


def in_eight_bits(folder: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, EightBitLinear(linear))
    return model.eval()


def test_bases_of_eight_bit_floats(bases: tuple[str, str], tmp_path: Path) -> None:
    anchor, augmenting = map(in_eight_bits, bases)
    ids = tokens(2, 9)
    model = calm.compose(anchor, augmenting, 2)
    assert {weight.dtype for weight in model.connections.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, anchor(ids).logits)
    perturb(model).save_pretrained(tmp_path)
    assert loss_and_gradients(model)[1].norm() > 0
    again = dict(zip(("anchor", "augmenting"), map(in_eight_bits, bases), strict=True))
    with torch.no_grad():
        loaded = calm.CalmForCausalLM.from_pretrained(tmp_path, **again)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    again["anchor"].model.layers[0].mlp.up_proj.weight.data.view(torch.uint8)[3, 4] ^= 1
    with pytest.raises(CheckpointError, match="the anchor are not those"):
        calm.CalmForCausalLM.from_pretrained(tmp_path, **again)
    again["anchor"].model.layers[0].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"up_proj.weight.* holds NaN"):
        calm.compose(again["anchor"], augmenting, 2)
