"""From a request to its rows, and from their pieces to the answer, within the request's time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import Request
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool

from calm.serving.engine import Engine, QueueFullError
from calm.serving.errors import APIError
from calm.serving.limits import RETRY_AFTER
from calm.serving.metrics import Metrics
from calm.serving.names import Names
from calm.serving.requests import ChatRequest, CompletionRequest
from calm.serving.responses import Answer, ChatAnswer, TextAnswer
from calm.serving.rows import Piece, Row, Sampling

logger = logging.getLogger(__name__)


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Generating:
    """One request while it is answered.

    Args:
        engine: What generates.
        names: The models that are listed.
        metrics: Where to count.
        request: The HTTP request.
        asked: Its body.
        log_prompts: Log prompts and answers too.
    """

    def __init__(
        self,
        engine: Engine,
        names: Names,
        metrics: Metrics,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        log_prompts: bool,
    ) -> None:
        self._engine, self._metrics, self._request, self._asked = engine, metrics, request, asked
        self._log_prompts = log_prompts
        self._arrived: float = request.state.arrived
        self._off = names.off(asked.model, asked.augmenting)
        self._pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._rows: list[Row] = []
        self.answer: Answer

    async def submit(self) -> None:
        """Check the request, and have its rows wait for their turn.

        Raises:
            APIError: 400 if it cannot be answered, 429 if too many wait, 503 if the engine has stopped.
        """
        asked, limits = self._asked, self._engine.limits
        if isinstance(asked, ChatRequest) and asked.top_logprobs and not asked.logprobs:
            raise APIError(400, f"top_logprobs={asked.top_logprobs}: needs logprobs=true", param="top_logprobs")
        if asked.stream_options is not None and not asked.stream:
            raise APIError(400, "stream_options: needs stream=true", param="stream_options")
        prompts = await run_in_threadpool(self._tokenize)
        choices = asked.n or 1
        if len(prompts) * choices > limits.queue:
            raise APIError(
                400,
                f"{len(prompts)} prompts with {choices} answers each are more than the {limits.queue} that may wait "
                "here: send fewer at a time",
                param="n",
            )
        lengths = [self._max_tokens(len(prompt)) for prompt in prompts]
        loop = asyncio.get_running_loop()
        for prompt, length in zip(prompts, lengths, strict=True):
            for choice in range(choices):
                sampling = Sampling(
                    max_tokens=length,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=None if asked.seed is None else (asked.seed + choice) % 2**64,  # choices that differ
                    stop=asked.stops,
                    logprobs=asked.alternatives,
                )
                deliver = partial(self._deliver, loop, len(self._rows))
                self._rows.append(Row(prompt, self._off, sampling, deliver))
        kind = ChatAnswer if isinstance(asked, ChatRequest) else TextAnswer
        self.answer = kind(
            asked.model,
            self._engine.tokenizer,
            sum(map(len, prompts)),
            len(self._rows),
            asked.alternatives is not None,
            asked.stream_options is not None and bool(asked.stream_options.include_usage),
        )
        if not self._engine.alive:
            raise APIError(503, "the server is stopping: ask again later", retry_after=RETRY_AFTER)
        try:
            self._engine.submit(self._rows)
        except QueueFullError:
            raise limits.queue_full() from None

    async def whole(self) -> dict[str, Any]:
        """The whole answer.

        Raises:
            APIError: 504 if it takes too long, 500 if generating fails.
        """
        watching = asyncio.create_task(self._watch())
        try:
            async for index, piece in self._arriving():
                self.answer.add(index, piece)
            return self.answer.whole()
        finally:
            watching.cancel()
            self.end()

    def end(self) -> None:
        """Cancel what still runs, since nobody takes it, and log."""
        for row in self._rows:
            row.cancelled = True
        self._log()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes; an error ends it as OpenAI's error object."""
        for chunk in self.answer.first_chunks():
            yield chunk
        try:
            async for index, piece in self._arriving():
                self.answer.add(index, piece)
                if piece.text or piece.token is not None or piece.finish_reason is not None:
                    yield self.answer.chunk(index, piece)
        except APIError as error:
            yield error.body()
            return
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield self.answer.usage_chunk()

    async def _arriving(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces until every row has ended."""
        limits = self._engine.limits
        first = True
        while not self.answer.complete:
            left = self._arrived + limits.seconds - time.monotonic()
            try:
                index, piece = await asyncio.wait_for(self._pieces.get(), left)
            except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                raise limits.out_of_time() from None
            if isinstance(piece, _ClientGone):
                raise APIError(499, "the client has gone")
            if isinstance(piece, Exception):
                raise APIError(500, "generating failed; the server's log says why")
            if first:
                self._metrics.first_token_seconds.observe(time.monotonic() - self._arrived)
                first = False
            yield index, piece

    async def _watch(self) -> None:
        """Notice that the client has gone, while it is sent nothing."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._pieces.put_nowait((0, _ClientGone()))

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int, piece: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed when the server was forced to stop
            loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    def _tokenize(self) -> list[list[int]]:
        tokenizer = self._engine.tokenizer
        prompts: list[list[int]]
        if isinstance(self._asked, ChatRequest):
            param = "messages"
            if tokenizer.chat_template is None:
                raise APIError(400, "this model has no chat template: use /v1/completions", param="messages")
            messages = [message.for_template for message in self._asked.messages]
            try:
                inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            except TemplateError as error:
                raise APIError(400, f"the model's chat template refuses: {error}", param="messages") from error
            except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # whatever its expressions raise
                said = f"the model's chat template cannot take these messages ({type(error).__name__}: {error})"
                raise APIError(400, said, param="messages") from error
            prompts = [inputs["input_ids"]]
        else:
            param = "prompt"
            prompts = [
                tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in self._asked.prompts
            ]
        if not all(prompts):
            raise APIError(400, f"{param}: a text without a single token; there is nothing to continue", param=param)
        if (most := max(map(max, prompts))) >= self._engine.vocabulary:
            raise APIError(400, f"{param}: token {most}: expected tokens below {self._engine.vocabulary}", param=param)
        return prompts

    def _max_tokens(self, prompt: int) -> int:
        """How many tokens to generate at most after so many of the prompt."""
        allowed = self._engine.limits.max_tokens
        context = self._engine.model.context_length
        room = allowed if context is None else context - prompt
        asked, param = self._asked.max_tokens, "max_tokens"
        if isinstance(self._asked, ChatRequest) and self._asked.max_completion_tokens is not None:
            if asked is not None and asked != self._asked.max_completion_tokens:
                raise APIError(400, "max_tokens and max_completion_tokens differ: send one", param=param)
            asked, param = self._asked.max_completion_tokens, "max_completion_tokens"
        elif isinstance(self._asked, CompletionRequest) and asked is None:
            asked = min(16, allowed)
        if asked is not None and asked > allowed:
            raise self._engine.limits.too_many_tokens(param, asked)
        if room < (asked or 1):
            raise APIError(
                400,
                f"the context of the model is {context} tokens: {prompt} of the prompt and {asked or 1} to generate do "
                "not fit. Send a shorter prompt, or ask for fewer tokens",
                code="context_length_exceeded",
                param=param if asked is not None and prompt < (context or 0) else None,
            )
        return asked or min(allowed, room)

    def _log(self) -> None:
        answer = self.answer
        logger.info(
            "%s rows=%d off=%s prompt_tokens=%d completion_tokens=%d ended=%s",
            self._request.state.request_id,
            len(self._rows),
            sorted(self._off),
            answer.prompt_tokens,
            answer.completion_tokens,
            answer.finish_reasons,
        )
        if self._log_prompts:
            for row, text in zip(self._rows, answer.texts, strict=True):
                prompt = self._engine.tokenizer.decode(row.prompt)
                logger.info("%s prompt=%r answer=%r", self._request.state.request_id, prompt, text)
