"""What vLLM's server is started with; a stand-in for it writes down what it got."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calm.serving import vllm_server
from calm.serving.limits import Limits

KEY = "a-key-that-nobody-should-see"
STAND_IN = """
import json, os, sys
assert "calm" not in sys.modules, "it has a process of its own"
limits = json.loads(os.environ["CALM_LIMITS"])
seen = {{"arguments": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "limits": limits}}
open({seen!r}, "w").write(json.dumps(seen))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which vLLM seems to be installed."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(STAND_IN.format(seen=str(tmp_path / "seen.json")))
    (tmp_path / "site" / "vllm" / "__init__.py").touch()
    paths = os.pathsep.join((str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])))
    return os.environ | {"PYTHONPATH": paths}


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "calm.cli", "serve", *map(str, arguments)]
    line[1:3] = ["-c", "from calm.cli import main; main()"]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


MIDDLEWARE = [
    *("--middleware", "calm.serving.vllm.middleware.Augmenting"),
    *("--middleware", "calm.serving.vllm.limiting.Limiting"),
    *("--middleware", "calm.serving.vllm.ending.Ending"),
    *("--middleware", "calm.serving.vllm.guarding.Guarding"),
]


def test_vllm_becomes_the_process_where_it_is_installed(
    composed: Path, environment: dict[str, str], tmp_path: Path, free_port: int
):
    """By default, with the key in the environment and not on the command line, and with what follows `--`."""
    options = ["--port", free_port, "--name", "served", "--dtype", "float32", "--", "--max-model-len", "64", "--x=y"]
    result = run(environment | {"CALM_API_KEY": KEY}, composed, *options)
    assert result.returncode == 0, result.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["arguments"] == [
        *("--model", str(composed), "--host", "127.0.0.1", "--port", str(free_port)),
        *("--served-model-name", "served", "served:anchor", "served:one", "served:two"),
        *MIDDLEWARE,
        *("--dtype", "float32", "--shutdown-timeout", "600", "--max-model-len", "64", "--x=y"),
    ]
    assert seen["key"] == KEY
    assert Limits(**seen["limits"]) == Limits()
    assert KEY not in result.stdout + result.stderr


def test_the_limits_are_handed_over(composed: Path, environment: dict[str, str], tmp_path: Path, free_port: int):
    """What vLLM has options for, by these; its own, after `--`, come last and so have the last word."""
    given = ["--batch-size", 3, "--queue", 4, "--max-tokens", 50, "--body-size", 1000, "--timeout", 2.5]
    own = ["--shutdown-timeout", "9", "--max-num-seqs", "5"]
    result = run(environment, composed, "--port", free_port, *given, "--", *own)
    assert result.returncode == 0, result.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert Limits(**seen["limits"]) == Limits(3, 4, 50, 1000, 2.5)
    assert seen["arguments"][-8:] == ["--shutdown-timeout", "3", "--max-num-seqs", "3", *own]


@pytest.mark.parametrize(("recorded", "expected"), [("float32", "float32"), ("bfloat16", "auto")])
def test_a_composition_in_float32_is_served_in_it(
    recorded: str, expected: str, composed: Path, environment: dict[str, str], tmp_path: Path, free_port: int
):
    """Without a word about it, as transformers' server does; vLLM's own choice would be bfloat16."""
    folder = tmp_path / "copy"
    shutil.copytree(composed, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["anchor_reference"]["dtype"] == "float32"
    config["anchor_reference"]["dtype"] = recorded
    (folder / "config.json").write_text(json.dumps(config))
    result = run(environment | {"CUDA_VISIBLE_DEVICES": ""}, folder, "--port", free_port)
    assert result.returncode == 0, result.stderr
    arguments = json.loads((tmp_path / "seen.json").read_text())["arguments"]
    assert arguments[arguments.index("--dtype") + 1] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_was_asked_for_is_taken(dtype: str, monkeypatch: pytest.MonkeyPatch):
    for there in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        assert vllm_server.as_composed(dtype, "float32") == dtype


def test_on_accelerators_vllm_chooses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert vllm_server.as_composed("auto", "float32") == "auto"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert vllm_server.as_composed("auto", "float32") == "float32"
    assert vllm_server.as_composed("auto", None) == "auto"
