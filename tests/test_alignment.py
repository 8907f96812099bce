"""alignment.py: who sees what and from how far, against a count by hand over every single position."""

from __future__ import annotations

import itertools
import math

import factories
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

import calm
from calm.alignment import Alignment, align, align_causal, document_lengths, visible_same_tokenizer
from calm.attention import alibi_slopes

INFINITY = float("inf")


def by_hand(
    past: int,
    length: int,
    key_length: int,
    prompt: list[int] | None,
    mask: list[list[int]] | None,
    documents: list[list[int]] | None,
    slopes: list[float] | None,
    rows: int,
) -> tuple[list, list]:
    """Bias and sight of every row, head, query and key, position by position."""
    bias, sight = [], []
    for row in range(rows):
        row_bias: list = [[] for _ in slopes or [0.0]]
        row_sight = []
        for query in range(past, past + length):
            count = query + 1 if prompt is None else min(query + 1, prompt[row])
            seen = [
                key < count
                and (mask is None or (key < len(mask[row]) and mask[row][key] == 1))
                and (documents is None or documents[row][key] == documents[row][query])
                for key in range(key_length)
            ]
            row_sight.append(any(seen))
            for head, slope in enumerate(slopes or [0.0]):
                between = [  # tokens after this key, up to the last position that is looked at
                    sum(mask is None or (k < len(mask[row]) and mask[row][k] == 1) for k in range(key + 1, count))
                    for key in range(key_length)
                ]
                row_bias[head].append([-slope * n if s else -INFINITY for n, s in zip(between, seen, strict=True)])
        bias.append(row_bias)
        sight.append(row_sight)
    return bias, sight


def bias_of(alignment: Alignment, length: int, key_length: int, block: int = 512) -> torch.Tensor:
    """The whole bias of the last positions, put together from its blocks; keys that a block leaves out are hidden."""
    with factories.patched(calm.alignment, BLOCK=block, SMALLEST_BLOCK=1):
        blocks = list(alignment.blocks(length, key_length, torch.float32))
    assert [i for rows, _, _ in blocks for i in range(length)[rows]] == list(range(length)), "each position once"
    most = block if alignment.shifts else max(block // max(len(alignment.visible), len(alignment.counts)), 1)
    assert all(bias.shape[2:] == (rows.stop - rows.start, keys) for rows, keys, bias in blocks)
    assert max(bias.shape[2] for _, _, bias in blocks) <= most
    hidden = [torch.nn.functional.pad(bias, (0, key_length - keys), value=-INFINITY) for _, keys, bias in blocks]
    return torch.cat(hidden, 2)


def check(alignment: Alignment, bias: list, sight: list, rows: int, block: int) -> None:
    found = bias_of(alignment, len(sight[0]), len(bias[0][0][0]), block)
    found = found.expand(rows, *found.shape[1:])
    sees = torch.ones(rows, found.shape[2], 1, dtype=torch.bool) if alignment.sees is None else alignment.sees
    assert sees.expand(rows, -1, -1).squeeze(-1).tolist() == sight
    assert found.dtype == torch.float32
    for row in range(rows):
        for query in range(found.shape[2]):
            if sight[row][query]:
                expected = torch.tensor([head[query] for head in bias[row]])
                torch.testing.assert_close(found[row, :, query], expected)
            else:  # a softmax over nothing would be NaN
                assert found[row, :, query].isfinite().any(-1).all()


@settings(max_examples=150)
@given(data=st.data())
def test_against_a_count_by_hand(data: st.DataObject) -> None:
    rows, length, past = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5))
    total = past + length
    empty = data.draw(st.integers(0, 3))  # places of a static cache that are not filled yet
    prompt = data.draw(st.none() | st.lists(st.integers(0, total), min_size=rows, max_size=rows))
    bits = st.lists(st.integers(0, 1), min_size=total, max_size=total)
    mask = data.draw(st.none() | st.lists(bits, min_size=rows, max_size=rows))
    slopes = data.draw(st.none() | st.sampled_from(([1.0, 0.25], [0.5])))
    visible = visible_same_tokenizer(
        length,
        torch.tensor(past) if empty else past,
        None if prompt is None else torch.tensor(prompt),
        torch.device("cpu"),
    )
    alignment = align(
        visible,
        total + empty,
        None if mask is None else torch.tensor(mask),
        None,
        None if slopes is None else torch.tensor(slopes),
        may_be_blind=prompt is not None,
    )
    block = data.draw(st.integers(1, 10))
    check(alignment, *by_hand(past, length, total + empty, prompt, mask, None, slopes, rows), rows, block)


@settings(max_examples=50)
@given(data=st.data())
def test_packed_documents_against_a_count_by_hand(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = find_packed_sequence_indices(positions)
    if documents is None:
        documents = torch.zeros_like(positions)
    assert document_lengths(documents) == lengths
    assert document_lengths(documents.expand(2, -1)) == lengths * 2
    total, slopes = sum(lengths), [1.0, 0.5]
    visible = visible_same_tokenizer(total, 0, None, torch.device("cpu"))
    alignment = align(visible, total, None, documents, torch.tensor(slopes))
    block = data.draw(st.integers(1, 10))
    check(alignment, *by_hand(0, total, total, None, None, documents.tolist(), slopes, 1), 1, block)


@settings(max_examples=50)
@given(data=st.data())
def test_causal_pieces_against_a_count_by_hand(data: st.DataObject) -> None:
    """Rows that start here, whole and in blocks of any size, also the last few positions of them alone."""
    length, block = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 10))
    count = data.draw(st.integers(1, length))
    slopes = data.draw(st.none() | st.sampled_from(([1.0, 0.25], [0.5])))
    causal = align_causal(length, None if slopes is None else torch.tensor(slopes), torch.device("cpu"))
    bias, sight = by_hand(0, length, length, None, None, None, slopes, 1)
    torch.testing.assert_close(bias_of(causal, count, length, block), torch.tensor(bias)[:, :, length - count :])
    assert causal.sees is None and np.all(sight)


def test_one_prompt_length_for_all_rows() -> None:
    visible = visible_same_tokenizer(3, 2, 4, torch.device("cpu"))
    assert visible.tolist() == [[3, 4, 4]]
    assert visible_same_tokenizer(3, 2, torch.tensor([4, 1]), torch.device("cpu")).tolist() == [[3, 4, 4], [1, 1, 1]]


def test_last_rows() -> None:
    alignment = align(visible_same_tokenizer(4, 0, 2, torch.device("cpu")), 4, torch.tensor([[0, 1, 1, 1]]))
    assert torch.equal(bias_of(alignment, 2, 4), bias_of(alignment, 4, 4)[:, :, -2:])


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32])
def test_slopes(heads: int) -> None:
    """Geometric, falling, starting at two; no two heads alike."""
    slopes = alibi_slopes(heads)
    assert slopes.tolist() == pytest.approx([2 * 2 ** (-8 * i / max(heads, 8)) for i in range(heads)])
    assert all(math.isclose(b / a, 2 ** (-8 / max(heads, 8)), rel_tol=1e-5) for a, b in itertools.pairwise(slopes))


def test_on_another_device() -> None:
    """Moved once for all connections there; on its own device it is itself."""
    meta, cpu = torch.device("meta"), torch.device("cpu")
    alignment = align(visible_same_tokenizer(4, 0, 2, cpu), 4, torch.tensor([[0, 1, 1, 1]]))
    assert alignment.sees is not None
    moved = alignment.to(meta)
    bias = bias_of(moved, 4, 4)
    assert (bias.device, moved.sees.device) == (meta, meta)
    assert (bias.shape, moved.sees.shape) == (bias_of(alignment, 4, 4).shape, alignment.sees.shape)
    assert alignment.to(meta) is moved and alignment.to(cpu) is alignment
    packed = align_causal(5, torch.ones(2), cpu, [3, 2]).to(meta)
    assert packed.documents == [3, 2] and bias_of(packed, 3, 3).device == meta
