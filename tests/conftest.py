"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import byte_tokenizer, save_base


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny anchor and a tiny augmenting model with one tokenizer (bytes, BOS, no chat template)."""
    folder: Path = tmp_path_factory.mktemp("bases")
    tokenizer = byte_tokenizer()
    return {
        "anchor": str(save_base(folder / "anchor", tokenizer, seed=0)),
        "augmenting": str(save_base(folder / "augmenting", tokenizer, seed=1, width=24)),
    }
