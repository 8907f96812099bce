"""The load on vLLM's server, here on a small application: what makes no sense is sent while the clients wait."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from calm.serving.server import bind, url_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving_load

CLIENTS, REQUESTS = 2, 6


class Answering:
    """Answers requests with their prompts, after a while; refuses the others at once."""

    def __init__(self) -> None:
        self.running = 0
        self.beside: list[int] = []  # for each that is refused, how many were running

    async def answer(self, request: Request) -> Response:
        try:
            asked = json.loads(await request.body())
        except ValueError:
            asked = {}
        if asked.get("model") == "other":
            return self.refuse(404)
        if not asked.get("ignore_eos"):
            return self.refuse(400)
        self.running += 1
        await asyncio.sleep(0.1)
        self.running -= 1
        return JSONResponse({"choices": [{"token_ids": asked["prompt"]}]})

    def refuse(self, status: int) -> Response:
        self.beside.append(self.running)
        return JSONResponse({}, status)


@contextmanager
def serving(answering: Answering) -> Iterator[str]:
    app = FastAPI()
    app.add_route("/v1/completions", answering.answer, methods=["POST"])
    app.add_route("/v1/models", lambda request: JSONResponse({}, 401))
    bound = bind("127.0.0.1", 0, 600)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url_of(bound)
    server.should_exit = True
    thread.join(60)


def test_what_makes_no_sense_is_sent_during_the_load() -> None:
    answering = Answering()
    with serving(answering) as url:
        requests = serving_load.make_requests(REQUESTS, 40, range(6, 262), seed=0)
        counts = asyncio.run(serving_load.under_load(url, requests, clients=CLIENTS, leaving=0, longest=40))
    assert counts["errors"] == [] and counts["answers_that_differ"] == 0
    assert counts["malformed_wrongly_answered"] == []
    assert len(answering.beside) == len(serving_load.MALFORMED)
    assert max(answering.beside) > 0, "nobody else was asking then"
