"""Bases spread over devices, offloaded or moved: each connection computes where its layer does.

"meta" stands for a second device: what is there has a place and a shape, and no numbers.
"""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from factories import Mix, assert_identical, assert_same, patched

import calm
from calm.alignment import Alignment

IDS = factories.tokens(2, 9)
META = torch.device("meta")
LAYERS = {f"model.layers.{i}": "cpu" for i in range(4)}
OFFLOADED = LAYERS | {"model.layers.3": "disk"} | dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")


def split() -> calm.CalmForCausalLM:
    """An anchor whose last two layers, norm and head are on another device, as `device_map` spreads it."""
    anchor = factories.base("llama")
    for module in (*anchor.model.layers[2:], anchor.model.norm, anchor.lm_head):
        module.to(META)
        add_hook_to_module(module, AlignDevicesHook(execution_device=META))
    return calm.compose(anchor, factories.base("gpt2", 24, 4, 2), [(0, 1), (1, 2), (2, 3)])


def devices_of_connections(model: calm.CalmForCausalLM, **kwargs: object) -> list[set[torch.device]]:
    """All devices that take part in each connection of a forward pass, one where everything is where it should be."""
    found = []

    def look(module: torch.nn.Module, args: tuple) -> None:
        hidden, context, alignment = args[:3]
        sight = [value for value in vars(alignment).values() if isinstance(value, torch.Tensor)]
        tensors = [hidden, context, *sight, *module.parameters()]
        found.append({tensor.device for tensor in tensors})

    for connection in model.connections:
        connection.register_forward_pre_hook(look)
    with torch.no_grad():
        assert model(IDS, **kwargs).logits.device == META
    return found


@pytest.mark.parametrize("kwargs", [{"use_cache": True}, {"use_cache": False}, {"attention_mask": "left-padded"}])
def test_what_a_connection_reads_is_brought_to_it(kwargs: dict) -> None:
    if "attention_mask" in kwargs:
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        kwargs = {"attention_mask": mask}
    assert devices_of_connections(split(), **kwargs) == [{torch.device("cpu")}, {META}, {META}]


def test_what_is_not_brought_along_is_noticed() -> None:
    with patched(Alignment, to=lambda self, device: self), pytest.raises((AssertionError, RuntimeError)):
        test_what_a_connection_reads_is_brought_to_it({"use_cache": False})


def test_an_offloaded_layers_connection_computes_where_the_layer_does(tmp_path: Path) -> None:
    """Such a layer's weights are on "meta" until it runs; a connection there would give no numbers, and no error."""
    factories.base("llama").save_pretrained(tmp_path / "base")
    whole = factories.perturb(calm.compose(tmp_path / "base", tmp_path / "base", [(0, 1), (3, 3)]))
    whole.save_pretrained(tmp_path / "out")
    kwargs = {"device_map": OFFLOADED | {"model.rotary_emb": "cpu"}, "offload_folder": tmp_path / "offload"}
    composed = calm.compose(tmp_path / "base", tmp_path / "base", [(0, 1), (3, 3)], **kwargs)
    composed.connections.load_state_dict(whole.connections.state_dict())
    for model in (composed, calm.CalmForCausalLM.from_pretrained(tmp_path / "out", **kwargs)):
        assert next(model.anchor.model.layers[3].parameters()).is_meta, "nothing was offloaded"
        assert_identical(model(IDS).logits, whole(IDS).logits)
        sequences = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(sequences, whole.generate(IDS, max_new_tokens=4, do_sample=False))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_on_an_accelerator(tmp_path: Path) -> None:
    """Moved there, and loaded there from what was saved here; saved there, and loaded here."""
    device = torch.accelerator.current_accelerator()
    mix = Mix(augmenting=("gpt2", "gemma3_text"))
    model = mix.build()
    model.save_pretrained(tmp_path / "here")
    bases = {"anchor": mix.anchor_model(), "augmenting": mix.augmenting_models()}
    expected = model(IDS).logits
    sequences = model.generate(IDS, max_new_tokens=6, do_sample=False)
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "here", **bases).to(device)
    for moved in (loaded, model.to(device)):
        assert {weight.device.type for weight in moved.parameters()} == {device.type}
        assert_same(moved(IDS.to(device)).logits.cpu(), expected, tolerance=1e-3)
        assert torch.equal(moved.generate(IDS.to(device), max_new_tokens=6, do_sample=False).cpu(), sequences)
    loaded.save_pretrained(tmp_path / "there")
    bases = {"anchor": mix.anchor_model(), "augmenting": mix.augmenting_models()}
    again = calm.CalmForCausalLM.from_pretrained(tmp_path / "there", **bases)
    assert_identical(again(IDS).logits, expected)
