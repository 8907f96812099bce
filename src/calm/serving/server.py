"""Runs the application with uvicorn: the port first, then the model, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import suppress
from copy import deepcopy
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from calm.errors import CalmError
from calm.hosts import in_url, is_loopback


def check_access(host: str, api_key: str | None) -> None:
    """Refuse to let other machines in without a key.

    Raises:
        CalmError: If the host is not a loopback address and there is no key, or if the key cannot be sent in a header.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise CalmError("the API key is empty or has spaces around it or signs that no header can hold: expected ASCII")
    if api_key is None and not is_loopback(host):
        raise CalmError(
            f"--host {host} lets other machines in, which takes an API key: set CALM_API_KEY, for example to what "
            "`openssl rand -hex 32` prints, or serve on 127.0.0.1."
        )


SECONDS_TO_READ = 30.0
"""How long a client may take nothing of what it is sent, when the time of a request is over."""


def bind(host: str, port: int, seconds: float) -> socket.socket:
    """Take the port, before anything long starts; nobody can connect until the server listens.

    On Linux, a client that takes nothing of what it is sent for longer than a request may last loses its connection:
    what waits for it would wait for ever, and hold up the server's end.

    Args:
        host: Address to listen on.
        port: Port to listen on, 0 for any free one.
        seconds: How long a request may last.

    Raises:
        CalmError: If it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":
            patience = min(int(1000 * (seconds + SECONDS_TO_READ)), 2**31 - 1)  # milliseconds
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise CalmError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Pass another --port (0: any free one) "
            "or --host."
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where the server is."""
    host, port = bound.getsockname()[:2]
    return f"http://{in_url(host)}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, whose end no connection escapes.

    uvicorn closes the connections that it knows when it stops. One that was accepted just before is not among them
    yet: it would be served on, and hold up the end until the time for that is over.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, let what was accepted arrive, and end."""
        for server in self.servers:
            server.close()
        for _ in range(10):  # turns of the event loop: a connection takes three from being accepted to being known
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)


def run(app: FastAPI, bound: socket.socket, seconds: float) -> None:
    """Serve until SIGINT or SIGTERM; then take no connection more, finish the requests that came, and return.

    Args:
        app: The application.
        bound: The socket to listen on.
        seconds: How long to wait for running requests at the end. A second Ctrl-C ends at once.
    """
    logs = deepcopy(LOGGING_CONFIG)
    logs["loggers"]["calm"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config = uvicorn.Config(
        app,
        log_config=logs,
        access_log=False,  # the application's own has the request's id and no query
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[bound])


def exit_on_sigterm() -> None:
    """Have SIGTERM end the process with code 0, also while the model loads; uvicorn sends it again when it is done."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
