"""A tiny pair of models, a tiny data set, and one run of every method on them, which the tests look into."""

from __future__ import annotations

import dataclasses
import io
import random

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from calm.experiments.key_value_arithmetic.data import DataSettings, build_tokenizer
from calm.experiments.methods.examples import Data, Example, TaskSet
from calm.experiments.methods.metrics import Bleu, Chrf, FirstWord
from calm.experiments.methods.run import run
from calm.experiments.methods.settings import Fit, Settings
from calm.experiments.results import METHODS

WORDS = ("ba", "be", "bi", "bo", "bu")


@pytest.fixture(scope="session")
def anchor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchor")
    tokenizer = build_tokenizer(DataSettings())
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data():
    rng = random.Random(0)

    def example() -> Example:
        words = rng.choices(WORDS, k=3)
        return Example(" + ".join(words) + " =", "".join(f" {WORDS.index(word) + 1}" for word in words))

    examples = list(dict.fromkeys(example() for _ in range(400)))
    task = TaskSet("Syllables", tuple(examples[:10]), Chrf(), 4, tuple(examples[20:22]), stop=(), others=(Bleu(),))
    return Data(
        general=("1 + 2 = 3", "3 - 1 = 2"),
        specialist=tuple(examples[20:]),
        composition=tuple(examples[20:40]),
        development={"syllables": dataclasses.replace(task, examples=tuple(examples[10:20]))},
        tests={"syllables": task},
        preserved={"Arithmetic": ("4 + 2 = 6", "1 + 1 + 1 = 3")},
        preserved_tests={
            "Sums": TaskSet("Sums", (Example("4 + 2 =", " 6"), Example("1 + 2 =", " 3")), FirstWord(), 2, stop=())
        },
    )


@pytest.fixture(scope="session")
def settings(anchor):
    return Settings(
        anchor=str(anchor),
        augmenting=(0, 3),
        general=Fit(2, 4, 1e-3),
        specialist=Fit(20, 16, 5e-3),
        connections=2,
        num_heads=2,  # the anchor has 4
        steps=4,
        steps_on_all=6,
        rows=4,
        learning_rates={"composition": (1e-3, 5e-3), "lora": (1e-3,), "full": (1e-4,)},
        batch=4,
        dtype="float32",
        methods=tuple(METHODS),
    )


@pytest.fixture(scope="session")
def finished(data, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shown = io.StringIO()
    outcomes = run({"cell": data}, settings, (0,), folder, Console(file=shown, width=200))
    return folder, outcomes["cell"][0], shown.getvalue()
