"""freezing.py: only connections and adapters get gradients, however training is done; what a frozen base refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import peft
import pytest
import torch
from factories import Mix, assert_identical, assert_same

import calm
from calm import CalmError

IDS = factories.tokens(2, 10)


@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_activation_checkpointing(anchor: str, attend: str) -> None:
    """Same loss and same gradients; and the connections are what is recomputed."""
    model = Mix(anchor=anchor, augmenting=("gpt2", "mamba"), attend=attend).build().train()
    labels = IDS.clone()
    labels[:, :4] = -100
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
            assert all(c.gradient_checkpointing for c in model.connections)
        calls = []
        handle = model.connections[0].w_q.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(0)
        loss = model(IDS, labels=labels).loss
        loss.backward()
        handle.remove()
        results.append([loss.detach(), *(p.grad for p in model.connections.parameters())])
        model.zero_grad()
        assert len(calls) == (2 if checkpointing else 1)
    for found, expected in zip(*reversed(results), strict=True):
        assert_same(found, expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_activation_checkpointing_keeps_no_cache() -> None:
    model = Mix(augmenting=("llama",)).build().train()
    expected = model(IDS, labels=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = model(IDS, labels=IDS, use_cache=True)
    assert found.past_key_values is None
    found.loss.backward()
    assert_same(found.logits, expected.logits)


def test_nothing_is_back_propagated_below_the_first_connection() -> None:
    """Not even where a trainer asks the inputs for gradients, as it does with checkpointing and with adapters."""
    model = Mix(connections=(((1, 2),),)).build().train()
    model.enable_input_require_grads()
    states = []
    for layer in model.anchor.model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output.requires_grad))
    model(IDS, labels=IDS).loss.backward()
    assert states == [False, False, True, True]
    assert all(p.grad is None for p in model.anchor.parameters())


def lora(**kwargs: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, **kwargs)


def test_lora_on_the_anchor_before_composing(tmp_path: Path) -> None:
    """The adapter stays where it is: its weights, its effect, and its place in the checkpoint's fingerprint."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(factories.base("llama"), lora(target_modules=["q_proj", "up_proj"])).eval()
    adapted.requires_grad_(False)
    before, expected = factories.digests(adapted), adapted(IDS).logits
    assert (expected - factories.base("llama")(IDS).logits).abs().max() > 0.1
    for anchor in (adapted, adapted.get_base_model()):
        model = calm.compose(anchor, factories.base("gpt2"), 2)
        assert_identical(model(IDS).logits, expected)
        assert factories.digests(adapted) == before
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(name.startswith("connections.") for name in trainable) and trainable
    factories.perturb(model)
    assert not torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = calm.CalmForCausalLM.from_pretrained(
        tmp_path, anchor=adapted.get_base_model(), augmenting=factories.base("gpt2")
    )
    assert_identical(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(calm.CheckpointError, match=r"the anchor.*trained against"):
        calm.CalmForCausalLM.from_pretrained(
            tmp_path, anchor=factories.base("llama"), augmenting=factories.base("gpt2")
        )


@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter", "requires_grad_"])
def test_frozen_connections_are_told(through: str, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter that does not name them freezes them; one on the anchor alone, or one that does, does not."""
    model = calm.compose(factories.base("llama"), factories.base("gpt2"), 2)  # whose gates are shut
    if through == "requires_grad_":
        model.requires_grad_(False)
    elif through == "add_adapter":
        model.add_adapter(lora(target_modules=["q_proj"]))
    else:
        model = peft.get_peft_model(model, lora(target_modules="all-linear", task_type="CAUSAL_LM"))
    caplog.clear()
    model.eval().train()
    model.eval().train()  # once
    model.train()  # as trainers do in every step
    told = [message for record in caplog.records if "connections are" in (message := record.getMessage())]
    assert [message[:27] for message in told] == ["The connections are frozen,"]
    named, apart = Mix().build(), Mix().build()
    connections = [f"connections.{index}" for index in range(len(named.connections))]
    caplog.clear()
    apart.anchor.add_adapter(lora(target_modules=["q_proj"]))
    for trained in (
        peft.get_peft_model(named, lora(target_modules=r"anchor\..*q_proj", modules_to_save=connections)),
        apart,
    ):
        trained.eval().train()
    assert not caplog.records


def test_what_trains_nothing_in_an_augmenting_model_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"connections.{i}" for i in range(2)]
    lora = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=names)  # of the gpt2, the augmenting model
    adapted = peft.get_peft_model(Mix().fresh(), lora)
    for mode in (True, False, True):
        adapted.train(mode)
    (record,) = [r for r in caplog.records if "weights of the augmenting models require gradients" in r.getMessage()]
    assert "lora_A" in record.getMessage()
    Mix().build().train()
    assert len([r for r in caplog.records if "augmenting models require" in r.getMessage()]) == 1


@pytest.mark.parametrize("attention", ["gated", "normalized"])
def test_adapters_on_connections_that_train_are_no_matter(attention: str, caplog: pytest.LogCaptureFixture) -> None:
    """Behind a gate that is open, or without one, LoRA on a connection learns."""
    model = factories.perturb(Mix(attention=attention).build())
    adapted = peft.get_peft_model(model, lora(target_modules=r"connections\..*w_o"))
    caplog.clear()
    adapted.eval().train()
    assert not caplog.records
    adapted(IDS, labels=IDS).loss.backward()
    assert sum(float(weight.grad.norm()) for weight in adapted.parameters() if weight.grad is not None) > 0


def test_lora_on_the_anchor_after_composing(tmp_path: Path) -> None:
    """Adapter and connections train together; the bases stay."""
    torch.manual_seed(0)
    model = Mix().build()
    plain = model(IDS).logits
    bases = factories.digests(model.anchor)
    connections = [f"connections.{index}" for index in range(len(model.connections))]
    config = peft.LoraConfig(r=4, target_modules=r"anchor\..*q_proj", modules_to_save=connections)
    adapted = peft.get_peft_model(model, config)
    assert_identical(adapted(IDS).logits, plain)  # LoRA starts as the identity
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trainable) == 8
    assert sum("connections" in name for name in trainable) == 7 * len(model.connections)
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = factories.digests(model.anchor)
    assert all(
        after[name.replace(".q_proj.", ".q_proj.base_layer.")] == bits if "q_proj" in name else after[name] == bits
        for name, bits in bases.items()
    )
    adapted.eval()
    trained = adapted(IDS).logits
    sequences = adapted.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert sequences.shape == (2, 13)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Mix().build(), tmp_path).eval()
    assert_same(again(IDS).logits, trained)
    with adapted.disable_adapter():
        assert_identical(adapted(IDS).logits, plain)


def test_one_adapter_cached_and_uncached() -> None:
    """LoRA on both bases of a composition, decoded with a cache."""
    torch.manual_seed(0)
    model = Mix(augmenting=("llama",)).build()
    adapted = peft.get_peft_model(model, lora(target_modules=r"(anchor|augmenting)\..*(q|v)_proj")).eval()
    output = adapted.generate(
        input_ids=IDS, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    expected = adapted(output.sequences, use_cache=False).logits
    assert (expected - Mix(augmenting=("llama",)).shared()(output.sequences).logits).abs().max() > 0.1
    for step, found in enumerate(output.logits):
        assert_same(found, expected[:, 9 + step])


def test_embeddings_are_the_anchors() -> None:
    model = Mix().shared()
    assert model.get_input_embeddings() is model.anchor.model.embed_tokens
    assert model.get_output_embeddings() is model.anchor.lm_head
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.can_generate()


def test_embeddings_are_not_resized() -> None:
    with pytest.raises(CalmError, match="resize them before composing"):
        Mix().shared().resize_token_embeddings(70)
