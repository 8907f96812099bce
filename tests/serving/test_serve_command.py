"""`calm serve` as a process: what it refuses before anything is loaded, what it logs, and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from factories import patched
from openai import OpenAI
from servers import NAME, until
from typer.testing import CliRunner

from calm.cli import app
from calm.cli.serve import default_name
from calm.errors import CalmError
from calm.serving import vllm_server
from calm.serving.server import Server, bind, check_access, url_of

SECRET = "what-nobody-should-read"
Running = tuple["subprocess.Popen[str]", str, list[str]]


def refused(*arguments: Any, code: int = 1, **variables: str) -> str:
    """What the command says when it does not start."""
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"CALM_API_KEY": None} | variables)
    assert result.exit_code == code, result.output
    return re.sub(r"[\s│]+", " ", result.output)


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(composed: Path, tmp_path: Path):
    with patched(vllm_server, is_installed=lambda: False):
        assert "holds no composition" in refused(tmp_path / "nothing")
        assert "vLLM is not installed" in refused(composed, "--engine", "vllm")
        assert "takes no options of vLLM" in refused(composed, "--", "--max-model-len", "9", code=2)
        assert "takes an API key" in refused(composed, "--host", "0.0.0.0")
        assert "seconds=inf (--timeout): expected a number" in refused(composed, "--timeout", "inf")
        assert "cannot listen on nowhere.invalid" in refused(composed, "--host", "nowhere.invalid", "--api-key", "x")
    with patched(vllm_server, is_installed=lambda: True):
        message = refused(composed, "--device", "cpu", "--log-prompts", code=2)
        assert "--log-prompts, --device: for --engine transformers" in message
        for option in ("--host", "--host=0.0.0.0", "--ho", "--port", "--port=1", "--uds", "--ud=x"):  # as vLLM takes it
            message = refused(composed, "--", "--max-model-len", "9", option, "0.0.0.0", code=2)
            assert f"{option} after --: where the server listens is said before it" in message


def test_a_port_in_use_is_named(composed: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(composed, "--engine", "transformers", "--port", port)
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in message


@pytest.mark.parametrize(
    ("model", "name"), [("runs/tiny", "tiny"), ("org/tiny", "tiny"), ("runs/tiny/", "tiny"), ("tiny/x/..", "tiny")]
)
def test_a_model_is_called_as_its_folder(model: str, name: str, composed: Path, monkeypatch: pytest.MonkeyPatch):
    assert default_name(model) == name
    monkeypatch.chdir(composed)
    assert default_name(".") == NAME


def test_help_does_not_show_the_key():
    result = CliRunner().invoke(app, ["serve", "--help"], env={"CALM_API_KEY": SECRET, "COLUMNS": "200"})
    assert "CALM_API_KEY" in result.output
    assert SECRET not in result.output


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_host_needs_no_key(host: str):
    check_access(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_every_other_host_does(host: str):
    with pytest.raises(CalmError, match="takes an API key: set CALM_API_KEY"):
        check_access(host, None)
    check_access(host, "a-key")


@pytest.mark.parametrize("key", ["", " ", "a ", "ключ", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused(key: str):
    with pytest.raises(CalmError, match="the API key is empty or"):
        check_access("127.0.0.1", key)


def test_version_6_of_the_internet_too():
    with suppress(CalmError), bind("::1", 0, 600) as bound:  # nothing to see where there is none
        assert url_of(bound).startswith("http://[::1]:")


@pytest.mark.parametrize("kind", [Server, uvicorn.Server])
def test_a_connection_accepted_at_the_end_does_not_hold_it_up(kind: type[uvicorn.Server]):
    """After each of the first turns of the event loop; uvicorn's own server is the negative control."""

    async def application(scope: object, receive: object, send: object) -> None:
        raise AssertionError("no request was sent")

    async def still_connected(turns: int) -> int:
        bound = bind("127.0.0.1", 0, 600)
        server = kind(uvicorn.Config(application, lifespan="off", log_config=None, timeout_graceful_shutdown=2))
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[bound])
        with socket.create_connection(bound.getsockname()):
            for _ in range(turns):
                await asyncio.sleep(0)
            ending = asyncio.create_task(server.shutdown(sockets=[bound]))
            await asyncio.wait([ending], timeout=1.5)
            left = len(server.server_state.connections)
            await ending
        return left

    async def all_turns() -> int:
        return sum(await asyncio.gather(*map(still_connected, range(8))))

    assert (asyncio.run(all_turns()) > 0) == (kind is uvicorn.Server)


@contextmanager
def process(composed: Path, *arguments: str, **variables: str) -> Iterator[Running]:
    """A server in a process of its own, where it is, and the lines it has written so far."""
    command = [sys.executable, "-c", "from calm.cli import main; main()", "serve", str(composed), "--port", "0"]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen([*command, *arguments], env=os.environ | variables, **pipes)
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(iter(running.stderr.readline, "")), daemon=True)
    reading.start()

    def where() -> str | None:
        assert running.poll() is None, "".join(lines)
        return next((found[1] for line in lines if (found := re.search(rf"^{NAME} on (http\S+)/v1,", line))), None)

    def answers() -> bool:
        with suppress(httpx2.ConnectError):
            return httpx2.get(f"{where()}/health").status_code == 200
        return False

    try:
        until(where, 120)
        until(answers)
        yield running, where(), lines
        reading.join(60)
    finally:
        running.kill()
        running.wait()


def test_sigterm_finishes_what_runs_refuses_what_comes_and_ends_in_order(composed: Path):
    """Four answers are streaming and four wait when it comes; all eight are finished. No word of them is logged."""
    options = ("--engine", "transformers", "--batch-size", "4", "--max-tokens", "100")
    with process(composed, *options, CALM_API_KEY=SECRET) as (running, url, lines):
        client = OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0)
        asked = {"model": NAME, "prompt": f"{SECRET}-prompt", "max_tokens": 40, "n": 8, "temperature": 0}
        stream = client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
        chunks = [next(stream)]
        idle = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))  # must not hold it up
        running.send_signal(signal.SIGTERM)

        def is_refused() -> bool:
            try:
                client.models.list()
            except openai.APIConnectionError:
                return True
            return False

        until(is_refused)
        chunks += list(stream)
        assert chunks[-1].usage.completion_tokens == 8 * 40
        assert sum(choice.finish_reason == "length" for chunk in chunks for choice in chunk.choices) == 8
        assert running.wait(60) == 0
        idle.close()
    logged = "".join(lines)
    assert re.search(r"POST /v1/completions 200 in", logged) and "completion_tokens=320" in logged
    assert "Traceback" not in logged
    assert SECRET not in logged, "neither prompts nor the key"
