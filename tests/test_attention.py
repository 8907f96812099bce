"""attention.py: a connection's numbers against the formula, computed anew with plain numpy loops."""

from __future__ import annotations

import itertools

import memory
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import calm
from calm.alignment import Alignment, align, align_causal, document_lengths, visible_same_tokenizer
from calm.attention import Connection, alibi_slopes, root_mean_square
from calm.config import ATTENTIONS
from calm.errors import CalmError

CPU = torch.device("cpu")


def formula(connection: Connection, hidden: Tensor, context: Tensor, heads: int, attention: str) -> np.ndarray:
    """The paper's f_cross(f_proj(H_A), H_B) for one row, token by token and head by head, in float64.

    All but "paper" add the root-mean-square norm of both inputs and, head by head, ALiBi's penalty per token of
    distance; "gated" is also multiplied by the root mean square of `H_B` and by how far the gate is open.
    """
    projection, w_q, w_k, w_v, w_o = (
        getattr(connection, name).weight.detach().double().numpy().T for name in ("f_proj", "w_q", "w_k", "w_v", "w_o")
    )
    h_b, h_a = hidden.detach().double().numpy(), context.detach().double().numpy()
    size = np.sqrt((h_b**2).mean(-1, keepdims=True))
    if attention != "paper":
        h_b = h_b / np.sqrt(size**2 + 1e-6)
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
            if attention != "paper":
                slope = 2.0 * 2.0 ** (-8.0 * head / max(heads, 8))
                scores -= slope * np.arange(t, -1, -1)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            concatenated.append(sum(weight * (h_a[s] @ w_v[:, columns]) for s, weight in enumerate(weights)))
        out[t] = np.concatenate(concatenated) @ w_o
        if attention == "gated":
            out[t] *= size[t] * openness(connection, hidden)[t]
    return out


def openness(connection: Connection, hidden: Tensor) -> np.ndarray:
    """`g + w . norm(H_B)` for one row, position by position, float64; `g` is the bias times an eighth of the width."""
    h_b, weight = hidden.detach().double().numpy(), connection.gate.weight.detach().double().numpy()
    always = connection.gate.bias.item() * h_b.shape[-1] / 8
    return np.array([always + sum(weight[0] * h / np.sqrt((h**2).mean())) for h in h_b])


def random_connection(augmenting_width: int, anchor_width: int, heads: int, attention: str, seed: int) -> Connection:
    torch.manual_seed(seed)
    connection = Connection(augmenting_width, anchor_width, heads, attention)
    torch.nn.init.normal_(connection.w_o.weight)
    if connection.gate is not None:  # and no identities, which would hide what is left out or transposed
        for linear in (connection.f_proj, connection.w_v):
            torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        torch.nn.init.constant_(connection.gate.bias, 5.6 / anchor_width)
        torch.nn.init.normal_(connection.gate.weight, std=0.2 * anchor_width**-0.5)
    return connection


def causal(length: int, heads: int, attention: str, past: int = 0) -> Alignment:
    slopes = None if attention == "paper" else alibi_slopes(heads)
    return align(visible_same_tokenizer(length, past, None, CPU), past + length, slopes=slopes)


@pytest.mark.parametrize("attention", ATTENTIONS)
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
        expected = formula(connection, hidden[row], context[row], heads, attention)
        np.testing.assert_allclose(found[row].double().numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_three_attentions_differ() -> None:
    hidden, context = 3 * torch.randn(1, 5, 8), torch.randn(1, 5, 6)
    matrices = random_connection(6, 8, 2, "paper", 0).state_dict()
    added = []
    for attention in ATTENTIONS:
        connection = random_connection(6, 8, 2, attention, 0)
        connection.load_state_dict(matrices, strict=False)
        added.append(connection(hidden, context, causal(5, 2, attention)))
    for one, other in itertools.combinations(added, 2):
        assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("attention", ATTENTIONS)
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


@pytest.mark.parametrize("attention", ATTENTIONS)
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
    slopes = None if attention == "paper" else alibi_slopes(2)
    monkeypatch.setattr(calm.alignment, "BLOCK", 4)
    for piece, expected in zip(found(align_causal(length, slopes, CPU)), whole, strict=True):
        torch.testing.assert_close(piece, expected)


def test_left_padding_needs_no_bias_of_whole_rows() -> None:
    """One padding token in a batch of long rows: about the memory of rows without any."""
    connection = random_connection(6, 32, 8, "gated", 0).requires_grad_(False)
    hidden, context = torch.randn(4, 1024, 32), torch.randn(4, 1024, 6)
    slopes, mask = alibi_slopes(8), torch.ones(4, 1024)
    mask[0, 0] = 0

    def padded() -> Tensor:
        visible = visible_same_tokenizer(1024, 0, None, CPU)
        return connection(hidden, context, align(visible, 1024, mask, slopes=slopes))

    with torch.no_grad():
        plain = memory.most_held(lambda: connection(hidden, context, align_causal(1024, slopes, CPU)))
        assert memory.most_held(padded) < 2 * plain
        torch.testing.assert_close(padded()[1:], connection(hidden, context, align_causal(1024, slopes, CPU))[1:])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("block", [4, 512])
def test_packed_rows_document_by_document(attention: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of documents give what a mask over whole rows gives, gradients included, and each what it has alone."""
    monkeypatch.setattr(calm.alignment, "BLOCK", block)
    connection = random_connection(6, 8, 2, attention, 0)
    hidden, context = torch.randn(2, 12, 8, requires_grad=True), torch.randn(2, 12, 6, requires_grad=True)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] + [2] * 2])
    slopes = None if attention == "paper" else alibi_slopes(2)
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


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_starts_at_zero_and_learns(attention: str) -> None:
    """The gate is what learns first, or without one `W_O`; then there is something for the others to learn."""
    torch.manual_seed(0)
    connection = Connection(6, 8, 2, attention)
    hidden, context, direction = torch.randn(1, 4, 8), torch.randn(1, 4, 6), torch.randn(1, 4, 8)
    optimizer = torch.optim.AdamW(connection.parameters(), lr=0.01, weight_decay=0.0)
    moved = []
    for step in range(2):
        found = connection(hidden, context, causal(4, 2, attention))
        assert torch.equal(found, torch.zeros(1, 4, 8)) == (step == 0)
        optimizer.zero_grad()
        (found * direction).sum().backward()
        moved.append({name for name, weight in connection.named_parameters() if weight.grad.abs().sum() > 0})
        optimizer.step()
    assert moved[0] == ({"gate.weight", "gate.bias"} if attention == "gated" else {"w_o.weight"})
    assert moved[1] == {name for name, _ in connection.named_parameters()}


def test_an_open_gate_hands_the_augmenting_state_on() -> None:
    """Behind a gate that is open as far as 1, with equal widths: what is looked at, as large as the anchor's state."""
    torch.manual_seed(0)
    connection = Connection(8, 8, 2)
    torch.nn.init.constant_(connection.gate.bias, 1)  # an eighth of the width is 1
    hidden, context = 5 * torch.randn(2, 4, 8), 0.1 * torch.randn(2, 4, 8)
    alignment = causal(4, 2, "gated")
    found = connection(hidden, context, alignment)
    state = context / context.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    size = hidden.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(found[:, 0], size[:, 0] * state[:, 0])  # which sees itself alone
    weights = connection.attention_weights(hidden, context, alignment)
    looked_up = torch.cat([weights[:, head] @ state[..., 4 * head : 4 * head + 4] for head in range(2)], -1)
    torch.testing.assert_close(found, size * looked_up)
    with torch.no_grad():  # negative control: at random, as without a gate
        connection.w_v.weight.normal_(std=8**-0.5)
    assert (connection(hidden, context, alignment)[:, 0] - size[:, 0] * state[:, 0]).abs().max() > 1


def test_a_gate_speaks_as_loudly_as_the_anchor() -> None:
    """Ten times the hidden state, ten times the injection; without a gate the same one."""
    hidden, context = torch.randn(1, 4, 8), torch.randn(1, 4, 6)
    for attention, factor in (("gated", 10), ("normalized", 1)):
        connection = random_connection(6, 8, 2, attention, 0)
        found, louder = (connection(scale * hidden, context, causal(4, 2, attention)) for scale in (1, 10))
        torch.testing.assert_close(louder, factor * found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_position_has_its_own_openness(dtype: torch.dtype) -> None:
    """That of the formula; what is added is openness times root mean square times what `W_O` gives."""
    connection = random_connection(6, 8, 2, "gated", 0)
    hidden, context = (5 * torch.randn(2, 4, 8)).to(dtype), torch.randn(2, 4, 6)
    written = []
    handle = connection.w_o.register_forward_hook(lambda module, args, output: written.append(output))

    def check(expected: np.ndarray) -> None:
        found = connection.openness(hidden)
        assert found.dtype == torch.float32 and found.shape == (2, 4, 1)
        np.testing.assert_allclose(found[..., 0].detach().double().numpy(), expected, rtol=1e-5, atol=1e-6)
        added = connection(hidden, context, causal(4, 2, "gated"))
        torch.testing.assert_close(added, (found * root_mean_square(hidden) * written.pop()).to(dtype))

    expected = np.stack([openness(connection, row) for row in hidden])
    check(expected)
    assert min(np.ptp(row) for row in expected) > 0.1, "positions of one text are opened differently"
    torch.testing.assert_close(connection.openness(10 * hidden), connection.openness(hidden), rtol=0.01, atol=0.01)
    torch.nn.init.zeros_(connection.gate.weight)  # negative control: one number for all
    check(np.full((2, 4), 0.7))
    handle.remove()


def test_openness_where_there_is_nothing_to_open() -> None:
    """States of zero, as embeddings of padding may be, are no 0/0; and without a gate all is let through."""
    hidden = torch.randn(1, 4, 8)
    hidden[:, 1] = 0
    found = random_connection(6, 8, 2, "gated", 0).openness(hidden)
    assert found.isfinite().all() and found[0, 1] == 0 and found[0, [0, 2, 3]].ne(0).all()
    for attention in ("normalized", "paper"):
        assert torch.equal(random_connection(6, 8, 2, attention, 0).openness(hidden), torch.ones(1, 4, 1))


def test_a_gate_learns_where_to_be_open() -> None:
    """Open where the anchor's state has one sign and closed where it has the other, which one number cannot be."""
    generator = torch.Generator().manual_seed(0)
    direction, sign = torch.ones(16), torch.tensor([1.0, -1.0]).repeat(8)
    hidden = sign[:, None] * direction + 0.1 * torch.randn(4, 16, 16, generator=generator)
    context, alignment = torch.randn(4, 16, 16, generator=generator), causal(16, 2, "gated")

    def trained(weight: bool) -> tuple[Connection, float]:
        torch.manual_seed(0)
        connection = Connection(16, 16, 2)
        with torch.no_grad():
            connection.gate.bias.fill_(8 / 16)
            target = connection(hidden, context, alignment) * (sign > 0)[:, None]
            connection.gate.bias.zero_()
        connection.gate.weight.requires_grad_(weight)
        optimizer = torch.optim.AdamW(connection.gate.parameters(), lr=3e-3, weight_decay=0.0)
        for _ in range(150):
            left = (connection(hidden, context, alignment) - target).square().mean() / target.square().mean()
            left.backward()
            optimizer.step()
            optimizer.zero_grad()
        return connection, left.item()

    connection, left = trained(weight=True)
    found = connection.openness(hidden)
    assert left < 0.01
    assert (found[:, sign > 0] - 1).abs().max() < 0.1 and found[:, sign < 0].abs().max() < 0.1
    assert trained(weight=False)[1] > 0.4, "negative control: half open everywhere is the best it can be"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_at_hidden_states_of_zero_are_finite(dtype: torch.dtype, compiled: bool) -> None:
    """A root mean square has no slope at zero: 0/0 where it is spelled out."""
    torch._dynamo.reset()
    connection = random_connection(6, 8, 2, "gated", 0)
    hidden = torch.randn(1, 4, 8).to(dtype)
    hidden[:, 1:3] = 0
    hidden.requires_grad_()
    run = torch.compile(connection, fullgraph=True, backend="aot_eager") if compiled else connection
    found = run(hidden, torch.randn(1, 4, 6), causal(4, 2, "gated"))
    assert found[0, 1:3].eq(0).all() and found[0, [0, 3]].ne(0).all()
    found.float().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (hidden, *connection.parameters()))
    assert hidden.grad[0, [0, 3]].ne(0).all()
    with pytest.raises(AssertionError):  # negative control
        naive = torch.zeros(8, requires_grad=True)
        naive.square().mean().sqrt().backward()
        assert naive.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_root_mean_square_of_half_precision_is_float32s(dtype: torch.dtype) -> None:
    """Summed in float32 (float16 ends at 65,504), and nothing of the states' size is kept for it in float32."""
    torch.manual_seed(0)
    states = (300 * torch.randn(3, 500)).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = root_mean_square(states)
    assert found.dtype == torch.float32 and found.shape == (3, 1)
    torch.testing.assert_close(found, states.double().square().mean(-1, keepdim=True).sqrt().float())
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != states.data_ptr()) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_keeps_one_tensor_more_for_the_backward_pass(dtype: torch.dtype) -> None:
    """What `W_O` gives, which the gate's gradient needs; its size of the hidden state is that of the norm's copy."""
    held = {}
    for attention in ("gated", "normalized"):
        connection, kept = random_connection(64, 64, 2, attention, 0), {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hidden = torch.randn(2, 16, 64, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = connection(hidden, torch.randn(2, 16, 64, dtype=dtype), causal(16, 2, attention))
        held[attention] = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        assert found.requires_grad
    injection = 2 * 16 * 64 * 4
    assert injection <= held["gated"] - held["normalized"] < 1.2 * injection


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_starts_with_the_variance_of_its_input(attention: str) -> None:
    torch.manual_seed(0)
    connection = Connection(300, 200, 4, attention)
    context = torch.randn(1, 50, 300)
    queries, keys, values = connection.project(torch.randn(1, 50, 200), context)
    for states in (queries, keys, values):
        assert states.shape == (1, 4, 50, 50)
        assert states.std().item() == pytest.approx(1, abs=0.1)


def test_what_is_trained() -> None:
    """The paper's matrices, D_A x D_B and four times D_B x D_B, and the gate; no biases, no norm weights."""
    matrices = {"f_proj.weight": (8, 6), **{f"w_{name}.weight": (8, 8) for name in "qkvo"}}
    gate = {"gate.weight": (1, 8), "gate.bias": (1,)}
    for attention in ATTENTIONS:
        shapes = {name: tuple(weight.shape) for name, weight in Connection(6, 8, 2, attention).named_parameters()}
        assert shapes == matrices | (gate if attention == "gated" else {})


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dtypes(attention: str) -> None:
    """Computes in its own dtype, answers in the anchor's."""
    connection = random_connection(6, 8, 2, attention, 0)
    hidden, context = torch.randn(1, 4, 8), torch.randn(1, 4, 6)
    alignment = causal(4, 2, attention)
    exact = connection(hidden, context, alignment)
    with torch.autocast("cpu", torch.bfloat16):
        found = connection(hidden, context, alignment)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)
    found = connection(hidden.bfloat16(), context.half(), alignment)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)
    low = connection.bfloat16()(hidden, context, alignment)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("attention", ["gated", "normalized"])
def test_a_position_that_sees_nothing_gets_nothing(attention: str) -> None:
    connection = random_connection(6, 8, 2, attention, 0)
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
