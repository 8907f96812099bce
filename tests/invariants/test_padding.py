"""Invariant 3: padding is inert: rows padded on either side equal the single row, in logits, loss and generation."""

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

import calm


def check_padding_inert(
    model: calm.CalmForCausalLM, rows: list[Tensor], side: str, prompt_length: int | None = None, fill: int = 0
) -> None:
    """Each row's logits in the padded batch are those of the row alone; which token fills the padding is no matter."""
    ids, mask, positions = factories.padded(rows, side, fill)
    prompt = None
    if prompt_length is not None:
        shift = [ids.shape[1] - len(row) if side == "left" else 0 for row in rows]
        prompt = torch.tensor([prompt_length + n for n in shift])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, prompt_length=prompt).logits
        for row, row_mask, found in zip(rows, mask.bool(), logits, strict=True):
            alone = model(row[None], prompt_length=prompt_length).logits[0]
            assert_same(found[row_mask], alone)


def check_generation_ignores_padding(model: calm.CalmForCausalLM, rows: list[Tensor], **kwargs: object) -> None:
    """Each step's logits of a left-padded batch are those of the row alone."""
    kwargs |= {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids, mask, _ = factories.padded(rows, "left")
    batch = model.generate(ids, attention_mask=mask, **kwargs)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], **kwargs)
        for found, expected in zip(batch.logits, alone.logits, strict=True):
            assert_same(found[i], expected[0])


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=6)
@given(data=st.data())
def test_padding_is_inert(anchor: str, data: st.DataObject) -> None:
    mix = data.draw(strategies.mixes(anchor))
    rows = data.draw(strategies.rows(min_rows=2))
    side, fill = data.draw(st.sampled_from(("left", "right"))), data.draw(st.integers(0, 5))
    prompt_length = data.draw(st.integers(1, 8)) if mix.attend == "prompt" else None
    check_padding_inert(mix.shared(), rows, side, prompt_length, fill)


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_generation_ignores_padding(anchor: str, attend: str) -> None:
    model = Mix(anchor=anchor, augmenting=("gemma3_text", "mamba"), attend=attend).shared()
    check_generation_ignores_padding(model, [factories.tokens(1, n, seed=n)[0] for n in (8, 3, 1)])


@pytest.mark.parametrize("augmenting", factories.AUGMENTING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_inert_in_any_augmenting_model(augmenting: str, side: str) -> None:
    model = Mix(anchor="qwen3", augmenting=(augmenting,)).shared()
    check_padding_inert(model, [factories.tokens(1, n, seed=n)[0] for n in (9, 4, 1)], side)


@pytest.mark.parametrize("anchor", factories.OTHER_ANCHORS)
def test_padding_is_inert_elsewhere(anchor: str) -> None:
    rows = [factories.tokens(1, n, seed=n)[0] for n in (9, 4, 1)]
    model = Mix(anchor=anchor, augmenting=(anchor, "llama")).shared()
    for side in ("left", "right"):
        check_padding_inert(model, rows, side)


@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "bloom", "opt"])
def test_left_padding_is_inert_without_position_ids(anchor: str) -> None:
    """Anchors that count positions relatively or from the mask need no position_ids; augmenting models never do."""
    model = Mix(anchor=anchor, augmenting=("gpt2", "gpt_neo")).shared()
    rows = [factories.tokens(1, n, seed=n)[0] for n in (9, 4)]
    ids, mask, _ = factories.padded(rows, "left")
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask, _ = factories.padded(rows, side)
            logits = model(ids, attention_mask=mask).logits
            for row, row_mask, found in zip(rows, mask.bool(), logits, strict=True):
                assert_same(found[row_mask], model(row[None]).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_as_long_as_a_static_cache(side: str) -> None:
    """Without position_ids, in two calls: the columns that count are those of the new tokens, not the mask's last."""
    model = Mix(augmenting=("gpt2", "llama")).shared()
    ids, mask, _ = factories.padded([factories.tokens(1, n, seed=n)[0] for n in (9, 4)], side)
    longer = torch.nn.functional.pad(mask, (0, 20 - mask.shape[1]))
    cache = model._new_cache(20)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        calls = [model(part, attention_mask=longer, past_key_values=cache).logits for part in ids.split([6, 3], 1)]
    assert_same(torch.cat(calls, 1)[mask.bool()], expected[mask.bool()])


def test_masked_tokens_in_the_middle_are_not_seen() -> None:
    """A masked token changes nothing after it, wherever it stands."""
    model = Mix(augmenting=("llama",)).shared()
    ids = factories.tokens(1, 9).repeat(2, 1)
    ids[1, 4] = 2 + (ids[0, 4] - 1) % 50
    mask = torch.ones_like(ids)
    mask[:, 4] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    keep = mask[0].bool()
    assert_same(logits[1, keep], logits[0, keep])


@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_loss_ignores_padding(attend: str) -> None:
    """The loss of a padded batch is the mean over all completions' tokens, each as in the row alone."""
    model = Mix(attend=attend, augmenting=("gpt2", "llama")).shared()
    rows = [factories.tokens(1, n, seed=n)[0] for n in (9, 5)]
    completions = (4, 2)
    for side in ("left", "right"):
        ids, mask, positions = factories.padded(rows, side)
        labels = torch.full_like(ids, -100)
        alone = []
        for i, (row, completion) in enumerate(zip(rows, completions, strict=True)):
            end = ids.shape[1] if side == "left" else len(row)
            labels[i, end - completion : end] = row[-completion:]
            own = row.clone()
            own[:-completion] = -100
            alone.append(model(row[None], labels=own[None]).loss * completion)
        with torch.no_grad():
            loss = model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss
        assert_same(loss, sum(alone) / sum(completions))


# -- negative controls ------------------------------------------------------------------------------------------------


def padding_forgotten(align: Callable) -> Callable:
    def wrong(
        visible: Tensor, key_length: int, padding_mask: Tensor | None = None, *args: object, **kwargs: object
    ) -> object:
        return align(visible, key_length, None, *args, **kwargs)

    return wrong


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_connections_that_see_padding_are_noticed(anchor: str, attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mix(anchor=anchor, attend=attend).shared()
    rows = [factories.tokens(1, n, seed=n)[0] for n in (9, 4)]
    monkeypatch.setattr(calm.model, "align", padding_forgotten(calm.model.align))
    with pytest.raises(AssertionError, match="differs by"):
        check_padding_inert(model, rows, "left", prompt_length=3)
    with pytest.raises(AssertionError, match="differs by"):
        check_generation_ignores_padding(model, rows)


@pytest.mark.parametrize("augmenting", factories.AUGMENTING)
def test_an_augmenting_model_that_reads_padding_is_noticed(augmenting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mix(augmenting=(augmenting,)).shared()
    run = model._run_augmenting

    def wrong(ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: object) -> dict[str, Tensor]:
        return run(ids, None, positions, cache)

    monkeypatch.setattr(model, "_run_augmenting", wrong)
    rows = [factories.tokens(1, n, seed=n)[0] for n in (9, 4)]
    with pytest.raises(AssertionError, match="differs by"):
        check_padding_inert(model, rows, "left")


def test_counting_padding_as_distance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALiBi distances are counted in tokens: masks alone do not make padding in the middle of the keys inert."""
    model = Mix(augmenting=("llama",)).shared()
    align = calm.model.align

    def wrong(*args: object, **kwargs: object) -> object:
        right = align(*args, **kwargs)
        right.counts = right.counts + torch.arange(right.counts.shape[1]).remainder(3)  # of the column, not the token
        return right

    monkeypatch.setattr(calm.model, "align", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        check_padding_inert(model, [factories.tokens(1, n, seed=n)[0] for n in (9, 4)], "left")
