"""Hands over to vLLM's own OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from calm.serving.limits import Limits

MIDDLEWARE = (
    "calm.serving.vllm.middleware.Augmenting",
    "calm.serving.vllm.limiting.Limiting",
    "calm.serving.vllm.ending.Ending",
    "calm.serving.vllm.guarding.Guarding",
)
"""From the innermost to the outermost."""

ADDRESS = ("--host", "--port", "--uds")

LIMITS = "CALM_LIMITS"
"""The variable that holds the limits, as JSON, for what runs in vLLM's processes."""


def is_installed() -> bool:
    """Whether vLLM is in this environment."""
    return importlib.util.find_spec("vllm") is not None


def sets_address(option: str) -> bool:
    """Whether one of vLLM's options says where its server listens, also shortened, as its parser takes it."""
    name = option.partition("=")[0]
    return len(name) > len("--") and any(one.startswith(name) for one in ADDRESS)


def as_composed(dtype: str, recorded: str | None) -> str:
    """The dtype to serve in: on CPUs with `"auto"` float32 where a composition was made in it, as on transformers.

    VLLM's own `auto` would round to bfloat16. On accelerators it may: FLASH_ATTN has no float32.

    Args:
        dtype: What the user asked for.
        recorded: In which the anchor was composed, if that is known.
    """
    return recorded if dtype == "auto" and recorded == "float32" and not torch.accelerator.is_available() else dtype


def command(
    model: str,
    names: Sequence[str],
    host: str,
    port: int,
    dtype: str,
    options: Sequence[str],
    api_key: str | None,
    limits: Limits,
    batch_size: int | None = None,
) -> tuple[list[str], dict[str, str]]:
    """What to run, and the variables to add to its environment.

    Args:
        model: Folder or hub name of the composition.
        names: What clients call it, that of the whole first, see `calm.serving.names.Names`.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Of the weights.
        options: vLLM's own, none that `sets_address`; the last word where they say something of what is set here.
        api_key: Goes into the environment: everyone on the machine can read a command line.
        limits: Of requests.
        batch_size: Rows generated together; by default as many as vLLM takes.

    Returns:
        The command line, and the variables.
    """
    # Not the command `vllm`, which fails in vLLM's builds for CPUs: it asks for the version of a distribution `vllm`.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    line += ["--host", host, "--port", str(port), "--served-model-name", *names]
    for middleware in MIDDLEWARE:
        line += ["--middleware", middleware]
    line += ["--dtype", dtype, "--shutdown-timeout", str(math.ceil(limits.seconds))]
    if batch_size is not None:
        line += ["--max-num-seqs", str(batch_size)]
    variables = {LIMITS: json.dumps(asdict(limits))}
    return [*line, *options], variables if api_key is None else variables | {"VLLM_API_KEY": api_key}


def become(line: Sequence[str], variables: Mapping[str, str]) -> None:
    """Replace this process by vLLM's server, which then gets the signals itself."""
    os.execvpe(line[0], list(line), os.environ | dict(variables))
