"""The limits of `calm serve` on vLLM's server, which refuses with them what transformers' server refuses.

    CALM_LIMITS='{"queue": 64, "seconds": 600}' vllm serve path/to/composed \
        --middleware calm.serving.vllm.limiting.Limiting

`calm serve` adds both by itself. Without the variable there are no limits but vLLM's own.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import fields
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm.errors import CalmError
from calm.serving import bodies
from calm.serving.errors import APIError
from calm.serving.limits import Limits
from calm.serving.vllm_server import LIMITS

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""What requests of vLLM's interfaces call the most tokens of an answer."""

SAMPLING = "sampling_params"
"""Where a request of tokens (/inference/v1/generate) has its lengths and choices."""

_EXPECTED = """For example {"queue": 64, "seconds": 600}."""

GRACE = 1.0  # seconds that an answer may take to end when it is told that it is over; streams that run are not told


def handed_over() -> Limits | None:
    """The limits in this process's environment; `None` where there are none.

    Raises:
        CalmError: If they cannot be read, or are none.
    """
    value = os.environ.get(LIMITS)
    if value is None:
        return None
    names = [limit.name for limit in fields(Limits)]
    try:
        given = json.loads(value)
    except ValueError as error:
        raise CalmError(f"{LIMITS}={value!r} is not JSON ({error}). {_EXPECTED}") from error
    if not isinstance(given, dict) or given.keys() - set(names):
        raise CalmError(f"{LIMITS}={value!r}: expected an object with some of {', '.join(names)}. {_EXPECTED}")
    try:
        return Limits(**given)
    except CalmError as error:
        raise CalmError(f"{LIMITS}: {error}. {_EXPECTED}") from error


def limit_answers(model_config: Any) -> None:
    """Have answers end at the limit where a request does not say how long they may be.

    vLLM cuts longer ones short in silence, so those who ask for more are refused before.

    Args:
        model_config: vLLM's `ModelConfig`.
    """
    if (limits := handed_over()) is not None:
        settings = model_config.override_generation_config
        most = min(limits.max_tokens, settings.get("max_new_tokens", limits.max_tokens))
        model_config.override_generation_config = settings | {"max_new_tokens": most}


class Limiting:
    """Refuses what is more than the limits allow, before vLLM's engine hears of it, and ends what takes too long.

    A request counts as a row for each prompt and choice, from when its body has come until its answer has ended in
    whatever way.

    Args:
        app: vLLM's server.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        self._limits = handed_over()
        self._rows = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._limits is None or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        limits, rows = self._limits, 0
        together = scope["app"].state.vllm_config.scheduler_config.max_num_seqs
        over, sending = asyncio.Event(), _Sending(send)
        receive = _until(over, receive)
        within_size = bodies.within_size(scope, receive, limits)

        async def checked() -> Message:
            nonlocal rows
            message = await bodies.whole(within_size)
            if message["type"] == "http.request":
                asked = _parse(message["body"])
                _check_tokens(asked, limits)
                rows = self._take(_rows(asked), together, limits)
            return message

        answering = asyncio.create_task(bodies.answer(self._app, scope, receive, sending, checked))
        try:
            await asyncio.wait({answering}, timeout=limits.seconds)
            if not answering.done():
                sending.stopped = True
                over.set()
                await asyncio.wait({answering}, timeout=0 if sending.begun else GRACE)
        finally:
            answering.cancel()
            outcome = (await asyncio.gather(answering, return_exceptions=True))[0]
            self._rows -= rows
        if over.is_set():  # at last, since who does not read what is sent holds this up
            await sending.end(limits.out_of_time(), scope, receive)
        elif outcome is not None:
            raise outcome

    def _take(self, rows: int, together: int, limits: Limits) -> int:
        """Count the rows of a request.

        Raises:
            APIError: 429 if they have to wait and are more than may, 400 if they always would be.
        """
        if rows > together + limits.queue:
            message = (
                f"{rows} answers are more than the {together} that are generated together here and the {limits.queue} "
                "that may wait: send fewer at a time"
            )
            raise APIError(400, message, param="n")
        if self._rows + rows > together + limits.queue:
            raise limits.queue_full()
        self._rows += rows
        return rows


def _until(over: asyncio.Event, receive: Receive) -> Receive:
    """What receives until it is over, and then that the client has gone: on hearing that, vLLM stops generating.

    (Cancelling alone would not do: the part of vLLM that listens for clients who go runs its answer in another task.)
    """

    async def receive_until() -> Message:
        receiving, ending = asyncio.ensure_future(receive()), asyncio.ensure_future(over.wait())
        try:
            await asyncio.wait({receiving, ending}, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            ending.cancel()

    return receive_until


class _Sending:
    """Sends an answer until it is stopped, and then the error that ends it.

    Args:
        send: Where to.

    Attributes:
        stopped: Whether nothing more of the answer is sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started: Message | None = None
        self._ended = False
        self.stopped = False

    @property
    def begun(self) -> bool:
        """Whether a part of the answer was sent."""
        return self._started is not None

    async def __call__(self, message: Message) -> None:
        """Send a part of the answer."""
        if self.stopped:
            return
        if message["type"] == "http.response.start":
            self._started = message
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def end(self, error: APIError, scope: Scope, receive: Receive) -> None:
        """End with an error: as an answer, or as the last event of a stream that has begun."""
        if self._started is None:
            await error.response()(scope, receive, self._send)
            return
        kind = Headers(raw=self._started["headers"]).get("content-type", "")
        if kind.startswith("text/event-stream") and not self._ended:
            events = f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n".encode()
            await self._send({"type": "http.response.body", "body": events})


def _parse(body: bytes) -> dict[str, Any]:
    """A request; empty where it is none, as vLLM then says."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return asked if isinstance(asked, dict) else {}


def _sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """What /inference/v1/generate takes for lengths and choices; empty where there is none."""
    sampling = asked.get(SAMPLING)
    return sampling if isinstance(sampling, dict) else {}


def _check_tokens(asked: dict[str, Any], limits: Limits) -> None:
    for place, where in (("", asked), (f"{SAMPLING}.", _sampling(asked))):
        for param in LENGTHS:
            if (length := _whole(where.get(param))) > limits.max_tokens:
                raise limits.too_many_tokens(place + param, length)


def _rows(asked: dict[str, Any]) -> int:
    """How many answers a request wants: for each prompt, conversation of a batch or item to score, what it says."""
    prompts = 1
    for several in (asked.get("prompt"), asked.get("messages"), asked.get("items")):
        if isinstance(several, list) and several and isinstance(several[0], str | list):
            prompts = len(several)
    return prompts * max(_whole(asked.get("n")), _whole(_sampling(asked).get("n")), 1)


def _whole(value: Any) -> int:
    """A number as vLLM will read it, who takes "3" and 3.0 for one; 0 for what is none."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
