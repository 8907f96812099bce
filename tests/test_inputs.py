"""inputs.py: what a composed model takes and refuses, and why."""

from __future__ import annotations

import re
from typing import Any

import factories
import numpy as np
import pytest
import torch
from factories import Mix, assert_identical, assert_same
from transformers import AutoModelForCausalLM

import calm
from calm import CalmError

IDS = factories.tokens(2, 10)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_input_is_refused(call: str) -> None:
    model = Mix().shared()

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs) if call == "forward" else model.generate(*args, **kwargs | {"max_new_tokens": 2})

    with pytest.raises(CalmError, match=r"\(1, 0\).*at least one token.*beginning-of-sequence"):
        run(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(CalmError, match=r"needs input_ids.*inputs_embeds"):
        run(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match=r"attention_mask has 4 dimensions: expected a tensor of 2|must be 2D"):
        run(IDS, attention_mask=torch.ones(2, 1, 10, 10))
    if call == "forward":
        with pytest.raises(CalmError, match="attention_mask is a dict: expected a tensor"):
            run(IDS, attention_mask={"full_attention": torch.ones(2, 10)})
        with pytest.raises(CalmError, match="attention_mask has 9 columns: expected 10, 0 of the tokens in the cache"):
            run(IDS, attention_mask=torch.ones(2, 9))
        with pytest.raises(CalmError, match="attention_mask has 3 columns: expected 10, 7 of the tokens in the cache"):
            run(IDS[:, 7:], attention_mask=torch.ones(2, 3), past_key_values=run(IDS[:, :7]).past_key_values)
        static = model._new_cache(20)
        run(IDS[:, :7], past_key_values=static)
        with pytest.raises(CalmError, match="attention_mask has 3 columns: expected 10, 7 of the tokens in the cache"):
            run(IDS[:, 7:], attention_mask=torch.ones(2, 3), past_key_values=static)
        with pytest.raises(CalmError, match="attention_mask has 9 columns"):
            model.augmenting_outputs(IDS, torch.ones(2, 9))
    with pytest.raises(CalmError, match=r"65 tokens do not fit.*64 tokens"):
        run(factories.tokens(1, 65 if call == "forward" else 64))  # the last new token is not read
    for wrong in (-1, factories.VOCAB):
        with pytest.raises(CalmError, match=f"input_ids hold {wrong}: expected ids from 0 to 63"):
            run(torch.tensor([[3, wrong, 5]]))
    for shape in ((5,), (1, 2, 5)):
        with pytest.raises(
            CalmError, match=f"input_ids is torch.int64 of shape {re.escape(str(shape))}: expected .*batch, length"
        ):
            run(torch.ones(shape, dtype=torch.long))
    with pytest.raises(
        CalmError, match=r"input_ids is torch.float32 of shape \(1, 2\): expected a tensor of whole numbers"
    ):
        run(torch.ones(1, 2))


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_tokens_that_one_model_has_not(kwargs: dict[str, Any]) -> None:
    """Embeddings padded differently for one tokenizer: the anchor's head would emit what the other cannot read."""
    words, small = factories.word_tokenizer(60), factories.config("gpt2", 24, 4, 2)
    small.vocab_size = 60
    anchor = factories.base("llama")
    with torch.no_grad():
        anchor.lm_head.weight[60:] *= 3
    augmenting = {"small": AutoModelForCausalLM.from_config(small)}
    model = calm.compose(anchor, augmenting, 2, anchor_tokenizer=words, augmenting_tokenizer={"small": words})
    ids, arguments = factories.tokens(4, 5).clamp(max=59), {"max_new_tokens": 12, **kwargs}
    torch.manual_seed(0)
    with model.composition_disabled():
        assert model.generate(ids, **arguments).max() >= 60, "the case that is tested"
    assert model.generate(ids, **arguments).max() < 60
    seen = torch.stack(
        model.generate(ids, suppress_tokens=[5], output_scores=True, return_dict_in_generate=True, **arguments).scores
    )
    assert seen[..., [5, 60, 61, 62, 63]].isneginf().all() and not seen[..., 6:60].isneginf().any(), "both count"
    with torch.no_grad():
        factories.assert_identical(model(ids).logits, anchor(ids).logits)  # those of padding included
    ids[1, 2] = 61
    for call in (model, model.generate, model.augmenting_outputs):
        with pytest.raises(CalmError, match=r"input_ids hold 61: expected ids from 0 to 59, the smallest vocabulary"):
            call(ids)


def test_the_smaller_context_counts() -> None:
    config = factories.config("gpt2", 24, 4, 2)
    config.n_positions = 12
    other = AutoModelForCausalLM.from_config(config)
    model = calm.compose(factories.base("llama"), {"short": other}, 2)
    model(factories.tokens(1, 12))
    with pytest.raises(
        CalmError, match=r"13 tokens do not fit: the context of the augmenting model 'short' is 12 tokens"
    ):
        model(factories.tokens(1, 13))
    with pytest.raises(CalmError, match=r"13 tokens do not fit.*short"):
        model.generate(factories.tokens(1, 9), max_new_tokens=5)
    model.generate(factories.tokens(1, 9), max_new_tokens=4)  # nothing reads the last one
    cache = model(factories.tokens(1, 10)).past_key_values
    with pytest.raises(CalmError, match=r"13 tokens"):
        model(factories.tokens(1, 3), past_key_values=cache)
    with model.composition_disabled():
        model(factories.tokens(1, 13))
    reversed_roles = calm.compose(other, factories.base("llama"), 2)
    with pytest.raises(CalmError, match=r"the context of the anchor is 12"):
        reversed_roles(factories.tokens(1, 13))


def test_prompt_lengths_of_every_kind() -> None:
    model = Mix(attend="prompt").shared()
    expected = model(IDS, prompt_length=4).logits
    for length in (np.int64(4), torch.tensor(4), torch.tensor([4]), torch.tensor([4, 4]), torch.tensor([[4], [4]])):
        assert_identical(model(IDS, prompt_length=length).logits, expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number in (4, 5):
        assert_same(
            compiled(IDS, prompt_length=number, use_cache=False).logits, model(IDS, prompt_length=number).logits
        )


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("wrong", [-1, "3", 2.0, torch.ones(3, dtype=torch.long), torch.ones(2)], ids=repr)
def test_a_prompt_length_that_does_not_fit_is_refused(call: str, wrong: Any) -> None:
    model = Mix(attend="prompt").shared()
    with pytest.raises(CalmError, match=r"prompt_length is .*: expected .*one whole number or a tensor of 2"):
        if call == "forward":
            model(IDS, prompt_length=wrong)
        else:
            model.generate(IDS, prompt_length=wrong, max_new_tokens=2)


def test_what_a_prompt_is_stays_so_in_a_cache() -> None:
    """Known from a number or from labels, which later calls may have, too."""
    model = Mix(attend="prompt").shared()
    labels = IDS.clone()
    labels[:, :4] = -100
    expected = model(IDS, labels=labels)
    assert_same(expected.logits, model(IDS, prompt_length=4).logits)
    for said in ({"labels": labels[:, :7]}, {"prompt_length": 4}):
        first = model(IDS[:, :7], use_cache=True, **said)
        mask = torch.ones_like(IDS)
        rest = model(IDS[:, 7:], attention_mask=mask, past_key_values=first.past_key_values, labels=labels[:, 7:])
        assert_same(torch.cat([first.logits, rest.logits], 1), expected.logits)


@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_in_generation_a_prompt_length_is_each_rows_own(attend: str) -> None:
    """However often a row is answered; one number is that of all rows, also as a tensor; none is the bare anchor's."""
    model = Mix(attend=attend).shared()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    several = options | {"num_beams": 3, "num_return_sequences": 3}
    for one in (4, torch.tensor(4), torch.tensor([4]), torch.tensor([4, 4])):
        assert_identical(
            model.generate(IDS, prompt_length=one, **options), model.generate(IDS, prompt_length=4, **options)
        )
        assert model.generate(IDS, prompt_length=one, **several).shape == (6, 14)
    with model.composition_disabled():
        assert_identical(model.generate(IDS, prompt_length=4, **options), model.generate(IDS, **options))


def test_one_row_of_positions_stands_for_all() -> None:
    """As for the bare anchor, which transformers' own code hands such positions to."""
    model, positions = Mix(anchor="gpt2").shared(), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    assert_identical(model(IDS, position_ids=positions).logits, model(IDS, position_ids=positions.expand(2, -1)).logits)
    found, expected = (model.augmenting_outputs(IDS, position_ids=p) for p in (positions, positions.expand(2, -1)))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_training_on_prompts_needs_to_know_them() -> None:
    """With attend="prompt": without labels the whole row would be the prompt, and of packed rows the first one's."""
    model, positions = Mix(attend="prompt").build(), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    labels = IDS.clone()
    labels[:, :4] = -100
    expected = model(IDS, labels=labels).logits
    model.train()
    with pytest.raises(CalmError, match=r"in training .* where the prompt ends.*label_smoothing_factor"):
        model(IDS)
    assert_identical(model(IDS, prompt_length=4).logits, expected)
    with pytest.raises(CalmError, match=r"packed rows .*one document a row"):
        model(IDS, position_ids=positions, labels=labels)
    model.eval()
    with pytest.raises(CalmError, match="packed rows"):
        model(IDS, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
def test_a_cache_that_an_error_left_uneven_is_refused(part: str) -> None:
    model = Mix(connections=(((0, 0), (3, 3)),)).build()
    cache = model(IDS[:, :5]).past_key_values
    broken = model.anchor.model.layers[1] if part == "anchor" else model.augmenting["m0"].h[1]
    handle = broken.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS[:, 5:6], past_key_values=cache)
    handle.remove()
    with pytest.raises(CalmError, match="left by a pass that ended in the middle"):
        model(IDS[:, 5:6], past_key_values=cache)
    cache.reset()
    assert_same(model(IDS, past_key_values=cache).logits, model(IDS).logits)


def test_a_cache_that_an_error_left_even_goes_on() -> None:
    """Before anything was written, or when everything was."""
    model = Mix().build()
    cache, expected = model(IDS[:, :5]).past_key_values, model(IDS).logits[:, 5:]
    with pytest.raises(RuntimeError):
        model(IDS[:1, 5:], past_key_values=cache, position_ids=torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(CalmError, match="no loss to take"):
        model(IDS[:, 5:6], past_key_values=cache, labels=torch.full((2, 1), -100), skip_logits=True)
    assert_same(model(IDS[:, 6:], past_key_values=cache).logits, expected[:, 1:])


def test_a_cache_with_activation_checkpointing_is_refused() -> None:
    model = Mix().build()
    cache = model(IDS[:, :5]).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(CalmError, match=r"activation checkpointing: .* fill the cache a second time"):
        model(IDS[:, 5:], past_key_values=cache)
    assert model(IDS, use_cache=True).past_key_values is None


def test_labels_without_a_prompt_are_refused() -> None:
    """With attend="prompt" the connections would see nothing, and no training would tell."""
    model = Mix(attend="prompt").shared()
    labels = IDS.clone()
    labels[0, :2] = -100
    with pytest.raises(CalmError, match="the labels of row 1 begin at its first token"):
        model(IDS, labels=labels)
    labels[1, :3], mask = -100, torch.ones_like(IDS)
    mask[1, :3] = 0
    with pytest.raises(CalmError, match="the labels of row 1 begin at its first token"):
        model(IDS, attention_mask=mask, labels=labels)
    model(IDS, labels=labels)
    model(IDS, labels=IDS, prompt_length=4)
    labels[1] = -100  # nothing to learn there
    model(IDS, labels=labels)


def test_kept_outputs_that_do_not_fit_are_refused() -> None:
    model = Mix().shared()
    kept = model.augmenting_outputs(IDS)
    with pytest.raises(CalmError, match=r"and a cache"):
        model(IDS, augmenting_outputs=kept, use_cache=True)
    with pytest.raises(CalmError, match=r"'m0.1': \(2, 10, 24\).*expected .*'m0.1': \(2, 9, 24\)"):
        model(IDS[:, :9], augmenting_outputs=kept)
    with pytest.raises(CalmError, match=r"have the shapes \{'m0.1'.*expected \{'m0.1'.*'m0.3'"):
        model(IDS, augmenting_outputs={"m0.1": kept["m0.1"]})
