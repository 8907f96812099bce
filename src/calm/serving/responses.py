"""Makes OpenAI's responses, whole and in chunks, out of the pieces of rows."""

from __future__ import annotations

import re
import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from calm.serving.rows import FinishReason, Piece, Token

LEAST = -9999.0  # JSON has no minus infinity; OpenAI's own least log-probability
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""How byte-level vocabularies (GPT-2's and its heirs') write each byte."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How vocabularies with a fallback to bytes (SentencePiece's) write one."""


class Answer(ABC):
    """The answer to one request, as far as it has come.

    Args:
        model: The name that was asked for.
        tokenizer: For the text of tokens beside their log-probabilities.
        prompt_tokens: Tokens of all prompts, each counted once.
        choices: Number of rows.
        logprobs: Whether log-probabilities are wanted.
        usage_in_stream: Whether a stream's last chunk counts the tokens; the others then have the field, too, empty.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        choices: int,
        logprobs: bool,
        usage_in_stream: bool,
    ) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.texts = [""] * choices
        self.finish_reasons: list[FinishReason | None] = [None] * choices
        self.completion_tokens = 0
        self.prompt_tokens = prompt_tokens
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._wants_logprobs, self._usage_in_stream = logprobs, usage_in_stream
        self._told: list[list[Piece]] = [[] for _ in range(choices)]  # with log-probabilities

    def add(self, index: int, piece: Piece) -> None:
        """Take up what a row said next."""
        self.texts[index] += piece.text
        self.finish_reasons[index] = piece.finish_reason
        self.completion_tokens += 1
        if piece.token is not None:
            self._told[index].append(piece)

    @property
    def complete(self) -> bool:
        """Whether every row has ended."""
        return all(self.finish_reasons)

    def whole(self) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choices = []
        for index, text in enumerate(self.texts):
            logprobs = self._logprobs(self._told[index]) if self._wants_logprobs else None
            choices.append(self._choice(index, text, logprobs, self.finish_reasons[index]))
        return self._head(self.object) | {"choices": choices, "usage": self._usage()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The part of a streamed response for a piece that was just added."""
        logprobs = self._logprobs([piece]) if piece.token is not None else None
        return self._chunk([self._delta(index, piece.text, logprobs, piece.finish_reason)])

    def usage_chunk(self) -> dict[str, Any]:
        """The last part of a streamed response, which counts the tokens."""
        return self._chunk([]) | {"usage": self._usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What is streamed before any token."""
        return []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head(self.chunk_object) | {"choices": choices} | ({"usage": None} if self._usage_in_stream else {})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _text_of(self, token: int) -> str:
        # as it is within a text: some tokenizers drop the space of the first word that they decode
        return self._tokenizer.decode([token, token])[len(self._tokenizer.decode([token])) :]

    def _bytes_of(self, token: int, text: str) -> list[int] | None:
        """The token's part of the answer, also where it is a part of a character; None if it is not known."""
        if "\ufffd" not in text:
            return list(text.encode())
        raw = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := BYTE_TOKEN.fullmatch(raw):
            return [int(found[1], 16)]
        return [BYTES[character] for character in raw] if BYTES.keys() >= set(raw) else None

    @abstractmethod
    def _choice(self, index: int, text: str, logprobs: Any, reason: FinishReason | None) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, index: int, text: str, logprobs: Any, reason: FinishReason | None) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    """An answer to /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunks(self) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        choices = ({"index": index, "delta": delta, "finish_reason": None} for index in range(len(self.texts)))
        return [self._chunk([choice]) for choice in choices]

    def _choice(self, index: int, text: str, logprobs: Any, reason: FinishReason | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, index: int, text: str, logprobs: Any, reason: FinishReason | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._text_of(token)
            return {"token": text, "logprob": max(logprob, LEAST), "bytes": self._bytes_of(token, text)}

        return {
            "content": [
                entry(token.id, token.logprob) | {"top_logprobs": [entry(*alternative) for alternative in token.top]}
                for piece in pieces
                if (token := piece.token) is not None
            ]
        }


class TextAnswer(Answer):
    """An answer to /v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, text: str, logprobs: Any, reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    _delta = _choice

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [piece.token for piece in pieces if piece.token is not None]
        return {
            "tokens": [self._text_of(token.id) for token in tokens],
            "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [piece.offset for piece in pieces],
        }

    def _alternatives(self, token: Token) -> dict[str, float]:
        # the likelier of two tokens with the same text is kept, and the chosen one always
        shown = (*reversed(token.top), (token.id, token.logprob))
        return {self._text_of(alternative): max(logprob, LEAST) for alternative, logprob in shown}
