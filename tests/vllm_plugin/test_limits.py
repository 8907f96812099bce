"""`calm serve` on vLLM: each of its limits is hit, every place is given back, and its end finishes what runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import byte_tokenizer, save_base

import calm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KEY = "a-key-that-nobody-should-see"
SECRET = "what-nobody-should-read"
CONTEXT = 16384
LONG = 16000  # tokens; nobody waits for so many here


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny composition with a long context."""
    folder = tmp_path_factory.mktemp("limited")
    tokenizer = byte_tokenizer(chat=True)
    anchor = save_base(folder / "anchor", tokenizer, seed=0, width=64, max_position_embeddings=CONTEXT)
    one = save_base(folder / "one", tokenizer, seed=1, width=32, layers=3, max_position_embeddings=CONTEXT)
    calm.compose(str(anchor), {"one": str(one)}, connections=2).save_pretrained(folder / "tiny")
    return folder / "tiny"


@dataclass
class Serving:
    """A server in a process group of its own."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def post(self, path: str = "completions", content: Any = None, key: str = KEY, **asked: Any) -> httpx.Response:
        """Asks for 1 greedy token, unless more is asked."""
        asked = {"model": "tiny", "max_tokens": 1, "temperature": 0, "ignore_eos": True} | asked
        if not {"messages", "input"} & asked.keys():
            asked = {"prompt": "3 + 4 ="} | asked
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        body = json.dumps(asked).encode() if content is None else content
        return self.client.post(f"/v1/{path}", content=body, headers=headers)

    def metric(self, name: str) -> float:
        found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def load(self) -> tuple[float, float]:
        """How many answers the engine generates, and how many wait there."""
        return self.metric("num_requests_running"), self.metric("num_requests_waiting")

    def has_settled(self) -> bool:
        """Whether the count of tokens stands still: those of the last steps are counted after their answers ended."""
        before = self.metric("generation_tokens_total")
        time.sleep(0.5)
        return self.metric("generation_tokens_total") == before

    def leave_midway(self, count: int, **asked: Any) -> None:
        """Asks so many times at once, and closes the connections when the engine is at it."""
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": LONG, "ignore_eos": True} | asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        address = ("127.0.0.1", self.client.base_url.port)
        connections = [socket.create_connection(address) for _ in range(count)]
        for connection in connections:
            connection.sendall(head.encode() + body)
        until(lambda: sum(self.load()) == count)
        for connection in connections:
            connection.close()

    def is_closed(self) -> bool:
        try:
            httpx.get(f"{self.client.base_url}/health")
        except httpx.ConnectError:
            return True
        except httpx.TransportError:
            pass
        return False


@contextmanager
def serving(composed: Path, log: Path, *options: object, own: tuple[str, ...] = ()) -> Iterator[Serving]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-c", "from calm.cli import main; main()", "serve", composed, "--port", port]
    line += ["--dtype", "float32", *options, "--", "--enforce-eager", *own]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("VLLM_ENABLE_V1")}
    environment |= {"CALM_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as out, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        started: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "env": environment}
        process = subprocess.Popen([str(part) for part in line], start_new_session=True, **started)
        try:
            until(lambda: process.poll() is not None or is_up(client), 600)
            assert process.poll() is None, log.read_text()[-4000:]
            yield Serving(process, client, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]


def test_each_limit_is_hit_and_every_place_given_back(composed: Path, tmp_path: Path) -> None:
    """As many answers as may run and wait are taken again after each kind of end, and one more is not."""
    options = ("--batch-size", 2, "--queue", 2, "--max-tokens", LONG, "--body-size", 3000, "--timeout", 20)
    with serving(composed, tmp_path / "log", *options) as server:

        def all_places_are_free() -> bool:
            return server.post(n=4, temperature=1).status_code == 200

        def refused(status: int, response: httpx.Response) -> dict[str, Any]:
            assert response.status_code == status, response.text
            return response.json()["error"]

        assert all_places_are_free()
        assert refused(400, server.post(n=5))["message"].startswith("5 answers are more than the 2 that are generated")
        assert refused(400, server.post(prompt=["a", "b", "c"], n=2))["message"].startswith("6 answers")
        message = f"max_tokens={LONG + 1}: this server generates {LONG} at most"
        assert refused(400, server.post(max_tokens=LONG + 1))["message"] == message
        chat = [{"role": "user", "content": "x"}]
        error = refused(400, server.post("chat/completions", messages=chat, max_completion_tokens=LONG + 1))
        assert error["param"] == "max_completion_tokens"
        assert refused(400, server.post("responses", input="x", max_output_tokens=LONG + 1))["param"] == (
            "max_output_tokens"
        )

        large = b" " * 3001
        too_large = refused(413, server.post(content=large))
        assert refused(413, server.post(content=iter([large[:1000]] * 100))) == too_large
        assert too_large["message"] == "the body is too large: this server reads 3000 bytes at most"
        for path in ("tokenize", "v1/chat/completions", "v1/responses", "v1/messages", "invocations"):
            headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
            assert server.client.post(f"/{path}", content=large, headers=headers).status_code == 413
        assert server.post(content=large, key="wrong").status_code == 401, "before anything is read"
        for content in (b"{", b"[]", b'{"model": "other", "prompt": "x"}', b'{"model": "tiny", "prompt": [1000000]}'):
            assert server.post(content=content).status_code in (400, 404)
        assert all_places_are_free()

        generated = server.metric("generation_tokens_total")
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(server.post, max_tokens=LONG, stream=True) for _ in range(2)]
            until(lambda: server.load() == (2, 0))  # so that it is the streams that begin
            asked += [pool.submit(server.post, max_tokens=LONG) for _ in range(2)]
            until(lambda: server.load() == (2, 2))
            full = server.post()
            assert refused(429, full)["code"] == "queue_full" and int(full.headers["retry-after"]) > 0
            assert server.client.get("/health").status_code == 200
            answers = [answer.result() for answer in asked]
        message = "no answer within 20 s, the most that this server gives a request"
        for answer in answers[:2]:
            *_, error, last = events(answer)
            assert answer.status_code == 200 and last == "[DONE]"
            assert json.loads(error)["error"]["message"] == message
        assert max(len(events(answer)) for answer in answers[:2]) > 10, "a stream had begun"
        for answer in answers[2:]:
            assert refused(504, answer) == {
                "message": message,
                "type": "server_error",
                "param": None,
                "code": "timeout",
            }
            assert answer.headers["x-should-retry"] == "false"
        until(lambda: server.load() == (0, 0) and server.has_settled())
        done = server.metric("generation_tokens_total")
        assert 0 < done - generated < LONG, "nothing was generated to its end"
        assert all_places_are_free()
        assert server.metric("generation_tokens_total") == done + 4, "and nothing is any more"

        for stream in (False, True):
            server.leave_midway(4, stream=stream)
            until(lambda: server.load() == (0, 0))
            assert all_places_are_free()


def test_answers_end_at_the_limit_and_ctrl_c_finishes_them(composed: Path, tmp_path: Path) -> None:
    """Where a request asks for no length, and beside what else of the generation settings is overridden.

    A terminal sends Ctrl-C to all of the server's processes. Nothing of prompts and answers was logged by then.
    """
    own = ("--override-generation-config", '{"temperature": 0}')
    with serving(composed, tmp_path / "log", "--max-tokens", 1500, own=own) as server:

        def ask(path: str, **asked: Any) -> tuple[int, str]:
            whole = server.post(path, max_tokens=None, temperature=None, **asked).json()
            choice = whole["choices"][0]
            return whole["usage"]["completion_tokens"], choice["text"] if "text" in choice else choice["message"]

        chat = {"messages": [{"role": "user", "content": SECRET}]}
        asked = [("completions", {"prompt": SECRET})] * 2 + [("chat/completions", chat)]
        lengths, texts = zip(*[ask(path, **body) for path, body in asked], strict=True)
        assert lengths == (16, 16, 1500), "of /v1/completions OpenAI's default comes first, as on transformers"
        assert texts[0] == texts[1], "greedy, as the user's own option says"
        assert server.post(max_tokens=1501, prompt=SECRET).status_code == 400
        assert server.post(temperature="hot", prompt=SECRET).status_code == 400
        assert server.post(content=f'{{"prompt": "{SECRET}"').status_code == 400

        with ThreadPoolExecutor(4) as pool:
            answers = start(server, pool, 1500)
            os.killpg(server.process.pid, signal.SIGINT)
            check_finished(answers, 1500)
        assert server.process.wait(120) == 0
        log = server.log.read_text()
        assert "POST /v1/chat/completions" in log
        assert SECRET not in log and KEY not in log and texts[0] not in log


def start(server: Serving, pool: ThreadPoolExecutor, tokens: int) -> list[Future[httpx.Response]]:
    """Four answers, two of them streams, of which the engine generates some."""
    before = server.metric("generation_tokens_total")
    asked = {"max_tokens": tokens, "stream_options": None}
    answers = [pool.submit(server.post, stream=stream, **asked) for stream in (True, False, True, False)]
    until(lambda: sum(server.load()) == 4)
    until(lambda: server.metric("generation_tokens_total") > before)
    return answers


def check_finished(answers: list[Future[httpx.Response]], tokens: int) -> None:
    for answer in (future.result() for future in answers):
        assert answer.status_code == 200
        if answer.headers["content-type"] == "application/json":
            assert answer.json()["usage"]["completion_tokens"] == tokens
        else:
            *_, last, done = events(answer)
            assert json.loads(last)["choices"][0]["finish_reason"] == "length" and done == "[DONE]"


def test_sigterm_finishes_what_runs_and_waits_and_takes_no_more(composed: Path, tmp_path: Path) -> None:
    """Long before the time that it may take, which is 600 s by default."""
    with serving(composed, tmp_path / "log", "--batch-size", 2) as server, ThreadPoolExecutor(4) as pool:
        idle = socket.create_connection(("127.0.0.1", server.client.base_url.port))  # must not hold it up
        answers = start(server, pool, 1000)
        server.process.send_signal(signal.SIGTERM)
        until(server.is_closed)
        assert not all(answer.done() for answer in answers)
        check_finished(answers, 1000)
        assert server.process.wait(120) == 0
        idle.close()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("case", ["a second signal", "--shutdown-timeout 0", "--shutdown-timeout 2"])
def test_the_end_can_be_had_at_once(case: str, composed: Path, tmp_path: Path) -> None:
    """By a second signal, or by vLLM's own option after `--`; the answers are far from finished then."""
    own = tuple(case.split()) if case.startswith("--") else ()
    options = ("--max-tokens", LONG, "--timeout", 1000)
    with serving(composed, tmp_path / "log", *options, own=own) as server, ThreadPoolExecutor(4) as pool:
        answers = start(server, pool, LONG)
        server.process.send_signal(signal.SIGTERM)
        if not own:
            until(server.is_closed)
            time.sleep(3)
            assert server.process.poll() is None and not any(answer.done() for answer in answers)
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
        for answer in answers:
            error = answer.exception()
            assert isinstance(error, httpx.TransportError) if error else '"length"' not in answer.result().text
