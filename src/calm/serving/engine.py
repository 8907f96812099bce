"""Engine: one thread that generates what waits, in batches of rows with the same augmenting models switched on."""

from __future__ import annotations

import logging
import threading
import time

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from calm.config import text_config
from calm.errors import CalmError
from calm.generation import without_defaults
from calm.model import CalmForCausalLM
from calm.serving.choosing import ChooseTokens
from calm.serving.limits import Limits
from calm.serving.metrics import Metrics
from calm.serving.rows import AnswerText, FinishReason, Piece, Row

logger = logging.getLogger(__name__)

GATHERING = 0.01  # seconds that the first row of an idle engine waits for others
PROMPT = 1024  # tokens; prompts of so many fill a batch together with the longest answers


class QueueFullError(Exception):
    """More rows than may wait."""


class GenerationFailedError(Exception):
    """Generating a row failed; the log says why."""


class Engine:
    """Generates rows with `generate` of transformers, left-padded, as many together as fit.

    Rows of one batch have the same augmenting models on; each has its own sampling, length, stop strings and seed, and
    gets what it would get alone (invariant 3 of DESIGN.md). A batch runs until its last row has ended: transformers'
    continuous batching, which lets rows join in between, drives the attention of one model and cannot run several.
    All rows are padded to the longest prompt: a batch has no more tokens, padding included, than `batch_size` prompts
    of 1024 tokens with the longest answers, so that a long prompt runs with few others, or alone.

    Args:
        model: The composition; nothing else may use it while the engine runs.
        tokenizer: Its tokenizer, a fast one.
        limits: How many rows wait, and run together.
        metrics: Where to count.

    Attributes:
        vocabulary: How many tokens there are: those of prompts are below.

    Raises:
        CalmError: If the tokenizer is not a fast one.
    """

    def __init__(
        self, model: CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, limits: Limits, metrics: Metrics
    ) -> None:
        if not tokenizer.is_fast:
            raise CalmError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, whose text can be streamed. Save the composition "
                "with a tokenizer.json: AutoTokenizer.from_pretrained(ANCHOR, use_fast=True).save_pretrained(FOLDER)."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.vocabulary = min(len(tokenizer), model.known_tokens or text_config(model.config.anchor_config).vocab_size)
        self._metrics = metrics
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="calm-engine", daemon=True)

    def start(self) -> None:
        """Start generating."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether rows that are submitted will be generated."""
        return self._thread.is_alive() and not self._closing

    def submit(self, rows: list[Row]) -> None:
        """Let rows wait for their turn, all or none of them.

        Raises:
            QueueFullError: If they would be more than may wait.
        """
        with self._changed:
            self._waiting = [row for row in self._waiting if not row.cancelled]
            if len(self._waiting) + len(rows) > self.limits.queue:
                raise QueueFullError
            self._waiting += rows
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def close(self) -> None:
        """Cancel what is left and end the thread."""
        with self._changed:
            self._closing = True
            for row in (*self._waiting, *self._running):
                row.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while rows := self._next_batch():
            self._metrics.running.set(len(rows))
            self._metrics.batch_rows.observe(len(rows))
            self._answer(rows)
            with self._changed:
                self._running = []
            self._metrics.running.set(0)

    def _answer(self, rows: list[Row]) -> None:
        """Generate; where that fails before anything was delivered, each row alone: it may be one row's fault."""
        try:
            self._generate(rows)
            return
        except Exception:  # whatever went wrong ends this batch and not the server
            logger.exception("a batch of %d rows failed", len(rows))
        if len(rows) > 1 and not any(row.begun for row in rows):
            for row in rows:
                if not row.cancelled:
                    self._answer([row])
            return
        for row in rows:
            row.deliver(GenerationFailedError())  # and not what was raised, whose traceback holds all that was computed

    def _next_batch(self) -> list[Row]:
        """The longest waiting row and those that can run with it; empty at the end, and only there."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting)
                if self._closing:
                    return []
            time.sleep(GATHERING)
            with self._changed:
                batch: list[Row] = []
                self._waiting = [row for row in self._waiting if not row.cancelled]
                for row in self._waiting:
                    if not batch or (len(batch) < self.limits.batch_size and self._fits([*batch, row])):
                        batch.append(row)
                self._waiting = [row for row in self._waiting if row not in batch]
                self._running = batch
                self._metrics.waiting.set(len(self._waiting))
            if batch:
                return batch

    def _fits(self, rows: list[Row]) -> bool:
        """Whether rows have the same switches, and fit into context and memory when padded to the longest."""
        length = max(len(row.prompt) for row in rows) + max(row.sampling.max_tokens for row in rows)
        context, most = self.model.context_length, self.limits.batch_size * (PROMPT + self.limits.max_tokens)
        return rows[0].off == rows[-1].off and (context is None or length <= context) and len(rows) * length <= most

    def _generate(self, rows: list[Row]) -> None:
        longest = max(len(row.prompt) for row in rows)
        pad = self.tokenizer.pad_token_id or 0  # without one any other will do: the mask hides it
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[index, longest - len(row.prompt) :] = 1
        self._metrics.prompt_tokens.inc(int(mask.sum()))
        choose = ChooseTokens(rows)
        with without_defaults(self.model), self.model.augmenting_disabled(*rows[0].off):
            self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max(row.sampling.max_tokens for row in rows),
                pad_token_id=pad,
                do_sample=False,  # a single token is left for each row when `choose` has run
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([_Deliver(self, rows, choose)]),
            )

    def end_of_sequence(self) -> frozenset[int]:
        """The tokens that end an answer, whatever is switched off."""
        found = self.model.generation_config.eos_token_id
        return frozenset([found] if isinstance(found, int) else found or [])


class _Deliver(StoppingCriteria):
    """Hands each row its new token and says which rows have ended, after every step."""

    def __init__(self, engine: Engine, rows: list[Row], choose: ChooseTokens) -> None:
        self._rows = rows
        self._choose = choose
        self._metrics = engine._metrics
        self._end = engine.end_of_sequence()
        self._texts = [AnswerText(engine.tokenizer, row.prompt, row.sampling.stop) for row in rows]
        self._counts = [0] * len(rows)
        self._ended = [False] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        for index, token in enumerate(input_ids[:, -1].tolist()):
            if not self._ended[index]:
                self._ended[index] = self._rows[index].cancelled or self._deliver(index, token)
        return torch.tensor(self._ended, device=input_ids.device)

    def _deliver(self, index: int, token: int) -> bool:
        row, text = self._rows[index], self._texts[index]
        row.begun = True
        self._counts[index] += 1
        self._metrics.generated_tokens.inc()
        reason: FinishReason | None = None
        offset = text.length
        piece, stopped = ("", True) if token in self._end else text.add(token)
        if stopped:
            reason = "stop"
        elif self._counts[index] == row.sampling.max_tokens:
            reason = "length"
        if reason is not None:
            rest, found = text.finish()
            piece += rest
            reason = "stop" if found else reason
        row.deliver(Piece(piece, self._choose.tokens[index], offset, reason))
        return reason is not None
