"""Invariant 4: cached decoding equals uncached decoding, in each step's logits, for every strategy of `generate`.

The reference is always one uncached forward pass over the final sequences. Logits are compared, never tokens: a model
that emits one token only would hide every mistake.
"""

from __future__ import annotations

from typing import Any

import factories
import pytest
import strategies
import torch
from factories import EOS, Mix, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, PreTrainedModel

import calm
from calm.attention import Connection

NEW_TOKENS = 6

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "static": {"cache_implementation": "static"},
    "static-beam": {"cache_implementation": "static", "num_beams": 3, "num_return_sequences": 3},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "end-of-sequence": {"do_sample": True, "eos_token_id": list(range(EOS, 20)), "pad_token_id": 0},
    "uncached": {"use_cache": False},
    "uncached-beam": {"use_cache": False, "num_beams": 2},
}
SINGLE_ROW: dict[str, dict[str, Any]] = {  # transformers offers these for one row only
    "prompt-lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "assisted": {"assistant_model": "the anchor"},
    "assisted-sampling": {"assistant_model": "the anchor", "do_sample": True, "top_k": 0},
}


def uncached_logits(model: PreTrainedModel, sequences: Tensor, prompt_mask: Tensor) -> Tensor:
    """Logits of one pass over whole sequences; each row of `prompt_mask` serves its share of the sequences."""
    mask = prompt_mask.repeat_interleave(len(sequences) // len(prompt_mask), 0)
    new = sequences.shape[1] - mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    if isinstance(model, calm.CalmForCausalLM):
        arguments["prompt_length"] = prompt_mask.shape[1]
    with torch.no_grad():
        return model(sequences, **arguments).logits


def check_steps(model: PreTrainedModel, output: Any, prompt_mask: Tensor) -> None:
    """Each step's logits, of the beam that each token came from, are the uncached ones."""
    prompt = prompt_mask.shape[1]
    steps = len(output.logits)
    assert steps >= output.sequences.shape[1] - prompt > 0
    expected = uncached_logits(model, output.sequences, prompt_mask)
    origins = getattr(output, "beam_indices", None)
    compared = 0
    for step in range(output.sequences.shape[1] - prompt):
        for row in range(len(output.sequences)):
            origin = row if origins is None else int(origins[row, step])
            if origin >= 0:  # a beam that has ended has none
                assert_same(output.logits[step][origin], expected[row, prompt - 1 + step])
                compared += 1
    assert compared >= len(output.sequences)


def check_decoding(model: PreTrainedModel, rows: list[Tensor], seed: int = 0, **kwargs: Any) -> Any:
    ids, mask, _ = factories.padded(rows, "left")
    if kwargs.get("assistant_model") == "the anchor":
        kwargs["assistant_model"] = model.anchor
    torch.manual_seed(seed)
    output = model.generate(
        ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs,
    )
    check_steps(model, output, mask)
    return output


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=10)
@given(data=st.data())
def test_every_strategy(anchor: str, data: st.DataObject) -> None:
    mix = data.draw(strategies.mixes(anchor))
    name = data.draw(st.sampled_from(sorted({**STRATEGIES, **SINGLE_ROW})))
    rows = data.draw(strategies.rows(max_rows=1 if name in SINGLE_ROW else 3, max_length=10))
    kwargs = {**STRATEGIES, **SINGLE_ROW}[name]
    model = mix.shared()
    if "gpt_neo" in (anchor, *mix.augmenting) and name.startswith("static"):
        with pytest.raises(calm.CalmError, match="static cache"):
            check_decoding(model, rows, **kwargs)
    elif "mamba" in mix.augmenting and (name in SINGLE_ROW or name == "chunked-prefill"):
        with pytest.raises(ValueError, match=r"recurrent|stateful"):
            check_decoding(model, [torch.cat([row, row, row, row]) for row in rows], **kwargs)
    else:
        check_decoding(model, rows, seed=data.draw(st.integers(0, 99)), **kwargs)


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "bloom"])
def test_batches_of_different_lengths(anchor: str, name: str, attend: str) -> None:
    augmenting = ("gpt2", "gemma2") if name == "chunked-prefill" else ("gpt2", "mamba")
    model = Mix(anchor=anchor, augmenting=augmenting, attend=attend).shared()
    check_decoding(model, [factories.tokens(1, n, seed=n)[0] for n in (9, 4, 1)], **STRATEGIES[name])


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("name", SINGLE_ROW)
@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "bloom"])
def test_single_rows(anchor: str, name: str, attend: str) -> None:
    model = Mix(anchor=anchor, augmenting=("gpt2", "gemma3_text"), attend=attend).shared()
    row = factories.tokens(1, 4, seed=3)[0].repeat(3)  # repeats itself, so that prompt lookup finds candidates
    check_decoding(model, [row], **SINGLE_ROW[name])


@pytest.mark.parametrize(
    ("augmenting", "name"),
    [
        (augmenting, name)
        for augmenting in factories.AUGMENTING
        for name in ("greedy", "beam", "static", "static-beam")
        if not (augmenting == "gpt_neo" and name.startswith("static"))  # refused, see below
    ],
)
def test_any_augmenting_model(augmenting: str, name: str) -> None:
    model = Mix(augmenting=(augmenting,)).shared()
    check_decoding(model, [factories.tokens(1, n, seed=n)[0] for n in (9, 4)], **STRATEGIES[name])


@pytest.mark.parametrize("anchor", factories.OTHER_ANCHORS)
@pytest.mark.parametrize("name", ["greedy", "beam", "static"])
def test_elsewhere(anchor: str, name: str) -> None:
    model = Mix(anchor=anchor, augmenting=(anchor, "llama")).shared()
    check_decoding(model, [factories.tokens(1, n, seed=n)[0] for n in (9, 4)], **STRATEGIES[name])


@pytest.mark.parametrize("negative", [None, factories.tokens(2, 3, seed=8)], ids=["last-token", "negative-prompt"])
@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_guidance(attend: str, negative: Tensor | None) -> None:
    """The unconditional passes are the processor's own, with a cache apart from the generation's."""
    model = Mix(augmenting=("llama",), attend=attend).shared()
    arguments = {"guidance_scale": 3.0, "max_new_tokens": NEW_TOKENS, "output_scores": True}
    arguments |= {"return_dict_in_generate": True, "do_sample": False, "negative_prompt_ids": negative}
    cached, uncached = (model.generate(factories.tokens(2, 7), use_cache=kept, **arguments) for kept in (True, False))
    for found, expected in zip(uncached.scores, cached.scores, strict=True):
        assert_same(found, expected)


def test_sampling_draws_the_same_tokens_with_and_without_a_cache() -> None:
    model = Mix(augmenting=("gpt2", "mamba")).shared()
    rows = [factories.tokens(1, n, seed=n)[0] for n in (9, 4)]
    sequences = [
        check_decoding(model, rows, seed=5, do_sample=True, top_k=0, **kwargs).sequences
        for kwargs in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert torch.equal(sequences[0], sequences[1]) and torch.equal(sequences[0], sequences[2])
    assert len(sequences[0][:, 9:].unique()) > 6


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("anchor", ["llama", "gemma3_text"])
def test_as_assistant(anchor: str, attend: str) -> None:
    """The composition drafts for its anchor: both the anchor's steps and the drafts' are the uncached ones."""
    model = Mix(anchor=anchor, augmenting=("gpt2",), attend=attend).build()
    target = Mix(anchor=anchor).anchor_model()
    row = factories.tokens(1, 7)[0]
    drafts = []
    generate = model.generate

    def record(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        drafts.append((kwargs["input_ids"].shape[1], output))
        return output

    model.generate = record
    check_decoding(target, [row], assistant_model=model, max_new_tokens=12)
    assert len(drafts) >= 1
    if attend == "causal":  # in the other mode, what counts as the prompt grows from draft to draft
        for length, output in drafts:
            expected = uncached_logits(model, output.sequences, torch.ones(1, length, dtype=torch.long))
            for step, found in enumerate(output.scores):
                assert_same(found[0], expected[0, length - 1 + step])


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("anchor", ["llama", "gemma2", "falcon", "gpt_neo"])
@pytest.mark.parametrize("lengths", [(6,), (6, 3)])
def test_continuing_from_a_returned_cache(anchor: str, attend: str, lengths: tuple[int, ...]) -> None:
    """A second turn, with several new tokens, goes on from the first one's cache."""
    model = Mix(anchor=anchor, augmenting=("gpt2", "gemma3_text"), attend=attend).shared()
    rows = [factories.tokens(1, n, seed=n)[0] for n in lengths]
    first = check_decoding(model, rows)
    _, mask, _ = factories.padded(rows, "left")
    ids = torch.cat([first.sequences, factories.tokens(len(rows), 3, seed=9)], 1)
    full_mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], 1)
    second = model.generate(
        ids,
        attention_mask=full_mask,
        past_key_values=first.past_key_values,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = uncached_logits(model, second.sequences, mask)  # the prompt is still the first turn's
    for step, found in enumerate(second.logits):
        assert_same(found, expected[:, ids.shape[1] - 1 + step])


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=4)
@given(data=st.data())
def test_any_split_into_calls(anchor: str, data: st.DataObject) -> None:
    """A sequence in pieces of any size, through `forward`, gives the logits of one pass."""
    augmenting = tuple(a for a in data.draw(st.permutations(factories.ANCHORS)))[:2]
    mix = data.draw(strategies.mixes(anchor, augmenting=augmenting))
    model = mix.shared()
    pieces = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    ids = factories.tokens(2, sum(pieces), seed=data.draw(st.integers(0, 99)))
    cache, found = None, []
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    assert cache.get_seq_length() == ids.shape[1]
    expected = uncached_logits(model, ids, torch.ones(2, pieces[0], dtype=torch.long))
    assert_same(torch.cat(found, 1), expected)


def test_flash_attention_is_told_which_slots_of_a_static_cache_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mask, which transformers leaves out where nothing is padded, unless the model asks for flash attention."""
    model, ids = factories.Mix().shared(), factories.tokens(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "num_return_sequences": 2}
    expected, masks = model.generate(ids, num_beams=2, **options), []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        masks.append(kwargs["attention_mask"])

    monkeypatch.setattr(calm.generation, "is_flash_attention_requested", lambda config: config.model_type == "llama")
    handle = model.anchor.register_forward_pre_hook(record, with_kwargs=True)
    found = model.generate(ids, num_beams=2, **options)
    handle.remove()
    assert masks and all(mask is not None and mask[:, :5].all() for mask in masks)
    factories.assert_identical(found, expected)


def test_a_cache_that_is_given_is_marked_as_the_users() -> None:
    """As transformers does, which then leaves no token in it that was drawn too late (on `mps`)."""
    model, ids = factories.Mix().shared(), factories.tokens(1, 5)
    cache = model(ids[:, :3]).past_key_values
    model.generate(ids, past_key_values=cache, max_new_tokens=2)
    assert cache._is_user_defined


def test_static_cache_is_refused_where_it_is_wrong() -> None:
    """gpt_neo takes the cache's length for the sequence's: wrong on its own too, so it is not a matter of composing."""
    for mix in (Mix(anchor="gpt_neo"), Mix(augmenting=("gpt_neo",))):
        with pytest.raises(calm.CalmError, match="'gpt_neo' gives wrong results with a static cache"):
            mix.shared().generate(factories.tokens(1, 4), cache_implementation="static", max_new_tokens=2)


def test_a_recurrent_model_refuses_several_tokens_after_a_cache() -> None:
    """In transformers it would silently start anew (`selective_scan` takes no initial state)."""
    model = Mix(augmenting=("mamba",)).shared()
    ids = factories.tokens(1, 8)
    cache = model(ids[:, :4]).past_key_values
    with pytest.raises(calm.CalmError, match="recurrent"):
        model(ids[:, 4:], past_key_values=cache)
    found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4, 8)]
    assert_same(torch.cat(found, 1), model(ids).logits[:, 4:])


# -- negative controls ------------------------------------------------------------------------------------------------

ROWS = [factories.tokens(1, n, seed=n)[0] for n in (9, 4)]


@pytest.mark.parametrize("name", ["greedy", "sampling", "beam", "static", "static-beam"])
@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "bloom"])
def test_stale_connections_are_noticed(anchor: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections whose keys and values stop growing: generated tokens never reach them."""
    forward = Connection.forward

    def wrong(self: Connection, hidden: Tensor, context: Tensor, alignment: Any, cache_layer: Any = None) -> Tensor:
        if cache_layer is not None and cache_layer.get_seq_length() > 0:
            context = torch.zeros_like(context)
        return forward(self, hidden, context, alignment, cache_layer)

    model = Mix(anchor=anchor).shared()
    monkeypatch.setattr(Connection, "forward", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        check_decoding(model, ROWS, **STRATEGIES[name])


@pytest.mark.parametrize("name", ["greedy", "static", "chunked-prefill"])
@pytest.mark.parametrize("augmenting", [a for a in factories.AUGMENTING if a not in ("mamba", "gpt_neo")])
def test_an_augmenting_model_without_a_cache_is_noticed(
    augmenting: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read the last token as if nothing had gone before."""
    model = Mix(augmenting=(augmenting,)).shared()
    run = model.augmenting["m0"].forward

    def wrong(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        return run(input_ids, **kwargs | {"attention_mask": None, "use_cache": False})

    monkeypatch.setattr(model.augmenting["m0"], "forward", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        check_decoding(model, ROWS[:1], **STRATEGIES[name])


@pytest.mark.parametrize("part", ["cross", "augmenting", "anchor"])
@pytest.mark.parametrize("name", ["beam", "static-beam"])
def test_a_part_that_does_not_follow_the_beams_is_noticed(
    part: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: calm.CalmCache, beam_idx: Tensor) -> None:
        parts: dict[str, list[Cache]] = {
            "anchor": [self.anchor],
            "augmenting": list(self.augmenting.values()),
            "cross": [self.cross],
        }
        for name, caches in parts.items():
            for cache in caches:
                if name != part:
                    cache.reorder_cache(beam_idx)

    monkeypatch.setattr(calm.CalmCache, "reorder_cache", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        check_decoding(Mix().shared(), ROWS, **STRATEGIES[name])


@pytest.mark.parametrize("part", ["cross", "augmenting"])
def test_a_part_that_is_not_rolled_back_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted decoding takes rejected drafts out of the cache: out of every part of it."""

    def wrong(self: calm.CalmCache, tokens_to_remove: int) -> None:
        for cache in (self.anchor, *self.augmenting.values(), self.cross):
            broken = {"cross": cache is self.cross, "augmenting": cache in self.augmenting.values()}[part]
            for layer in cache.layers:
                if broken:  # as many entries as there should be, but the first ones
                    length = layer.keys.shape[-2] + min(tokens_to_remove, 0)
                    layer.keys, layer.values = layer.keys[:, :, -length:], layer.values[:, :, -length:]
                else:
                    layer.crop(tokens_to_remove)

    monkeypatch.setattr(calm.CalmCache, "crop", wrong)
    model = Mix(augmenting=("llama",)).shared()
    with pytest.raises(AssertionError, match="differs by"):
        check_decoding(model, [factories.tokens(1, 4, seed=3)[0].repeat(3)], **SINGLE_ROW["prompt-lookup"])


def test_a_growing_prompt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """attend="prompt" with everything generated counted as prompt, once there is a cache."""
    model = Mix(attend="prompt").shared()
    count = calm.model.visible_same_tokenizer

    def wrong(query_length: int, past_length: Any, prompt_length: Any, device: Any) -> Tensor:
        return count(query_length, past_length, factories.CONTEXT if past_length else prompt_length, device)

    monkeypatch.setattr(calm.model, "visible_same_tokenizer", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        check_decoding(model, ROWS)
