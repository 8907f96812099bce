"""Answers as text: pieces join to what decoding gives at once, and end at stop strings."""

from __future__ import annotations

import pytest
from bases import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.serving.rows import AnswerText

TOKENIZER = byte_tokenizer(merges=[("a", "b"), ("ab", "c")])
PROMPT = TOKENIZER("héllo €")["input_ids"]


def answer(tokens: list[int], stop: tuple[str, ...] = (), prompt: list[int] = PROMPT) -> tuple[list[str], bool]:
    """The pieces, and whether a stop string ended them."""
    text = AnswerText(TOKENIZER, prompt, stop)
    pieces = []
    for token in tokens:
        piece, stopped = text.add(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = text.finish()
    return [*pieces, piece], stopped


def decoded(tokens: list[int]) -> str:
    whole, before = (TOKENIZER.decode(ids, skip_special_tokens=True) for ids in (PROMPT + tokens, PROMPT))
    assert whole.startswith(before)
    return whole[len(before) :]


@settings(max_examples=200)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
def test_pieces_join_to_the_decoded_answer_whatever_the_bytes(tokens: list[int]):
    pieces, _ = answer(tokens)
    assert "".join(pieces) == decoded(tokens)


def test_characters_come_whole():
    tokens = TOKENIZER("a€b", add_special_tokens=False)["input_ids"]
    pieces, _ = answer(tokens)
    assert [piece for piece in pieces if piece] == ["a", "€", "b"]
    assert len(tokens) == 5, "the euro sign is three tokens"


@settings(max_examples=300)
@given(st.text("abcd", max_size=12), st.lists(st.text("abcd", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_answer_ends_where_the_first_stop_string_begins(text: str, stops: list[str]):
    pieces, stopped = answer(TOKENIZER(text, add_special_tokens=False)["input_ids"], tuple(stops))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    assert stopped == bool(ends)
    joined = "".join(pieces)
    assert not any(stop in joined for stop in stops)
    assert text.startswith(joined)
    if not stopped:
        assert joined == text


def test_what_may_begin_a_stop_string_is_held_back():
    tokens = TOKENIZER("xENDING", add_special_tokens=False)["input_ids"]
    assert answer(tokens, ("END.",))[0] == ["x", "", "", "", "ENDI", "N", "G", ""]
    assert answer(tokens, ("END",)) == (["x", "", "", ""], True)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_prompt_of_tokens_that_ends_within_a_character_is_not_repeated(cut: int):
    prompt = TOKENIZER("prompt €")["input_ids"]
    pieces, _ = answer(prompt[-cut:] + TOKENIZER("b", add_special_tokens=False)["input_ids"], prompt=prompt[:-cut])
    assert "".join(pieces).endswith("b")
    assert "prompt" not in "".join(pieces)
