"""A small composition with a chat template, and a server of it that tests share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from bases import byte_tokenizer, save_base
from factories import perturb
from servers import NAME, Served, serving
from transformers import PreTrainedTokenizerBase

import calm
from calm.data import load_tokenizer
from calm.serving.limits import Limits

CONTEXT = 128


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composition with two augmenting models whose connections matter, and a chat template."""
    folder = tmp_path_factory.mktemp("served") / NAME
    tokenizer = byte_tokenizer(chat=True)
    bases = {
        part: save_base(
            folder.parent / part, tokenizer, seed=seed, width=width, layers=2, max_position_embeddings=CONTEXT
        )
        for seed, (part, width) in enumerate({"trunk": 32, "one": 24, "two": 16}.items())
    }
    model = calm.compose(bases["trunk"], {"one": bases["one"], "two": bases["two"]}, 2)
    perturb(model, share=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(composed: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    loaded = load_tokenizer(composed)
    loaded.padding_side = "left"
    return loaded


@pytest.fixture(scope="session")
def model(composed: Path) -> calm.CalmForCausalLM:
    """The composition, to compare with; the servers have their own."""
    return calm.CalmForCausalLM.from_pretrained(composed)


@pytest.fixture(scope="session")
def served(composed: Path) -> Iterator[Served]:
    """A server with the usual limits."""
    with serving(composed, limits=Limits(max_tokens=100)) as running:
        yield running


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
