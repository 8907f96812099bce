"""Servers of a small composition, in a thread of the test's process, and a way to hold their model still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

import calm
from calm.data import load_tokenizer
from calm.serving.app import build
from calm.serving.engine import Engine
from calm.serving.server import bind, url_of

NAME = "tiny"
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


@dataclass
class Served:
    """A server in a thread of this process."""

    url: str
    server: uvicorn.Server
    engine: Engine

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0} | options)


@contextmanager
def serving(composed: Path, **options: Any) -> Iterator[Served]:
    """Serves the composition on a free port of this machine."""
    own = calm.CalmForCausalLM.from_pretrained(composed)
    tokenizer = load_tokenizer(composed)
    tokenizer.padding_side = "left"
    app = build(own, tokenizer, NAME, **options)
    bound = bind(options.get("host", "127.0.0.1"), 0, 600)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    url = url_of(bound)
    thread.start()
    until(lambda: server.started)
    yield Served(url, server, app.state.engine)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Gate:
    """Lets a server's model take one step for each permit: what is slow in life is held still in a test."""

    def __init__(self, engine: Engine) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False
        self._hook = engine.model.anchor.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        if not self._open:
            self._permits.acquire()

    def permit(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._open = True
        self._hook.remove()
        self._permits.release()


@contextmanager
def held(engine: Engine) -> Iterator[Gate]:
    """Holds the model of a server."""
    gate = Gate(engine)
    try:
        yield gate
    finally:
        gate.open()
