"""Fixtures that several test folders share, and the settings of Hypothesis."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bases import byte_tokenizer, save_base

os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars take time, and make failures hard to read
from hypothesis import HealthCheck, Phase, settings

# Derandomized: the same examples in every run, so that a failure is there again when one looks for it.
settings.register_profile(
    "calm",
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # the examples are small already, and shrinking takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("calm")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from more threads, and tests run beside one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny anchor and a tiny augmenting model with one tokenizer (bytes, BOS, no chat template)."""
    folder: Path = tmp_path_factory.mktemp("bases")
    tokenizer = byte_tokenizer()
    return {
        "anchor": str(save_base(folder / "anchor", tokenizer, seed=0)),
        "augmenting": str(save_base(folder / "augmenting", tokenizer, seed=1, width=24)),
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB: room for two checkpoints, not for a third one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
