"""Answers as text: pieces join to what decoding gives at once, and end at stop strings."""

from __future__ import annotations

import pytest
from bases import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from calm.serving.responses import ChatAnswer, TextAnswer
from calm.serving.rows import AnswerText, Piece, Token

TOKENIZER = byte_tokenizer(merges=[("a", "b"), ("ab", "c")])
PROMPT = TOKENIZER("héllo €")["input_ids"]
BYTE_LEVEL = bytes_to_unicode()


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have one: words with their space, and single bytes for what is in no word."""
    words = ["<unk>", "\u2581a", "b", "c"]
    vocabulary = {token: i for i, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def answer(
    tokens: list[int],
    stop: tuple[str, ...] = (),
    prompt: list[int] = PROMPT,
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
) -> tuple[list[str], bool]:
    """The pieces, and whether a stop string ended them."""
    text = AnswerText(tokenizer, prompt, stop)
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


@given(st.lists(st.integers(0, 255), max_size=6), st.lists(st.sampled_from("ab€"), max_size=6))
def test_nothing_of_the_prompt_is_in_the_answer(end: list[int], letters: list[str]):
    """However it ends: with what was no character, or with half of one, before the special tokens of a chat."""
    own = TOKENIZER("prompt caf\ufffd", add_special_tokens=False)["input_ids"]
    raw = [TOKENIZER.convert_tokens_to_ids(BYTE_LEVEL[byte]) for byte in end]
    tokens = TOKENIZER("".join(letters), add_special_tokens=False)["input_ids"]
    for special in ([], [TOKENIZER.eos_token_id], TOKENIZER("", add_special_tokens=True)["input_ids"]):
        pieces, stopped = answer(tokens, ("prompt", "caf"), own + raw + special)
        assert not stopped
        assert "".join(pieces).lstrip("\ufffd") == "".join(letters)


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


def test_a_byte_that_unmakes_a_character_already_given_out_does_not_fail():
    """Decoded at once, the euro sign and the byte after it would all be unknown; the sign has been read by then."""
    tokenizer = fallback_tokenizer()
    a, b = tokenizer.convert_tokens_to_ids(["\u2581a", "b"])
    euro = list("€".encode())
    tokens = [b, *euro, 0xFF, b, a, *euro, a]
    pieces, _ = answer(tokens, prompt=[a], tokenizer=tokenizer)
    assert "".join(pieces) == "b€\ufffdb a€ a"
    assert answer(tokens, ("b a",), [a], tokenizer)[1], "a stop string is found after it, too"


@given(st.lists(st.sampled_from([0xE2, 0x82, 0xAC, 0xFF, 0x41, 257, 258]), max_size=12))
def test_no_bytes_whatsoever_fail(tokens: list[int]):
    """Whatever is sampled: an error would end all rows of a batch."""
    pieces, _ = answer(tokens, prompt=[257], tokenizer=fallback_tokenizer())
    assert all(isinstance(piece, str) for piece in pieces)


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: tuple[str, ...] = ()) -> list[Piece]:
    text, pieces = AnswerText(tokenizer, [257], stop), []
    for token in tokens:
        offset = text.length
        pieces.append(Piece(text.add(token)[0], Token(token, -0.5, ((token, -0.5), (256, -2.0))), offset))
    return pieces


@pytest.mark.parametrize("stop", [(), ("b a b",)], ids=["", "held"])
def test_log_probabilities_say_where_each_token_is_in_the_text(stop: tuple[str, ...]):
    """With its space, whose first one this tokenizer drops; the bytes of one character are at the same place."""
    tokenizer = fallback_tokenizer()
    tokens = [258, 257, *"€".encode(), 258, 257]
    answer, text = TextAnswer("m", tokenizer, 1, 1, True, False), "b a€b a"
    chat = ChatAnswer("m", tokenizer, 1, 1, True, False)
    offsets = []
    for piece in pieces_of(tokenizer, tokens, stop):
        answer.add(0, piece)
        chat.add(0, piece)
        offsets += answer.chunk(0, piece)["choices"][0]["logprobs"]["text_offset"]
    logprobs = answer.whole()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == offsets == [0, 1, 3, 3, 3, 4, 5]
    assert logprobs["tokens"] == ["b", " a", "\ufffd", "\ufffd", "\ufffd", "b", " a"]
    assert [logprobs["tokens"][at] for at in (0, 1, 5, 6)] == [text[:1], text[1:3], text[4:5], text[5:7]]
    assert set(logprobs["top_logprobs"][1]) == {" a", "<unk>"}
    content = chat.whole()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == logprobs["tokens"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == text


@given(st.text(max_size=8))
def test_the_bytes_of_tokens_join_to_the_text_where_tokens_are_parts_of_characters(text: str):
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    chat = ChatAnswer("m", TOKENIZER, 1, 1, True, False)
    for token in tokens:
        chat.add(0, Piece("", Token(token, -0.5, ())))
    content = chat.whole()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="surrogatepass") == text
