"""Invariant 5: base weights are never changed or given gradients; a checkpoint holds the composition only."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
import strategies
import torch
from factories import Mix
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import calm
from calm import backbones


def base_digests(model: calm.CalmForCausalLM) -> dict[str, bytes]:
    return factories.digests(model.anchor) | {f"m.{k}": v for k, v in factories.digests(model.augmenting).items()}


def check_bases_stay(model: calm.CalmForCausalLM, steps: int = 3, **optimizer_kwargs: object) -> None:
    """After some steps on a real loss every base weight has its bits, and no gradient; every connection has changed."""
    before, connections = base_digests(model), factories.digests(model.connections)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **optimizer_kwargs)
    losses = []
    for step in range(steps):
        ids = factories.tokens(2, 9, seed=step % 2)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), prompt_length=4).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        # after zero_grad a gradient that should not be there would be gone
        given = [name for name, weight in model.named_parameters() if weight.grad is not None]
        outside = [name for name in given if not name.startswith("connections.")]
        assert not outside, f"{outside[0]} was given a gradient"
        weights = 7 if model.config.attention == "gated" else 5
        assert len(given) == weights * len(model.connections), "a connection was given no gradient"
        optimizer.zero_grad()
    after, trained = base_digests(model), factories.digests(model.connections)
    changed = [name for name in before if after[name] != before[name]]
    assert not changed, f"{changed[0]} was changed"
    assert before.keys() == after.keys()
    assert all(trained[name] != connections[name] for name in trained), "a connection does not learn"


def check_checkpoint_holds_composition_only(model: calm.CalmForCausalLM, folder: Path) -> None:
    """Keys are the connections', the dtype is theirs, and the whole folder is little more than their weights."""
    model.save_pretrained(folder)
    parameters = dict(model.connections.named_parameters(prefix="connections"))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    assert not list(folder.glob(".*"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(parameters), "the file holds other weights than the composition parameters"
        assert all(torch.equal(file.get_tensor(key), parameters[key]) for key in file.keys())  # noqa: SIM118
    weights = sum(weight.numel() * weight.element_size() for weight in parameters.values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= weights + 16 * 1024, f"the checkpoint is {size - weights} bytes larger than its parameters"


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=3)
@given(data=st.data())
def test_training_leaves_the_bases_alone(anchor: str, data: st.DataObject) -> None:
    mix = data.draw(strategies.mixes(anchor))
    check_bases_stay(mix.build())


@pytest.mark.parametrize("augmenting", factories.AUGMENTING)
def test_training_leaves_any_augmenting_model_alone(augmenting: str) -> None:
    check_bases_stay(Mix(augmenting=(augmenting,)).build())


def test_a_fresh_composition_learns() -> None:
    """Gates that start at zero: all else follows from the second step on."""
    model = Mix().fresh().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = factories.tokens(4, 10)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_only_connections_train() -> None:
    model = Mix(augmenting=("gpt2", "mamba")).fresh()
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == {f"connections.{name}" for name, _ in model.connections.named_parameters()}
    found, total = model.get_nb_trainable_parameters()
    assert found == sum(weight.numel() for weight in model.connections.parameters())
    assert total == sum(weight.numel() for weight in model.parameters())


def test_augmenting_models_stay_in_evaluation_mode() -> None:
    """Their dropout would make what is looked up random; `train()` is called by every trainer."""
    model = Mix().fresh().train()
    assert model.training and model.anchor.training and model.connections.training
    assert not any(module.training for module in model.augmenting.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_the_given_models_stay_as_they_are() -> None:
    mix = Mix(augmenting=("gpt2", "llama"))
    anchor, augmenting = mix.anchor_model(), mix.augmenting_models()
    models = {"anchor": anchor, **augmenting}
    before = {name: factories.digests(model) for name, model in models.items()}
    configs = {name: json.dumps(model.config.to_dict(), default=str) for name, model in models.items()}
    ids = factories.tokens(2, 8)
    logits = {name: model(ids).logits for name, model in models.items()}
    model = factories.perturb(calm.compose(anchor, augmenting, 2))
    check_bases_stay(model)
    anchor.eval()
    for name, given_model in models.items():
        assert factories.digests(given_model) == before[name]  # names and bits
        assert json.dumps(given_model.config.to_dict(), default=str) == configs[name]
        factories.assert_same(given_model(ids).logits, logits[name])


@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_checkpoint_holds_the_composition_only(anchor: str, tmp_path: Path) -> None:
    mix = Mix(anchor=anchor, augmenting=("gemma3_text", "mamba"))
    check_checkpoint_holds_composition_only(mix.build(), tmp_path)


def test_checkpoint_of_a_half_precision_composition(tmp_path: Path) -> None:
    mix = Mix()
    model = calm.compose(mix.anchor_model().to(torch.bfloat16), mix.augmenting_models(), 2)
    check_checkpoint_holds_composition_only(model, tmp_path)


# -- negative controls ------------------------------------------------------------------------------------------------


def test_an_anchor_that_trains_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "freeze", lambda model: model)
    with pytest.raises(AssertionError, match=r"anchor\..* was given a gradient"):
        check_bases_stay(Mix(anchor="qwen3").build())


def test_one_unfrozen_weight_is_noticed() -> None:
    model = Mix().build()
    next(model.anchor.lm_head.parameters()).requires_grad_()
    with pytest.raises(AssertionError, match=r"anchor\.lm_head\.weight was given a gradient"):
        check_bases_stay(model)


def test_an_unfrozen_augmenting_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without no_grad, and with weights that want gradients."""
    model = Mix(augmenting=("llama",)).build()
    model.augmenting.requires_grad_()
    check_bases_stay(model)  # no_grad alone keeps them out
    monkeypatch.setattr(torch, "no_grad", torch.enable_grad)
    with pytest.raises(AssertionError, match=r"augmenting\..* was given a gradient"):
        check_bases_stay(model)


def test_a_base_that_drifts_is_noticed() -> None:
    """A buffer or weight that changes without any gradient, as running statistics do."""
    model = Mix().build()

    def drift(module: torch.nn.Module, args: tuple, output: object) -> None:
        model.anchor.model.norm.weight.data += 1e-7

    model.anchor.model.layers[0].register_forward_hook(drift)
    with pytest.raises(AssertionError, match="was changed"):
        check_bases_stay(model)


def test_a_disconnected_connection_is_noticed() -> None:
    model = Mix().build()
    model.connections[1].f_proj.weight.requires_grad_(False)
    with pytest.raises(AssertionError, match="no gradient"):
        check_bases_stay(model)


def test_a_checkpoint_with_a_base_in_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calm.checkpoint, "CONNECTIONS_PREFIX", "")
    model = Mix().build()
    save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder: save(folder, state_dict=model.state_dict()))
    with pytest.raises(AssertionError, match="other weights"):
        check_checkpoint_holds_composition_only(model, tmp_path)


def test_a_large_checkpoint_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(" " * 17_000)
    with pytest.raises(AssertionError, match="bytes larger"):
        check_checkpoint_holds_composition_only(Mix().build(), tmp_path)
