"""cache.py: everything that generation does to a cache reaches each of its parts, seen by the logits that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import factories
import pytest
import torch
from factories import Mix, assert_same
from transformers import DynamicCache

import calm

# full attention, sliding windows and ALiBi: caches of three kinds, whose states are cut, kept or forgotten
MIXES = [
    Mix(anchor="llama", augmenting=("gpt2",)),
    Mix(anchor="gemma3_text", augmenting=("gemma2", "llama"), attend="prompt"),
    Mix(anchor="bloom", augmenting=("qwen3", "gemma3_text"), attention="paper"),
]
IDS = factories.tokens(3, 12)
PROMPT = 8


def prefill(model: calm.CalmForCausalLM, static: bool = False) -> calm.CalmCache:
    cache = model._new_cache(20 if static else None)
    with torch.no_grad():
        model(IDS[:, :PROMPT], past_key_values=cache, prompt_length=5)
    return cache


def next_logits(model: calm.CalmForCausalLM, cache: calm.CalmCache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, prompt_length=5).logits


def from_scratch(model: calm.CalmForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, prompt_length=5).logits[:, -new:]


CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
}


@pytest.mark.parametrize(  # a static cache keeps its batch size
    ("name", "static"), [("reorder", False), ("repeat", False), ("select", False), ("reorder", True)]
)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.anchor)
def test_rows(mix: Mix, name: str, static: bool) -> None:
    change, rows = CHANGES[name]
    model = mix.shared()
    cache = prefill(model, static)
    change(cache)
    ids = IDS[rows].clone()
    ids[:, PROMPT:] = factories.tokens(len(rows), 4, seed=9)
    found = torch.cat([next_logits(model, cache, ids[:, i : i + 1]) for i in range(PROMPT, 12)], 1)
    assert_same(found, from_scratch(model, ids, 4))


@pytest.mark.parametrize("name", CHANGES)
def test_each_rows_prompt_goes_with_it(name: str) -> None:
    change, rows = CHANGES[name]
    model, lengths = Mix(attend="prompt").shared(), torch.tensor([3, 5, 7])
    with torch.no_grad():
        cache = model(IDS[:, :PROMPT], prompt_length=lengths).past_key_values
        change(cache)
        ids = IDS[rows].clone()
        ids[:, PROMPT:] = factories.tokens(len(rows), 4, seed=9)
        found = model(ids[:, PROMPT:], past_key_values=cache).logits
        expected = model(ids, use_cache=False, prompt_length=lengths[rows]).logits[:, PROMPT:]
    assert_same(found, expected)


@pytest.mark.parametrize("removed", [1, 3, 6])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.anchor)
def test_crop(mix: Mix, removed: int) -> None:
    model = mix.shared()
    cache = model._new_cache()
    cache.activate_past_recording()
    with torch.no_grad():
        model(IDS[:, :PROMPT], past_key_values=cache, prompt_length=5)
    cache.crop(-removed)
    assert cache.get_seq_length() == PROMPT - removed
    ids = torch.cat([IDS[:, : PROMPT - removed], factories.tokens(3, 2, seed=9)], 1)
    assert_same(next_logits(model, cache, ids[:, -2:]), from_scratch(model, ids, 2))


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.anchor)
def test_reset_of_a_static_cache(mix: Mix) -> None:
    model = mix.shared()
    cache = prefill(model, static=True)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    ids = factories.tokens(3, 7, seed=4)
    assert_same(next_logits(model, cache, ids), from_scratch(model, ids, 7))


@pytest.mark.parametrize(
    ("static", "empty"),
    [(False, lambda cache: cache.reset()), (True, lambda cache: cache.reset()), (False, lambda cache: cache.crop(-3))],
    ids=["reset", "reset-static", "crop"],
)
def test_an_emptied_cache_forgets_how_long_the_prompt_was(static: bool, empty: Callable[[Any], None]) -> None:
    model = MIXES[1].shared()
    cache = model._new_cache(20 if static else None)
    ids = factories.tokens(3, 7, seed=4)
    with torch.no_grad():
        model(IDS[:, :3], past_key_values=cache)
        empty(cache)
        assert_same(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
        last = model(IDS[:, 8:9], past_key_values=cache).logits
        whole = torch.cat([ids, IDS[:, 8:9]], 1)
        assert_same(last, model(whole, use_cache=False, prompt_length=7).logits[:, -1:])


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@pytest.mark.parametrize("augmenting", ["gemma3_text", "mamba"])
def test_lengths(anchor: str, augmenting: str) -> None:
    """Those of the connections: one entry a token, whatever a sliding window or a recurrence forgets."""
    model = Mix(anchor=anchor, augmenting=(augmenting,)).shared()
    cache = prefill(model)
    assert cache.get_seq_length() == PROMPT
    assert cache.get_mask_sizes(2, 0) == (PROMPT + 2, 0)
    assert cache.get_max_length() == -1
    next_logits(model, cache, IDS[:, PROMPT : PROMPT + 1])
    assert cache.get_seq_length() == PROMPT + 1
    assert all(layer.keys.shape[2] == PROMPT + 1 for layer in cache.cross.layers)
    assert not cache.is_compileable


def test_static() -> None:
    model = Mix().shared()
    cache = prefill(model, static=True)
    assert int(cache.get_seq_length()) == PROMPT and cache.get_max_length() == 20
    assert cache.is_compileable


def test_layers_are_those_of_the_parts() -> None:
    model = Mix(augmenting=("gpt2", "mamba")).shared()
    cache = prefill(model)
    parts = [*cache.anchor.layers, *cache.augmenting["m0"].layers, *cache.augmenting["m1"].layers, *cache.cross.layers]
    assert [id(layer) for layer in cache.layers] == [id(layer) for layer in parts]
    assert len(cache.augmenting["m0"].layers) == model.config.augmenting_depth("m0")
    assert len(cache.cross.layers) == len(model.connections)


def test_misuse_is_refused() -> None:
    model = Mix().shared()
    cache = prefill(model)
    with pytest.raises(calm.CalmError, match="written to through its parts"):
        model.anchor(IDS, past_key_values=cache)
    with pytest.raises(calm.CalmError, match="cannot be set"):
        cache.layers = cache.anchor.layers
    with pytest.raises(calm.CalmError, match=r"DynamicCache.*expected a CalmCache"):
        model(IDS, past_key_values=DynamicCache())
    with pytest.raises(calm.CalmError, match=r"DynamicCache.*expected a CalmCache"):
        model.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=1)
    with pytest.raises(calm.CalmError, match="'quantized'"):
        model.generate(IDS, cache_implementation="quantized", max_new_tokens=1)
