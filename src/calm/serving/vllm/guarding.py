"""Who may ask vLLM's server: those with the API key, on every path; without a key, requests that name this machine.

    VLLM_API_KEY=... vllm serve path/to/composed --middleware calm.serving.vllm.guarding.Guarding

`calm serve` adds it by itself. vLLM alone asks for its key under some paths only: others, /invocations among them,
generate for anyone.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from calm import hosts
from calm.serving.access import OPEN, ApiKey, refused

UNLOCKED = (*OPEN, "/metrics")


class Guarding:
    """Asks for the keys that vLLM was given, before anything behind it hears of a request.

    Args:
        app: vLLM's server, with all that only those who have a key may reach.
    """

    def __init__(self, app: ASGIApp):
        self._app = app
        self._guarded: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if self._guarded is None:  # what vLLM was started with is not known before
            self._guarded = _guard(self._app, scope["app"].state.args)
        await self._guarded(scope, receive, send)


def _guard(app: ASGIApp, args: Any) -> ASGIApp:
    keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]  # as vLLM reads them
    if not keys:
        return TrustedHostMiddleware(app, allowed_hosts=hosts.names_of(args.host or "localhost"))
    locked = AuthenticationMiddleware(app, backend=ApiKey(keys, UNLOCKED), on_error=refused)

    async def unless_preflight(scope: Scope, receive: Receive, send: Send) -> None:
        # a browser asks without a key whether it may ask, and learns no more than --allowed-origins says
        await (app if scope.get("method") == "OPTIONS" else locked)(scope, receive, send)

    return unless_preflight
