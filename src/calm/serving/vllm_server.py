"""Hands over to vLLM's own OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

MIDDLEWARE = "calm.serving.vllm.middleware.Augmenting"


def is_installed() -> bool:
    """Whether vLLM is in this environment."""
    return importlib.util.find_spec("vllm") is not None


def command(
    model: str, names: Sequence[str], host: str, port: int, dtype: str, options: Sequence[str], api_key: str | None
) -> tuple[list[str], dict[str, str]]:
    """What to run, and the variables to add to its environment.

    Args:
        model: Folder or hub name of the composition.
        names: What clients call it, that of the whole first, see `calm.serving.names.Names`.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Of the weights.
        options: vLLM's own.
        api_key: Goes into the environment: everyone on the machine can read a command line.

    Returns:
        The command line, and the variables.
    """
    # Not the command `vllm`, which fails in vLLM's builds for CPUs: it asks for the version of a distribution `vllm`.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    line += ["--host", host, "--port", str(port), "--served-model-name", *names]
    line += ["--middleware", MIDDLEWARE, "--dtype", dtype, *options]
    return line, {} if api_key is None else {"VLLM_API_KEY": api_key}


def become(line: Sequence[str], variables: Mapping[str, str]) -> None:
    """Replace this process by vLLM's server, which then gets the signals itself."""
    os.execvpe(line[0], list(line), os.environ | dict(variables))
