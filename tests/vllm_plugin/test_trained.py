"""Compositions that were trained: the demo's pair of models after a few steps, and the demo's own where it was made."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
import torch
from factories import Mix, injection_shares, tokens

import calm

DEMO = Path(__file__).parents[2] / "runs" / "demo" / "composed"


def test_the_demos_pair_after_some_steps(tmp_path: Path) -> None:
    # the demo's shapes: heads of 24 and 16, which no CPU kernel has
    mix = Mix("llama", ("gpt2",), 3, anchor_shape=(96, 3, 4), augmenting_shapes=((64, 3, 4),))
    for name, base in {"anchor": mix.anchor_model(), **mix.augmenting_models()}.items():
        base.save_pretrained(tmp_path / name)
    model = calm.compose(str(tmp_path / "anchor"), str(tmp_path / "m0"), 3)
    optimizer = torch.optim.AdamW(model.connections.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        ids = tokens(8, 16, seed=step)
        ids[:, 8:] = ids[:, :8]  # to be copied
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and min(injection_shares(model)) > 0.01
    model.save_pretrained(tmp_path / "composed")
    expected = engine.expect(model, engine.prompts())
    with engine.serving(tmp_path / "composed") as llm:
        outputs = engine.run(llm, [one.prompt for one in expected])
    assert engine.worst(outputs, expected) < 1e-3


@pytest.mark.skipif(not DEMO.is_dir(), reason="calm demo was not run here")
def test_the_demo() -> None:
    model = calm.CalmForCausalLM.from_pretrained(DEMO)
    expected = engine.expect(model, engine.prompts())
    with engine.serving(DEMO) as llm:
        outputs = engine.run(llm, [one.prompt for one in expected])
    assert engine.worst(outputs, expected) < 1e-3
