"""Reads the body of a request in front of an application, which may then be handed another one, or a refusal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm.serving.errors import APIError
from calm.serving.limits import Limits


async def whole(receive: Receive) -> Message:
    """A request's body as one message, or what comes instead of it: the client has gone."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return message
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return {"type": "http.request", "body": body, "more_body": False}


def within_size(scope: Scope, receive: Receive, limits: Limits) -> Receive:
    """What receives a body up to the limit, and raises an `APIError` (413) instead of receiving more."""
    length = Headers(scope=scope).get("content-length", "")
    declared = int(length) if length.isdecimal() else 0
    received = 0

    async def counted() -> Message:
        nonlocal received
        if declared > limits.body_size:
            raise limits.body_too_large()
        message = await receive()
        received += len(message.get("body", b""))
        if received > limits.body_size:
            raise limits.body_too_large()
        return message

    return counted


async def whole_in_time(receive: Receive, limits: Limits, arrived: float) -> Message:
    """A request's body as one message.

    Args:
        receive: Receives it.
        limits: With the time that a request has.
        arrived: When it came, in seconds of `time.monotonic`.

    Raises:
        APIError: 504 if the body takes all of that time.
    """
    try:
        return await asyncio.wait_for(whole(receive), arrived + limits.seconds - time.monotonic())
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise limits.out_of_time() from None


async def answer(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, read: Callable[[], Awaitable[Message]]
) -> None:
    """Answer a request whose body `read` gives; where that raises an `APIError`, with the error.

    The body is read when the application asks for it, so not before the API key was compared.
    """
    asked = False
    refused: APIError | None = None

    async def read_first() -> Message:
        nonlocal asked, refused
        if asked:
            return await receive()
        asked = True
        try:
            return await read()
        except APIError as error:
            refused = error
            raise HTTPException(error.status, str(error)) from error  # ends what the application has begun

    async def unless_refused(message: Message) -> None:
        if refused is None:
            await send(message)

    await app(scope, read_first, unless_refused)
    if refused is not None:
        await refused.response()(scope, receive, send)


class LimitBodies:
    """ASGI middleware that refuses bodies that are too large, or take too long to come.

    Args:
        app: The application.
        limits: With the most bytes and seconds.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        within = within_size(scope, receive, self._limits)
        arrived = scope["state"]["arrived"]
        await answer(self._app, scope, receive, send, lambda: whole_in_time(within, self._limits, arrived))
