"""`calm playground`: what it refuses before it loads anything, what it loads, and that it serves until interrupted."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from factories import open_gates
from pages import free_port
from typer.testing import CliRunner, Result

import calm
from calm.cli import app
from calm.cli.playground import load_company
from calm.playground.answers import Question, Sampling

AUTH = "CALM_PLAYGROUND_AUTH"


def run(*arguments: Any, auth: str | None = None, code: int = 1) -> Result:
    result = CliRunner().invoke(app, ["playground", *map(str, arguments)], env={AUTH: auth})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory, tiny_bases: dict[str, str]) -> Path:
    """A saved composition whose connections say something."""
    folder = tmp_path_factory.mktemp("composed") / "out"
    model = calm.compose(tiny_bases["anchor"], tiny_bases["augmenting"], connections=[(0, 0)])
    torch.manual_seed(0)
    torch.nn.init.normal_(model.connections[0].w_o.weight)
    open_gates(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_let_in_with_a_password_only(host: str, tmp_path: Path):
    nowhere = tmp_path / "nowhere"
    assert f"set {AUTH}=USER:PASSWORD" in run(nowhere, "--host", host).stderr
    port = free_port()
    let_in = run(nowhere, "--host", host, "--port", port, auth="ada:secret").stderr  # to load, or it is no address here
    assert "no composition" in let_in or (f":{port}" in let_in and "Cannot listen on" in let_in)
    assert f"{AUTH} is set, but not as USER:PASSWORD" in run(nowhere, "--host", host, auth="secret").stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host: str, tmp_path: Path):
    assert "no composition" in run(tmp_path / "nowhere", "--host", host, "--port", free_port()).stderr


def test_without_gradio_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "calm.playground.app", raising=False)
    monkeypatch.delattr("calm.playground.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'calm-lm[serve]'" in run(tmp_path).stderr


def test_a_port_in_use_is_named_before_anything_is_loaded(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1:{port}" in run(tmp_path / "nowhere", "--port", port).stderr


def test_augmenting_models_are_loaded_whole_and_from_where_they_are_now(
    composed: Path, tmp_path: Path, tiny_bases: dict[str, str]
):
    moved = shutil.copytree(tiny_bases["augmenting"], tmp_path / "moved")
    for where in (None, [str(moved)], [f"augmenting={moved}"]):
        parts = load_company(str(composed), None, where, "auto", "cpu")
        whole = parts.augmenting["augmenting"]
        assert whole.config.num_hidden_layers == 2 and whole.get_output_embeddings() is not None
        assert parts.composed.augmenting["augmenting"].config.num_hidden_layers == 1
    *_, answers = parts.answers(Question("1+2=", Sampling(4)))
    inputs = parts.tokenizer("1+2=", return_tensors="pt")
    alone = whole.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answers[0].token_ids == alone.tolist()


@pytest.mark.slow
def test_it_serves_until_it_is_interrupted(composed: Path):
    port = free_port()
    line = [sys.executable, "-c", "from calm.cli import main; main()", "playground", str(composed), "--port", str(port)]

    def take_ctrl_c() -> None:  # which a shell keeps from what it runs in the background, these tests perhaps
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, preexec_fn=take_ctrl_c, **pipes)
    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        try:
            page = httpx.get(f"http://127.0.0.1:{port}/")
            break
        except httpx.TransportError:
            time.sleep(0.2)
    assert page.status_code == 200 and "calm playground" in page.text
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in err
    assert re.search(rf"http://127.0.0.1:{port} shows .*; Ctrl-C ends it", out)
