"""Steps of an experiment, each kept on disk once it is done, so that an interrupted run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers


def fingerprint(*parts: Any) -> str:
    """Tell whether two results come from the same settings, seeds and library versions.

    Args:
        parts: dataclasses, strings, numbers, and lists, tuples and dicts of them.
    """
    versions = [torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([parts, versions], sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def once(path: Path, settings: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` gave when it last ran with these settings; run it if it never did.

    Args:
        path: the JSON file that keeps the result, together with the fingerprint of the settings.
        settings: everything that the result depends on, as for `fingerprint`.
        compute: gives plain JSON values. What it leaves in files beside `path` is there before the result is.
    """
    expected = fingerprint(settings)
    kept = read_json(path, {})
    if kept.get("fingerprint") == expected:
        return kept["result"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # what it stands for is about to be overwritten
    result = json.loads(json.dumps(compute()))  # the same types whether kept or new
    write_json(path, {"fingerprint": expected, "result": result})
    return result


def read_json(path: Path, default: Any) -> Any:
    """What `write_json` wrote, or `default` if there is no such file, or if it is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def write_json(path: Path, content: object) -> None:
    """Write a file that is either whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} cannot be told from another by a fingerprint")
