"""Ends vLLM's server as transformers' server ends: SIGTERM and Ctrl-C finish what runs, and a second one ends at once.

`calm serve` adds it by itself. vLLM alone breaks off what runs. Given a `--shutdown-timeout`, it has the process of its
engine finish what that knows, while the HTTP server accepts what will not be answered; then it waits for the teardown
of that process, which takes some 20 seconds on CPUs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from calm.serving.vllm_server import LIMITS

LATECOMERS = 0.1  # seconds; a connection takes three turns of the event loop from being accepted to being known


class Ending:
    """Has signals stop the HTTP server first, and vLLM's engine when nothing runs on it any more.

    `--shutdown-timeout` is how long that may take; with 0, vLLM's default, what runs is broken off.

    Args:
        app: vLLM's server.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Install the handlers when the server starts, which is after vLLM has installed its own."""
        if scope["type"] == "lifespan":
            _handle_signals(scope["app"].state)
        await self._app(scope, receive, send)


def _handle_signals(state: Any) -> None:
    loop, server = asyncio.get_running_loop(), state.server
    ending = False

    def end() -> None:
        nonlocal ending
        if ending:
            server.force_exit = True
            return
        ending = True
        for listening in server.servers:
            listening.close()
        server.config.timeout_graceful_shutdown = state.vllm_config.shutdown_timeout
        state.vllm_config.shutdown_timeout = 0  # the engine, that is: nothing runs on it by then
        loop.call_later(LATECOMERS, setattr, server, "should_exit", True)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)


def leave_interrupts() -> None:
    """Have vLLM's other processes leave Ctrl-C, which a terminal sends to all of them, to the server."""
    if LIMITS in os.environ and multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
