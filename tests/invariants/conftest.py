"""Saved compositions as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved import Saved


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Shared by tests that change nothing on disk."""
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)
