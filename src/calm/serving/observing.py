"""Counts and logs each request, by path, status and time; not a word of what was asked."""

from __future__ import annotations

import logging
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm.serving.metrics import Metrics

logger = logging.getLogger(__name__)


class Observe:
    """ASGI middleware: a metric, a log line, and an `X-Request-ID` header for every answer.

    What comes after it finds the id, and when the request arrived, in the request's state.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and note what came of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, request_id = time.monotonic(), 0, uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrived=started)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            status = status or 500
            raise
        finally:
            route = scope.get("route")
            path = route.path if route is not None else "other"  # a made-up path is not a metric of its own
            seconds = time.monotonic() - started
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_seconds.labels(path).observe(seconds)
            logger.info("%s %s %s %d in %.3f s", request_id, scope["method"], path, status, seconds)
