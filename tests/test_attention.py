"""attention.py: a connection's numbers against the formula, computed anew with plain numpy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import calm
from calm.alignment import Alignment, align, align_causal, document_lengths, visible_same_tokenizer
from calm.attention import Connection, alibi_slopes
from calm.errors import CalmError

CPU = torch.device("cpu")


def formula(connection: Connection, hidden: Tensor, context: Tensor, heads: int, normalized: bool) -> np.ndarray:
    """The paper's f_cross(f_proj(H_A), H_B) for one row, token by token and head by head, in float64.

    `normalized` adds the root-mean-square norm of both inputs and, head by head, ALiBi's penalty per token of distance.
    """
    projection, w_q, w_k, w_v, w_o = (
        getattr(connection, name).weight.detach().double().numpy().T for name in ("f_proj", "w_q", "w_k", "w_v", "w_o")
    )
    h_b, h_a = hidden.detach().double().numpy(), context.detach().double().numpy()
    if normalized:
        h_b = h_b / np.sqrt((h_b**2).mean(-1, keepdims=True) + 1e-6)
        h_a = h_a / np.sqrt((h_a**2).mean(-1, keepdims=True) + 1e-6)
    h_a = h_a @ projection
    width = h_b.shape[-1] // heads
    out = np.zeros_like(h_b)
    for t in range(len(h_b)):
        concatenated = []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            query = h_b[t] @ w_q[:, columns]
            scores = np.array([query @ (h_a[s] @ w_k[:, columns]) / np.sqrt(width) for s in range(t + 1)])
            if normalized:
                slope = 2.0 * 2.0 ** (-8.0 * head / max(heads, 8))
                scores -= slope * np.arange(t, -1, -1)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            concatenated.append(sum(weight * (h_a[s] @ w_v[:, columns]) for s, weight in enumerate(weights)))
        out[t] = np.concatenate(concatenated) @ w_o
    return out


def random_connection(augmenting_width: int, anchor_width: int, heads: int, attention: str, seed: int) -> Connection:
    torch.manual_seed(seed)
    connection = Connection(augmenting_width, anchor_width, heads, attention)
    torch.nn.init.normal_(connection.w_o.weight)
    return connection


def causal(length: int, heads: int, attention: str, past: int = 0) -> Alignment:
    slopes = alibi_slopes(heads) if attention == "normalized" else None
    return align(visible_same_tokenizer(length, past, None, CPU), past + length, slopes=slopes)


@pytest.mark.parametrize("attention", ["paper", "normalized"])
@settings(max_examples=20)
@given(data=st.data())
def test_formula(attention: str, data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from((1, 2, 3, 12)))
    anchor_width, augmenting_width = heads * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    length, seed = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 99))
    connection = random_connection(augmenting_width, anchor_width, heads, attention, seed)
    hidden, context = 2 * torch.randn(2, length, anchor_width), 3 * torch.randn(2, length, augmenting_width)
    found = connection(hidden, context, causal(length, heads, attention)).detach()
    for row in range(2):
        expected = formula(connection, hidden[row], context[row], heads, attention == "normalized")
        np.testing.assert_allclose(found[row].double().numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_two_attentions_differ() -> None:
    hidden, context = torch.randn(1, 5, 8), torch.randn(1, 5, 6)
    paper, normalized = (random_connection(6, 8, 2, name, 0) for name in ("paper", "normalized"))
    normalized.load_state_dict(paper.state_dict())
    difference = paper(hidden, context, causal(5, 2, "paper")) - normalized(hidden, context, causal(5, 2, "normalized"))
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("attention", ["paper", "normalized"])
def test_in_pieces_with_a_cache(attention: str) -> None:
    connection = random_connection(6, 8, 2, attention, 0)
    hidden, context = torch.randn(2, 7, 8), torch.randn(2, 7, 6)
    whole = connection(hidden, context, causal(7, 2, attention))
    layer, pieces, past = DynamicLayer(), [], 0
    for length in (3, 1, 2, 1):
        now = slice(past, past + length)
        pieces.append(connection(hidden[:, now], context[:, now], causal(length, 2, attention, past), layer))
        past += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert layer.keys.shape == (2, 2, 7, 4)


@pytest.mark.parametrize("attention", ["paper", "normalized"])
@pytest.mark.parametrize("length", [3, 4, 5, 11, 12])
def test_long_rows_in_pieces(attention: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four positions give what one piece gives, gradients included."""
    connection = random_connection(6, 8, 2, attention, 0)
    hidden, context = torch.randn(2, length, 8, requires_grad=True), torch.randn(2, length, 6, requires_grad=True)
    direction = torch.randn(2, length, 8)

    def found(alignment: Alignment) -> list[Tensor]:
        out = connection(hidden, context, alignment)
        return [out, *torch.autograd.grad(out, [hidden, context, *connection.parameters()], direction)]

    whole = found(causal(length, 2, attention))
    slopes = alibi_slopes(2) if attention == "normalized" else None
    monkeypatch.setattr(calm.alignment, "BLOCK", 4)
    for piece, expected in zip(found(align_causal(length, slopes, CPU)), whole, strict=True):
        torch.testing.assert_close(piece, expected)


@pytest.mark.parametrize("attention", ["paper", "normalized"])
@pytest.mark.parametrize("block", [4, 512])
def test_packed_rows_document_by_document(attention: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of documents give what a mask over whole rows gives, gradients included, and each what it has alone."""
    monkeypatch.setattr(calm.alignment, "BLOCK", block)
    connection = random_connection(6, 8, 2, attention, 0)
    hidden, context = torch.randn(2, 12, 8, requires_grad=True), torch.randn(2, 12, 6, requires_grad=True)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] + [2] * 2])
    slopes = alibi_slopes(2) if attention == "normalized" else None
    direction = torch.randn(2, 12, 8)

    def found(alignment: Alignment) -> list[Tensor]:
        out = connection(hidden, context, alignment)
        return [out, *torch.autograd.grad(out, [hidden, context, *connection.parameters()], direction)]

    masked = found(align(visible_same_tokenizer(12, 0, None, CPU), 12, None, documents, slopes))
    pieces = found(align_causal(12, slopes, CPU, document_lengths(documents)))
    for piece, expected in zip(pieces, masked, strict=True):
        torch.testing.assert_close(piece, expected)
    alone = connection(hidden[1:, 9:10], context[1:, 9:10], causal(1, 2, attention))
    torch.testing.assert_close(pieces[0][1:, 9:10], alone)


def test_starts_at_zero_and_learns() -> None:
    connection = Connection(6, 8, 2)
    found = connection(torch.randn(1, 4, 8), torch.randn(1, 4, 6), causal(4, 2, "normalized"))
    assert torch.equal(found, torch.zeros(1, 4, 8))
    found.sum().backward()
    assert connection.w_o.weight.grad.abs().sum() > 0


def test_starts_with_the_variance_of_its_input() -> None:
    torch.manual_seed(0)
    connection = Connection(300, 200, 4)
    context = torch.randn(1, 50, 300)
    queries, keys, values = connection.project(torch.randn(1, 50, 200), context)
    for states in (queries, keys, values):
        assert states.shape == (1, 4, 50, 50)
        assert states.std().item() == pytest.approx(1, abs=0.1)


def test_what_is_trained() -> None:
    """The paper's matrices and nothing else: D_A x D_B, and four times D_B x D_B; no biases, no norm weights."""
    shapes = {name: tuple(weight.shape) for name, weight in Connection(6, 8, 2).named_parameters()}
    square = {f"w_{name}.weight": (8, 8) for name in "qkvo"}
    assert shapes == {"f_proj.weight": (8, 6), **square}


def test_dtypes() -> None:
    """Computes in its own dtype, answers in the anchor's."""
    connection = random_connection(6, 8, 2, "normalized", 0)
    hidden, context = torch.randn(1, 4, 8), torch.randn(1, 4, 6)
    alignment = causal(4, 2, "normalized")
    exact = connection(hidden, context, alignment)
    found = connection(hidden.bfloat16(), context.half(), alignment)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    low = connection.bfloat16()(hidden, context, alignment)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.1)


def test_a_position_that_sees_nothing_gets_nothing() -> None:
    connection = random_connection(6, 8, 2, "normalized", 0)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    alignment = align(visible_same_tokenizer(4, 0, None, CPU), 4, mask, slopes=alibi_slopes(2))
    hidden, context = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 6)
    found = connection(hidden, context, alignment)
    assert found[0, :2].eq(0).all() and found[0, 2:].ne(0).all() and found[1].ne(0).all()
    found.sum().backward()
    assert hidden.grad.isfinite().all() and hidden.grad[0, :2].eq(0).all()


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(CalmError, match=r"num_heads=3.*width 8"):
        Connection(6, 8, 3)
