"""A row, the unit that is generated: what is asked of it, and the pieces of its answer as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a row are chosen, and when it ends.

    Attributes:
        max_tokens: Tokens at most.
        temperature: 0 for the likeliest token each time.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Of this row alone: what runs beside it changes nothing.
        stop: Strings that end the answer, and are not part of it.
        logprobs: How many alternatives to report beside each token, or `None` for no log-probabilities.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A generated token with its log-probability before temperature and top-p, and the likeliest tokens beside it."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What one step adds to a row's answer.

    Attributes:
        text: Empty while a character or a stop string is incomplete.
        token: What was chosen, for a row that wants log-probabilities.
        offset: Characters of the answer before that token's; tokens of one character have the same.
        finish_reason: With the last one.
    """

    text: str
    token: Token | None = None
    offset: int = 0
    finish_reason: FinishReason | None = None


class AnswerText:
    """Turns tokens into text as they come: whole characters, without special tokens, up to a stop string.

    The pieces join to what decoding the prompt and the answer together would add to the prompt. (One exception: a byte
    that belongs to no character can unmake the one before it, which has been given out by then and stays.)

    Args:
        tokenizer: A fast tokenizer.
        prompt: The prompt's tokens, on which the text of the first token may depend.
        stop: The stop strings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]):
        self._tokenizer = tokenizer
        # tokens given as such may end within a character; without special tokens, as the stream reads them
        whole = not tokenizer.decode(prompt, skip_special_tokens=True).endswith("\ufffd")
        self._stream = DecodeStream(prompt if whole else [], skip_special_tokens=True)
        self._pending: list[int] = []  # tokens of a character that is not complete
        self._held = ""  # text that may be the beginning of a stop string
        self._given = 0  # characters
        self._stop = stop

    @property
    def length(self) -> int:
        """Characters so far, with those that are held back."""
        return self._given + len(self._held)

    def add(self, token: int) -> tuple[str, bool]:
        """The text that can be given out after this token, and whether a stop string ends it there."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # no class of its own says that a character was unmade; an error here would end a whole batch
            text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._stream = DecodeStream(self._pending, skip_special_tokens=True)
        if text is None:
            return "", False
        self._pending.clear()
        return self._release(text)

    def finish(self) -> tuple[str, bool]:
        """What was held back, and whether a stop string is in it."""
        text, stopped = self._release(self._tokenizer.decode(self._pending, skip_special_tokens=True))
        return text + self._held, stopped

    def _release(self, text: str) -> tuple[str, bool]:
        self._held += text
        if found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            text, self._held = self._held[: min(found)], ""
            self._given += len(text)
            return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._given += len(text)
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Row:
    """A prompt to be continued.

    Attributes:
        prompt: Its tokens.
        off: The augmenting models that are switched off.
        sampling: How to go on.
        deliver: Called from the engine's thread with each piece, the last of which has a finish reason, or with an
            exception that ends the row.
        cancelled: Set by whoever no longer wants the answer.
        begun: Set when a piece is delivered.
    """

    prompt: list[int]
    off: frozenset[str]
    sampling: Sampling
    deliver: Callable[[Piece | Exception], None]
    cancelled: bool = field(default=False)
    begun: bool = field(default=False, init=False)
