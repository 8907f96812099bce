"""Texts of the anchor's own: which of them count, and that they are what training files hold."""

from __future__ import annotations

import pytest
import torch
from bases import byte_tokenizer
from transformers import LlamaForCausalLM

from calm.data import load_examples, load_tokenizer
from calm.errors import CalmError
from calm.training import rehearsal


def test_what_is_written_counts_if_there_is_something_to_learn(tiny_bases, monkeypatch):
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_bases["anchor"]), load_tokenizer(tiny_bases["anchor"])
    drawn = ["two words", "one", "", "你好", "x", "!"]
    ids = tokenizer(drawn, padding=True, return_tensors="pt", add_special_tokens=False)["input_ids"]
    rows = torch.cat([torch.full((len(drawn), 1), tokenizer.bos_token_id), ids], dim=1)
    monkeypatch.setattr(model, "generate", lambda *_, **__: rows)
    texts = rehearsal.write(model, tokenizer, 2, 6, seed=0)
    assert texts == ["two words", "你好"], "which has no space, and more letters than one"
    assert len(load_examples([{"text": text} for text in texts], tokenizer, max_length=64)) == 2


def test_a_tokenizer_that_has_nothing_to_begin_with_is_refused(tiny_bases):
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CalmError, match="neither a BOS nor an EOS token"):
        rehearsal.write(LlamaForCausalLM.from_pretrained(tiny_bases["anchor"]), tokenizer, 2, 2, seed=0)
