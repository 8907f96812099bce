"""Invariant 2: changing token t changes no logits before t, whatever the architecture, the mask and the mode."""

from __future__ import annotations

from collections.abc import Callable

import factories
import pytest
import strategies
import torch
from factories import Mix, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama import modeling_llama

import calm
from calm import alignment
from calm.alignment import align

ROUNDING = 2e-6  # experts and batched matrix products may sum in another order when another token changes


def check_no_leak(model: calm.CalmForCausalLM, row: Tensor, at: int, prompt_length: int | None) -> None:
    """Another token at `at` leaves all earlier logits as they are, with and without padding, and changes later ones."""
    other = row.clone()
    other[at] = 2 + (row[at] - 1) % (factories.VOCAB - 2)
    assert other[at] != row[at]
    for padding in (0, 3):
        ids = torch.stack([torch.cat([torch.zeros(padding, dtype=torch.long), r]) for r in (row, other)])
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        prompt = None if prompt_length is None else prompt_length + padding
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, prompt_length=prompt).logits
        assert_same(logits[1, padding : padding + at], logits[0, padding : padding + at], ROUNDING)
        assert (logits[1, padding + at :] - logits[0, padding + at :]).abs().max() > 1e-3


def check_no_gradient_from_later(model: calm.CalmForCausalLM, row: Tensor, at: int, prompt_length: int) -> None:
    """The logits up to `at` have a zero gradient, exactly, with respect to what augmenting layers say later."""
    contexts: list[Tensor] = []

    def track(module: torch.nn.Module, args: tuple) -> tuple:
        hidden, context, *rest = args
        contexts.append(context.detach().clone().requires_grad_())
        return (hidden, contexts[-1], *rest)

    handles = [connection.register_forward_pre_hook(track) for connection in model.connections]
    logits = model(row[None], prompt_length=prompt_length, use_cache=False).logits
    for handle in handles:
        handle.remove()
    direction = torch.randn(logits[:, : at + 1].shape, generator=torch.Generator().manual_seed(0))
    (logits[:, : at + 1] * direction).sum().backward(inputs=contexts)
    first_unseen = at + 1 if model.config.attend == "causal" else min(at + 1, prompt_length)
    assert len(contexts) == len(model.connections)
    for context in contexts:
        assert context.grad[:, first_unseen:].eq(0).all(), "a later augmenting position reaches earlier logits"
        assert context.grad[:, :first_unseen].abs().amax(-1).gt(0).all(), "an earlier augmenting position is not seen"


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=6)
@given(data=st.data())
def test_no_leak(anchor: str, data: st.DataObject) -> None:
    mix = data.draw(strategies.mixes(anchor))
    row = factories.tokens(1, data.draw(st.integers(2, 14)), seed=data.draw(st.integers(0, 99)))[0]
    at = data.draw(st.integers(1, len(row) - 1))
    prompt_length = data.draw(st.integers(1, len(row)))
    check_no_leak(mix.shared(), row, at, prompt_length)
    check_no_gradient_from_later(mix.shared(), row, at, prompt_length)


@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_no_leak_in_long_rows(anchor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a block, so that a connection attends in pieces: here four positions at a time."""
    monkeypatch.setattr(alignment, "BLOCK", 4)
    model = Mix(anchor=anchor).shared()
    row = factories.tokens(1, 14, seed=5)[0]
    for at in (1, 5, 8, 13):
        check_no_leak(model, row, at, None)
        check_no_gradient_from_later(model, row, at, None)


@pytest.mark.parametrize("augmenting", factories.AUGMENTING)
@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_no_leak_from_any_augmenting_model(augmenting: str, attend: str) -> None:
    row = factories.tokens(1, 10, seed=5)[0]
    model = Mix(augmenting=(augmenting,), attend=attend).shared()
    for at in (1, 5, 9):
        check_no_leak(model, row, at, prompt_length=6)
    check_no_gradient_from_later(model, row, 4, prompt_length=6)
    check_no_gradient_from_later(model, row, 8, prompt_length=6)


@pytest.mark.parametrize("anchor", factories.OTHER_ANCHORS)
def test_no_leak_elsewhere(anchor: str) -> None:
    row = factories.tokens(1, 10, seed=5)[0]
    check_no_leak(Mix(anchor=anchor, augmenting=(anchor, "llama")).shared(), row, 5, None)


def test_prompt_mode_shows_nothing_generated() -> None:
    """With attend="prompt" even a position's own token does not reach it through the augmenting model."""
    model = Mix(attend="prompt").shared()
    row = factories.tokens(1, 9)[0]
    inputs: list[Tensor] = []
    handle = model.connections[0].register_forward_hook(lambda module, args, output: inputs.append(args[1]))
    model(row[None], prompt_length=5)
    changed = row.clone()
    changed[5:] = 2
    model(changed[None], prompt_length=5)
    handle.remove()
    assert not torch.equal(inputs[0][:, 5:], inputs[1][:, 5:])
    check_no_gradient_from_later(model, row, 8, prompt_length=5)


# -- negative controls ------------------------------------------------------------------------------------------------


def one_too_many(visible: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(*args: object, **kwargs: object) -> Tensor:
        counts = visible(*args, **kwargs)
        return (counts + 1).clamp(max=int(counts.max()))

    return wrong


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_seeing_one_position_too_many_is_noticed(anchor: str, attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mix(anchor=anchor, attend=attend).shared()
    row = factories.tokens(1, 10, seed=5)[0]
    wrong = one_too_many(calm.model.visible_same_tokenizer)
    monkeypatch.setattr(calm.model, "visible_same_tokenizer", wrong)
    monkeypatch.setattr(
        calm.model, "align_causal", lambda n, slopes, at: align(wrong(n, 0, None, at), n, slopes=slopes)
    )
    with pytest.raises(AssertionError, match="differs by"):
        check_no_leak(model, row, 5, prompt_length=8)
    with pytest.raises(AssertionError, match="a later augmenting position"):
        check_no_gradient_from_later(model, row, 5, prompt_length=8)


def test_a_bidirectional_augmenting_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mix(anchor="gpt2", augmenting=("llama",)).build()
    for module in model.augmenting.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **kwargs: None)
    with pytest.raises(AssertionError, match="differs by"):
        check_no_leak(model, factories.tokens(1, 10, seed=5)[0], 5, None)
