"""Bases that are placed by `device_map`: connections lie where their layers run, and offloaded anchors do not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import byte_tokenizer, save_base
from factories import assert_same, perturb, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import calm
from calm.errors import CalmError

IDS = tokens(2, 9)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder, tokenizer = tmp_path_factory.mktemp("bases"), byte_tokenizer()
    anchor = save_base(folder / "anchor", tokenizer, seed=0, layers=4, attention_dropout=0.0)
    return str(anchor), str(save_base(folder / "augmenting", tokenizer, seed=1, layers=4, attention_dropout=0.0))


def offloaded(base: str, folder: Path) -> Any:
    """Half of its layers are on the disk."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
    return AutoModelForCausalLM.from_pretrained(base, device_map=places, offload_folder=str(folder))


def like(model: calm.CalmForCausalLM, bases: tuple[str, str]) -> calm.CalmForCausalLM:
    plain = calm.compose(*bases, 4)
    plain.connections.load_state_dict(model.connections.state_dict())
    return plain


def gradients(model: calm.CalmForCausalLM) -> list[Tensor]:
    model.train()(IDS, labels=IDS, skip_logits=True).loss.backward()
    return [weight.grad for weight in model.connections.parameters()]


@pytest.mark.parametrize("place", ["auto", "cpu", {"": "cpu"}])
def test_one_device(bases: tuple[str, str], place: Any) -> None:
    model = perturb(calm.compose(*bases, 4, device_map=place))
    for found, expected in zip(gradients(model), gradients(like(model, bases)), strict=True):
        assert_same(found, expected)


def test_an_offloaded_anchor_generates_and_does_not_train(bases: tuple[str, str], tmp_path: Path) -> None:
    model = calm.compose(offloaded(bases[0], tmp_path / "off"), AutoModelForCausalLM.from_pretrained(bases[1]), 4)
    assert any(weight.is_meta for weight in model.anchor.parameters())
    assert {weight.device.type for weight in model.connections.parameters()} == {"cpu"}
    plain = like(perturb(model), bases)
    with torch.no_grad():
        assert_same(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(*(it.generate(IDS, max_new_tokens=4, do_sample=False) for it in (model, plain)))
    model.save_pretrained(tmp_path / "out")
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "out", anchor=bases[0], augmenting=bases[1])
    with torch.no_grad():
        assert_same(loaded(IDS).logits, plain(IDS).logits)
    with pytest.raises(CalmError, match=r"offloads \d+ weights of the anchor \('model.*generate and not train"):
        model.train()


def test_an_offloaded_augmenting_model_trains(bases: tuple[str, str], tmp_path: Path) -> None:
    model = calm.compose(AutoModelForCausalLM.from_pretrained(bases[0]), offloaded(bases[1], tmp_path / "off"), 4)
    assert any(weight.is_meta for weight in model.augmenting.parameters())
    for found, expected in zip(gradients(perturb(model)), gradients(like(model, bases)), strict=True):
        assert_same(found, expected)


def test_what_is_placed_is_said(bases: tuple[str, str], tmp_path: Path) -> None:
    """The Trainer moves a model without `hf_device_map` to its own device, as a whole."""
    anchor = offloaded(bases[0], tmp_path / "off")
    model = calm.compose(anchor, AutoModelForCausalLM.from_pretrained(bases[1]), 4)
    assert model.hf_device_map == {f"anchor.{name}": place for name, place in anchor.hf_device_map.items()}
    assert not hasattr(calm.compose(*bases, 4), "hf_device_map")
