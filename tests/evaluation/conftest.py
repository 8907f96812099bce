"""A composition whose connections say something, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import byte_tokenizer
from factories import open_gates

import calm

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="session")
def composed_folder(tmp_path_factory: pytest.TempPathFactory, tiny_bases: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "composed"
    torch.manual_seed(0)
    model = calm.compose(tiny_bases["anchor"], tiny_bases["augmenting"], connections=[(0, 0), (1, 1)])
    for connection in model.connections:
        torch.nn.init.normal_(connection.w_o.weight)
    open_gates(model).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
