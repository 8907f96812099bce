"""A small composition with a chat template, and servers that serve it in this process or in one of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from bases import byte_tokenizer, save_base
from factories import perturb
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

import calm
from calm.data import load_tokenizer
from calm.serving.app import build
from calm.serving.limits import Limits
from calm.serving.server import bind, url_of

NAME = "tiny"
CONTEXT = 256


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composition with two augmenting models whose connections matter, and a chat template."""
    folder = tmp_path_factory.mktemp("served") / NAME
    tokenizer = byte_tokenizer(chat=True)
    bases = {
        part: save_base(
            folder.parent / part, tokenizer, seed=seed, width=width, layers=2, max_position_embeddings=CONTEXT
        )
        for seed, (part, width) in enumerate({"trunk": 32, "one": 24, "two": 16}.items())
    }
    model = calm.compose(bases["trunk"], {"one": bases["one"], "two": bases["two"]}, 2)
    perturb(model, share=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(composed: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    loaded = load_tokenizer(composed)
    loaded.padding_side = "left"
    return loaded


@pytest.fixture(scope="session")
def model(composed: Path) -> calm.CalmForCausalLM:
    """The composition, to compare with; the servers have their own."""
    return calm.CalmForCausalLM.from_pretrained(composed)


@dataclass
class Served:
    """A server in a thread of this process."""

    url: str
    server: uvicorn.Server
    engine: Any

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0} | options)


@contextmanager
def serving(composed: Path, **options: Any) -> Iterator[Served]:
    """Serves the composition on a free port of this machine."""
    own = calm.CalmForCausalLM.from_pretrained(composed)
    tokenizer = load_tokenizer(composed)
    tokenizer.padding_side = "left"
    app = build(own, tokenizer, NAME, **options)
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    url = url_of(bound)
    thread.start()
    until(lambda: server.started)
    yield Served(url, server, app.state.engine)
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(composed: Path) -> Iterator[Served]:
    """A server with the usual limits."""
    with serving(composed, limits=Limits(max_tokens=200)) as running:
        yield running


@pytest.fixture(scope="session")
def client(served: Served) -> OpenAI:
    """OpenAI's client of it."""
    return served.client()


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
