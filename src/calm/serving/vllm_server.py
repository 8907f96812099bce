"""Hands over to vLLM's own OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from calm.errors import CalmError


def is_installed() -> bool:
    """Whether vLLM is in this environment."""
    return importlib.util.find_spec("vllm") is not None


def command(
    model: str, name: str, host: str, port: int, dtype: str, options: Sequence[str], api_key: str | None
) -> tuple[list[str], dict[str, str]]:
    """What to run, and the variables to add to its environment.

    Args:
        model: Folder or hub name of the composition.
        name: What clients call it.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Of the weights.
        options: vLLM's own.
        api_key: Goes into the environment: everyone on the machine can read a command line.

    Returns:
        The command line, and the variables.

    Raises:
        CalmError: If vLLM's command is missing.
    """
    beside = Path(sys.executable).with_name("vllm")
    executable = str(beside) if beside.exists() else shutil.which("vllm")
    if executable is None:
        raise CalmError(f"vLLM is installed, but its command `vllm` is neither beside {sys.executable} nor on PATH.")
    line = [executable, "serve", model, "--host", host, "--port", str(port), "--served-model-name", name]
    return [*line, "--dtype", dtype, *options], {} if api_key is None else {"VLLM_API_KEY": api_key}


def become(line: Sequence[str], variables: Mapping[str, str]) -> None:
    """Replace this process by vLLM's server, which then gets the signals itself."""
    os.execvpe(line[0], list(line), os.environ | dict(variables))
