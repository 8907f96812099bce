"""The limits in front of vLLM's server, here in front of a small application: as transformers' server has them.

`tests/vllm_plugin/test_limits.py` sees the same limits hit on vLLM itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from servers import NAME, held, serving, until

from calm.errors import CalmError
from calm.serving.limits import Limits
from calm.serving.server import bind, url_of
from calm.serving.vllm import limiting
from calm.serving.vllm_server import LIMITS

TOGETHER = 1
JSON = {"content-type": "application/json"}
TIGHT = Limits(batch_size=TOGETHER, queue=1, max_tokens=50, body_size=1000, seconds=3)


@dataclass
class Behind:
    """An application behind the limits, whose answers wait until they are let go."""

    url: str = ""
    entered: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    async def wait(self, kind: str) -> None:
        self.entered.append(kind)
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        finally:
            self.left.append(kind)

    async def wait_as_vllm(self, kind: str, request: Request) -> None:
        """In a task that only a client who goes can end: cancelling what waits for it leaves it running."""
        waiting = asyncio.create_task(self.wait(kind))
        listening = asyncio.create_task(self.hear_of_going(request))
        _, pending = await asyncio.wait({waiting, listening}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()

    async def hear_of_going(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def answer(self, request: Request) -> Any:
        """Reads the body as vLLM does, and does what it says."""
        if "authorization" in request.headers:  # a wrong key, say: nothing is read
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.body()
        asked = json.loads(body)
        kind = asked.get("kind", "at once")
        if kind == "fails":
            raise RuntimeError("as it happens")
        if kind == "at once":
            return {"bytes": len(body)}
        if not asked.get("stream"):
            await self.wait_as_vllm(kind, request)
            return {"bytes": len(body)}

        async def events() -> AsyncIterator[str]:
            yield "data: first\n\n"
            while kind == "floods":
                yield "data: " + "x" * (1 << 20) + "\n\n"
            await self.wait(kind)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def post(self, asked: dict[str, Any] | bytes = b"{}", **options: Any) -> httpx2.Response:
        content = asked if isinstance(asked, bytes) else json.dumps(asked)
        return httpx2.post(f"{self.url}/v1/completions", content=content, **{"headers": JSON, "timeout": 30} | options)


@contextmanager
def behind(monkeypatch: pytest.MonkeyPatch, limits: Limits | None, together: int = TOGETHER) -> Iterator[Behind]:
    if limits is not None:
        monkeypatch.setenv(LIMITS, json.dumps(asdict(limits)))
    application = Behind()
    app = FastAPI()
    app.state.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=together))
    app.add_middleware(limiting.Limiting)
    app.add_api_route("/v1/completions", application.answer, methods=["POST"])
    bound = bind("127.0.0.1", 0, 600)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    application.url = url_of(bound)
    yield application
    application.go.set()
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def pieces() -> Iterator[bytes]:
    """A body without its length."""
    for _ in range(100):
        yield b" " * 100


def refusals(url: str, asked: dict[str, Any], running: Callable[[], Any], waiting: Callable[[], Any]) -> dict[str, Any]:
    """What a server with the tight limits, which is held still, says when each of them is hit."""

    def post(**body: Any) -> httpx2.Response:
        return httpx2.post(f"{url}/v1/completions", json=asked | body, timeout=60)

    def said(response: httpx2.Response) -> Any:
        headers = {name: response.headers.get(name) for name in ("retry-after", "x-should-retry", "content-type")}
        return response.status_code, headers, response.json()

    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post)
        until(running)
        stream = pool.submit(post, stream=True)
        until(waiting)
        found = {
            "tokens": said(post(max_tokens=TIGHT.max_tokens + 1)),
            "body": said(post(user="x" * TIGHT.body_size)),
            "pieces": said(httpx2.post(f"{url}/v1/completions", content=pieces(), headers=JSON)),
            "queue": said(post()),
            "time": said(whole.result()),
        }
        events = stream.result()
        assert events.status_code == 200 and events.headers["content-type"].startswith("text/event-stream")
        found["time of a stream"] = [line for line in events.text.split("\n\n") if line][-2:]
    return found


def test_refusals_are_those_of_transformers(composed: Path, monkeypatch: pytest.MonkeyPatch):
    """Status, headers and body of each, and the end of a stream that has begun."""
    asked = {"model": NAME, "prompt": "x", "max_tokens": 50, "temperature": 0}
    with serving(composed, limits=TIGHT) as served, held(served.engine):
        engine = served.engine
        expected = refusals(served.url, asked, lambda: engine._running, lambda: engine._waiting)
    with behind(monkeypatch, TIGHT) as other:
        asked |= {"kind": "waits"}
        found = refusals(other.url, asked, lambda: len(other.entered) == 1, lambda: len(other.entered) == 2)
        until(lambda: len(other.left) == 2)
    assert found == expected
    assert [found[case][0] for case in ("tokens", "body", "pieces", "queue", "time")] == [400, 413, 413, 429, 504]
    assert found["time of a stream"][1] == "data: [DONE]"


HELD = {"kind": "waits", "n": 2}
ENDS: dict[str, tuple[Callable[[Behind], Any], int]] = {  # what is asked, and its status
    "fails": (lambda other: other.post({"kind": "fails"}), 500),
    "no JSON": (lambda other: other.post(b"{"), 500),
    "too many tokens": (lambda other: other.post({"max_tokens": 51}), 400),
    "too many rows": (lambda other: other.post({"n": 3}), 400),
    "too large": (lambda other: other.post(b" " * 1001), 413),
    "too large, in pieces": (lambda other: httpx2.post(f"{other.url}/v1/completions", content=pieces()), 413),
    "not read": (lambda other: other.post(b" " * 1001, headers={"authorization": "Bearer wrong"}), 401),
    "time": (lambda other: other.post(HELD), 504),
    "time of a stream": (lambda other: other.post(HELD | {"stream": True}), 200),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_request_is_no_longer_counted_when_it_has_ended(case: str, monkeypatch: pytest.MonkeyPatch):
    """In whatever way: then as many rows as there may be at most are taken again."""
    ask, status = ENDS[case]
    seconds = 0.5 if case.startswith("time") else 60  # which a busy machine does not take for the others
    with behind(monkeypatch, Limits(queue=1, max_tokens=50, body_size=1000, seconds=seconds)) as other:
        for _ in range(3):
            assert ask(other).status_code == status
            until(lambda: other.post({"n": 2}).status_code == 200)
            assert len(other.left) == len(other.entered)


def _send(other: Behind, asked: dict[str, Any]) -> socket.socket:
    """A connection by which a request was sent, and nothing is read."""
    body = json.dumps(asked).encode()
    client = socket.create_connection(("127.0.0.1", int(other.url.rpartition(":")[2])))
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return client


def test_a_client_that_does_not_read_is_counted_until_its_time_is_over(monkeypatch: pytest.MonkeyPatch):
    with (
        behind(monkeypatch, Limits(queue=1, seconds=2)) as other,
        _send(other, {"kind": "floods", "n": 2, "stream": True}),
    ):
        until(lambda: other.post().status_code == 429)
        until(lambda: other.post({"n": 2}).status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_is_no_longer_counted(stream: bool, monkeypatch: pytest.MonkeyPatch):
    """The negative control is the moment before."""
    with behind(monkeypatch, Limits(queue=1)) as other:
        with _send(other, HELD | {"stream": stream}):
            until(lambda: other.entered)
            assert other.post().status_code == 429
        until(lambda: other.left)
        until(lambda: other.post({"n": 2}).status_code == 200)


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"n": "3"}, 3),  # which vLLM takes for a number
        ({"n": 3.0}, 3),
        ({"n": None}, 1),
        ({"n": -3}, 1),
        ({"n": "many"}, 1),
        ({"prompt": "text"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": []}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [[1], [2, 3]], "n": 2}, 4),
        ({"messages": [{"role": "user"}, {"role": "user"}], "n": 2}, 2),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, 2),
        ({"query": "of /generative_scoring", "items": ["a", "b", "c"]}, 3),
        ({"query": [1, 2], "items": [[1], [2, 3]]}, 2),
        ({"token_ids": [1, 2, 3], "sampling_params": {"n": 3}}, 3),  # of /inference/v1/generate
        ({"token_ids": [1, 2, 3], "sampling_params": "none"}, 1),
    ],
)
def test_a_row_is_a_prompt_and_choice(asked: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch):
    """As many as there is room for are taken; with one place less they are not, and would never be."""
    for together, status in ((rows, 200), (rows - 1, 400)):
        with behind(monkeypatch, Limits(queue=0), together) as other:
            response = other.post(asked)
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["message"].startswith(f"{rows} answers are more than the")


@pytest.mark.parametrize("param", limiting.LENGTHS)
@pytest.mark.parametrize("most", [50, "50", 50.0])
def test_longer_answers_are_refused_by_whatever_name(param: str, most: Any, monkeypatch: pytest.MonkeyPatch):
    with behind(monkeypatch, TIGHT) as other:
        assert other.post({param: most}).status_code == 200
        more = {param: type(most)(int(most) + 1)}
        for asked, name in ((more, param), ({"sampling_params": more}, f"sampling_params.{param}")):
            error = other.post(asked).json()["error"]
            assert (error["message"], error["param"]) == (f"{name}=51: this server generates 50 at most", name)


def test_bodies_of_just_the_size_pass_unchanged(monkeypatch: pytest.MonkeyPatch):
    with behind(monkeypatch, TIGHT) as other:
        whole = b"{}" + b" " * (TIGHT.body_size - 2)
        for content in (whole, (whole[at : at + 100] for at in range(0, len(whole), 100))):
            response = httpx2.post(f"{other.url}/v1/completions", content=content)
            assert response.json() == {"bytes": TIGHT.body_size}


def test_without_the_variable_there_are_no_limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(LIMITS, raising=False)
    with behind(monkeypatch, None) as other:
        asked = {"n": 1000, "max_tokens": 10**6, "prompt": "x" * (2 << 20)}
        assert other.post(asked).status_code == 200
    config = SimpleNamespace(override_generation_config={"temperature": 0})
    limiting.limit_answers(config)
    assert config.override_generation_config == {"temperature": 0}


@pytest.mark.parametrize(
    "limits",
    [
        *(
            {name: value}
            for name in ("batch_size", "queue", "max_tokens", "body_size")
            for value in ("64", -1, 1.5, True)
        ),
        *({"seconds": value} for value in ("600", 0, -1, float("inf"), float("nan"), 10**400, None)),
        {"batch_size": 0},
    ],
    ids=str,
)
def test_what_is_no_limit_is_refused(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Where it is read, with the variable that it comes from, and not when the first request is counted."""
    ((name, value),) = limits.items()
    with pytest.raises(CalmError, match=f"^{name}={re.escape(repr(value))}.*: expected a"):
        Limits(**limits)
    monkeypatch.setenv(LIMITS, json.dumps(limits))
    with pytest.raises(CalmError, match=rf"^CALM_LIMITS: {name}=.*: expected a.*For example {{\"queue\": 64"):
        limiting.limit_answers(SimpleNamespace(override_generation_config={}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is not JSON"),
        ("queue=64", "is not JSON"),
        ("[64]", "some of batch_size, queue"),
        ('{"rows": 1}', "some of"),
    ],
)
def test_limits_that_cannot_be_read_are_named(value: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LIMITS, value)
    with pytest.raises(CalmError, match=f"CALM_LIMITS={re.escape(repr(value))}.*{message}.*For example"):
        limiting.handed_over()


@pytest.mark.parametrize(("own", "most"), [({}, 50), ({"max_new_tokens": 9}, 9), ({"max_new_tokens": 99}, 50)])
def test_answers_end_at_the_limit_beside_what_else_is_overridden(
    own: dict[str, int], most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(LIMITS, json.dumps(asdict(TIGHT)))
    config = SimpleNamespace(override_generation_config={"temperature": 0} | own)
    limiting.limit_answers(config)
    assert config.override_generation_config == {"temperature": 0, "max_new_tokens": most}
