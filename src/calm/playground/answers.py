"""One prompt, an answer of each part and of all together: the models take turns, a token each."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from calm.errors import CalmError
from calm.generation import without_defaults
from calm.inspection import Inspection, inspect_tokens
from calm.model import CalmForCausalLM

MAX_CHARACTERS = 100_000
"""Of a prompt; longer ones are refused before the tokenizer works on them."""

Role = Literal["augmenting", "anchor", "composed"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedily by default.

    Attributes:
        max_new_tokens: Most tokens of each answer; fewer where the context ends earlier.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Of sampling, for each answer anew.

    Raises:
        CalmError: If a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "0 (the likeliest token each time) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "a whole number, 0 or more"),
        ):
            if not fits:
                raise CalmError(f"{name}={getattr(self, name)}: expected {expected}.")

    def arguments(self) -> dict[str, Any]:
        """Those of `generate`, to be used within `without_defaults`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Answer:
    """What one model has said so far.

    Attributes:
        role: Which part answers.
        name: The augmenting model's name; the role of the others.
        token_ids: What it has produced.
        text: The same without special tokens.
        ended: Why it goes no further; empty while it does.
    """

    role: Role
    name: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked: a prompt, how it is answered, and what is switched off.

    Attributes:
        prompt: As typed.
        sampling: How tokens are chosen.
        off: Names of the augmenting models that the composed model goes without.
        chat: Put the prompt into the tokenizer's chat template.
    """

    prompt: str
    sampling: Sampling = Sampling()
    off: frozenset[str] = frozenset()
    chat: bool = False


class Company:
    """A composition and its augmenting models whole, with their own heads, which answer one prompt side by side.

    Any number of threads may ask: one step of one model runs at a time, since switches are a state of the model.

    Args:
        composed: The composition, in evaluation mode.
        augmenting: Every augmenting model by its name, with its head (the composition holds the first layers only).
        tokenizer: Of all of them.
    """

    def __init__(
        self,
        composed: CalmForCausalLM,
        augmenting: Mapping[str, PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.composed, self.augmenting, self.tokenizer = composed, dict(augmenting), tokenizer
        self._lock = threading.Lock()

    def answers(self, question: Question) -> Iterator[list[Answer]]:
        """Answer a prompt: yields all answers after every round in which each model has added a token.

        Each answer is the one that its model gives alone under the same settings.

        Args:
            question: What is asked.

        Yields:
            The answers so far: those of the augmenting models, the anchor's, the composed model's.

        Raises:
            CalmError: If the prompt is empty or does not fit, or if an augmenting model is unknown.
        """
        ids, composed, sampling = self.encode(question), self.composed, question.sampling
        with self._lock, composed.augmenting_disabled(*question.off):
            pass  # refuses unknown names before anything runs
        lanes = [
            *(_Lane(Answer("augmenting", name), model, (), ids, self) for name, model in self.augmenting.items()),
            _Lane(Answer("anchor", "anchor"), composed.anchor, (), ids, self),
            _Lane(Answer("composed", "composed"), composed, question.off, ids, self),
        ]
        context = composed.context_length
        room = None if context is None else context - ids.shape[1] + 1  # the last token need not be read
        while growing := [lane for lane in lanes if not lane.answer.ended]:
            for lane in growing:
                with self._lock:
                    token = lane.step(sampling)
                answer = lane.answer
                answer.token_ids.append(token)
                if token in lane.ends:
                    answer.ended = "ended by itself"
                elif len(answer.token_ids) == room:
                    answer.ended = "the context is full"
                elif len(answer.token_ids) == sampling.max_new_tokens:
                    answer.ended = "stopped at the limit"
                answer.text = text_of(self.tokenizer, answer.token_ids, bool(answer.ended))
            yield [lane.answer for lane in lanes]

    def encode(self, question: Question) -> Tensor:
        """The prompt's tokens.

        Returns:
            Int64 `[1, length]`, on the composed model's device.

        Raises:
            CalmError: If there are none, or more than the context holds.
        """
        prompt, tokenizer = question.prompt, self.tokenizer
        if not prompt.strip():
            raise CalmError("The prompt is empty. Write something for the models to continue.")
        if len(prompt) > MAX_CHARACTERS:
            raise CalmError(f"The prompt has {len(prompt):,d} characters, at most {MAX_CHARACTERS:,d} are read.")
        if question.chat:
            messages = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        ids: Tensor = inputs["input_ids"]
        context = self.composed.context_length
        if not ids.shape[1]:
            raise CalmError(f"The prompt {prompt!r} has no tokens.")
        if context is not None and ids.shape[1] > context:
            raise CalmError(
                f"The prompt is too long: it has {ids.shape[1]:,d} tokens, and these models read {context:,d} at most. "
                "Shorten it."
            )
        return ids.to(self.composed.device)

    def inspect(self, question: Question, answer: Answer) -> Inspection:
        """Measure what the connections did for an answer of the composed model.

        Raises:
            CalmError: As `inspect_tokens`.
        """
        ids = self.encode(question)[0]
        token_ids = torch.cat([ids, torch.tensor(answer.token_ids, device=ids.device)])
        with self._lock, self.composed.augmenting_disabled(*question.off):
            return inspect_tokens(self.composed, self.tokenizer, question.prompt, token_ids, len(ids))


def text_of(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], ended: bool) -> str:
    """An answer's text, without the beginning of a character whose rest may yet come."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text if ended else text.rstrip("\ufffd")


class _Lane:
    """One model's answer as it grows: transformers' generation, one token a call, on a cache and random state kept."""

    def __init__(self, answer: Answer, model: PreTrainedModel, off: Collection[str], ids: Tensor, company: Company):
        self.answer, self.model, self.off, self.ids = answer, model, off, ids
        self.pad = company.tokenizer.pad_token_id
        if off and set(off) == set(company.augmenting):
            model = company.composed.anchor  # which answers then: by its end and its cache, not by the composition's
        ends = model.generation_config.eos_token_id
        self.ends: Collection[int] = [ends] if isinstance(ends, int) else ends or []
        self.random: list[Tensor] = []
        # a recurrent model's state cannot be picked up by another call of `generate`
        self.keeps_cache = isinstance(model, CalmForCausalLM) or not model._is_stateful
        self.cache: Cache | None = None

    def step(self, sampling: Sampling) -> int:
        """Produce one token."""
        devices = [self.ids.device] if self.ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices), without_defaults(self.model), self._switches():
            if self.random:
                torch.set_rng_state(self.random[0])
                for device, state in zip(devices, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            else:
                torch.manual_seed(sampling.seed)
            output = self.model.generate(
                input_ids=self.ids,
                attention_mask=torch.ones_like(self.ids),
                **({} if self.cache is None else {"past_key_values": self.cache}),
                **sampling.arguments(),
                max_new_tokens=1,
                use_cache=self.keeps_cache,
                pad_token_id=self.pad,
                return_dict_in_generate=True,
            )
            self.random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
        self.ids, self.cache = output.sequences, output.past_key_values if self.keeps_cache else None
        return int(self.ids[0, -1])

    def _switches(self) -> AbstractContextManager[Any]:
        return self.model.augmenting_disabled(*self.off) if self.off else nullcontext()
