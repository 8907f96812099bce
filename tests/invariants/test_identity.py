"""Invariant 1: a new composition starts as the anchor, bit for bit; `composition_disabled()` always is the anchor."""

from __future__ import annotations

from contextlib import nullcontext

import factories
import pytest
import strategies
import torch
from factories import Mix, assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import calm


def bare_anchor(mix: Mix) -> PreTrainedModel:
    """As it is loaded: its weights say that they require gradients, for which torch chooses kernels, too."""
    return mix.anchor_model()


def check_is_anchor(model: calm.CalmForCausalLM, mix: Mix, rows: list[Tensor], side: str) -> None:
    """The model's logits and loss are those of an anchor that no composition ever touched."""
    anchor = bare_anchor(mix)
    ids, mask, positions = factories.padded(rows, side)
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100).masked_fill(mask == 0, -100)  # from the second token on
    calls = [
        {"attention_mask": mask},
        {"attention_mask": mask, "position_ids": positions},
        # a composition keeps no cache while it is given labels; where keys come from is a matter of kernels
        {"attention_mask": mask, "position_ids": positions, "labels": labels, "use_cache": False},
    ]
    if mask.all():
        calls += [{}, {"labels": labels, "use_cache": False}, {"logits_to_keep": 1}]
    for call in calls:
        found, expected = model(ids, **call), anchor(ids, **call)
        assert_identical(found.logits, expected.logits)
        if "labels" in call and len(ids[0]) > 1:
            assert_identical(found.loss, expected.loss)


def check_generates_like_anchor(model: calm.CalmForCausalLM, mix: Mix, rows: list[Tensor], **kwargs: object) -> None:
    ids, mask, _ = factories.padded(rows, "left")
    kwargs |= {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=mask, **kwargs)
    expected = bare_anchor(mix).generate(ids, attention_mask=mask, **kwargs)
    assert_identical(found.sequences, expected.sequences)
    for step, expected_step in zip(found.logits, expected.logits, strict=True):
        assert_identical(step, expected_step)


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=5)
@given(data=st.data())
def test_fresh_composition_is_the_anchor(anchor: str, data: st.DataObject) -> None:
    mix = data.draw(strategies.mixes(anchor))
    rows, side = data.draw(strategies.rows()), data.draw(st.sampled_from(("left", "right")))
    check_is_anchor(mix.fresh(), mix, rows, side)


@pytest.mark.parametrize("anchor", factories.OTHER_ANCHORS)
def test_fresh_composition_is_the_anchor_elsewhere(anchor: str) -> None:
    mix = Mix(anchor=anchor, augmenting=(anchor, "llama"))
    check_is_anchor(mix.fresh(), mix, [factories.tokens(1, n)[0] for n in (9, 5)], "left")


@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_fresh_composition_generates_like_the_anchor(anchor: str) -> None:
    mix = Mix(anchor=anchor, augmenting=("llama", "mamba"))
    rows = [factories.tokens(1, n, seed=n)[0] for n in (7, 3)]
    model = mix.fresh()
    check_generates_like_anchor(model, mix, rows)
    check_generates_like_anchor(model, mix, rows, num_beams=2)


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=2)
@given(data=st.data())
def test_disabled_composition_is_the_anchor(anchor: str, data: st.DataObject) -> None:
    mix = data.draw(strategies.mixes(anchor))
    model = mix.shared()
    rows, side = data.draw(strategies.rows()), data.draw(st.sampled_from(("left", "right")))
    with model.composition_disabled():
        check_is_anchor(model, mix, rows, side)
        check_generates_like_anchor(model, mix, rows, do_sample=False)
    ids, mask, _ = factories.padded(rows, side)
    with pytest.raises(AssertionError, match="not bit for bit"):  # and it is the composition again
        assert_identical(model(ids, attention_mask=mask).logits, bare_anchor(mix)(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("attention", ["gated", "normalized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fresh_composition_is_the_anchor_in_half_precision(dtype: torch.dtype, attention: str) -> None:
    mix = Mix(anchor="gemma2", augmenting=("llama",))
    anchor = mix.anchor_model().to(dtype)
    model = calm.compose(mix.anchor_model().to(dtype), mix.augmenting_models(), 2, attention=attention)
    ids = factories.tokens(2, 9)
    assert model(ids).logits.dtype == anchor(ids).logits.dtype == dtype
    assert_identical(model(ids).logits, anchor(ids).logits)


def test_disabled_composition_runs_no_augmenting_model() -> None:
    model = Mix().shared()
    calls = []
    handle = model.augmenting["m0"].register_forward_hook(lambda *args: calls.append(args))
    with model.composition_disabled():
        model(factories.tokens(1, 5))
        model.generate(factories.tokens(1, 5), max_new_tokens=2)
    handle.remove()
    assert not calls


def test_disabled_composition_generates_with_its_own_settings() -> None:
    """Those that a composition saves, as it does when it is not disabled; the anchor's stay as they are."""
    model = Mix().build()
    model.anchor.generation_config.repetition_penalty = 5.0
    model.generation_config.max_new_tokens = 3
    before = model.anchor.generation_config.to_dict()
    ids = factories.tokens(2, 5)
    with model.composition_disabled():
        found = model.generate(ids)
    assert model.anchor.generation_config.to_dict() == before
    model.anchor.generation_config = model.generation_config
    expected = model.anchor.generate(ids)
    assert found.shape == (2, 8) and torch.equal(found, expected)


def test_disabled_composition_refuses_a_cache_of_the_composition() -> None:
    model = Mix().shared()
    cache = model(factories.tokens(1, 5)).past_key_values
    with model.composition_disabled(), pytest.raises(calm.CalmError, match="disabled"):
        model(factories.tokens(1, 1), past_key_values=cache)


# -- negative controls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "name"), [("gated", "gate.bias"), ("gated", "gate.weight"), ("normalized", "w_o.weight")]
)
@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_one_small_weight_is_noticed(anchor: str, attention: str, name: str) -> None:
    mix = Mix(anchor=anchor, attention=attention)
    model = mix.fresh()
    model.connections[0].get_parameter(name).data.view(-1)[0] = 1e-3
    with pytest.raises(AssertionError, match="not bit for bit"):
        check_is_anchor(model, mix, [factories.tokens(1, 8)[0]], "left")


def test_a_switch_that_switches_nothing_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix()
    model = mix.shared()
    monkeypatch.setattr(calm.CalmForCausalLM, "composition_disabled", lambda self: nullcontext(self))
    rows = [factories.tokens(1, 8)[0]]
    with model.composition_disabled():
        with pytest.raises(AssertionError):
            check_is_anchor(model, mix, rows, "left")
        with pytest.raises(AssertionError):
            check_generates_like_anchor(model, mix, rows)
