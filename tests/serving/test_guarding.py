"""Who may ask vLLM's server, here a small application with its paths: those with the key, on all of them but two."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from calm.hosts import in_url
from calm.serving.vllm.guarding import Guarding

KEY = "a-key-that-nobody-should-see"
LOCKED = ("v1/completions", "invocations", "generative_scoring", "tokenize", "scale_elastic_ep", "nowhere", "health/x")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def behind(
    api_key: list[str] | None = None, host: str | None = "127.0.0.1", origins: tuple[str, ...] = ()
) -> TestClient:
    """A client of an application like vLLM's: what any path answers is what it got."""
    app = FastAPI()
    app.state.args = Namespace(api_key=api_key, host=host)
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guarding)

    @app.get("/{path:path}")
    @app.post("/{path:path}")
    async def answer(path: str) -> str:
        return path

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("reached")

    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.fixture(params=["the environment", "--api-key"])
def locked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """With the key given in either of vLLM's ways, the second of which comes first there."""
    if request.param == "the environment":
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        yield behind()
    else:
        monkeypatch.setenv("VLLM_API_KEY", "another")
        yield behind(["one more", KEY])


@pytest.mark.parametrize("path", [*LOCKED, "docs", "openapi.json"])
def test_every_path_asks_for_the_key(path: str, locked: TestClient):
    """/invocations generates as /v1/completions does; vLLM's own middleware lets everyone ask it."""
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer another"}):
        for answer in (locked.post(f"/{path}", json={}, headers=headers), locked.get(f"/{path}", headers=headers)):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert locked.get(f"/{path}", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_health_and_metrics_do_not(locked: TestClient):
    assert locked.get("/health").json() == "health" and locked.get("/metrics").json() == "metrics"


def test_nor_do_sockets_open_without_it(locked: TestClient):
    with pytest.raises(WebSocketDisconnect), locked.websocket_connect("ws://127.0.0.1:8000/v1/realtime"):
        pass
    headers = {"authorization": f"Bearer {KEY}"}
    with locked.websocket_connect("ws://127.0.0.1:8000/v1/realtime", headers=headers) as socket:
        assert socket.receive_text() == "reached"


@pytest.mark.parametrize(("origins", "status"), [((), 400), (("https://page.example",), 200)])
def test_browsers_learn_without_it_whether_a_page_may_ask(
    origins: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch
):
    """By default no page may, as vLLM allows no origins of itself."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert behind(origins=origins).options("/invocations", headers=headers).status_code == status


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost", None])
def test_without_a_key_requests_name_this_machine(host: str | None):
    """And not a name that some page had lead here (DNS rebinding)."""
    client = behind(host=host)
    for name in ("localhost:8000", "127.0.0.1", "[::1]:8000", in_url(host or "localhost")):
        assert client.post("/invocations", headers={"host": name}).status_code == 200
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert client.post("/invocations", headers={"host": name}).status_code == 400
