"""In bfloat16, vLLM is no further from float32 than transformers is."""

from __future__ import annotations

from pathlib import Path

import engine
import torch
from factories import Mix

import calm


def test_bfloat16_is_as_near_to_float32_as_in_transformers(tmp_path: Path) -> None:
    model = engine.save(Mix("llama", ("gpt2",), 4, anchor_shape=(128, 4, 4), augmenting_shapes=((96, 4, 3),)), tmp_path)
    prompts = engine.prompts()
    exact = [engine.log_probs_of(model, prompt) for prompt in prompts]
    rounded = calm.CalmForCausalLM.from_pretrained(tmp_path / "composed", dtype=torch.bfloat16)
    theirs = [engine.log_probs_of(rounded, prompt) for prompt in prompts]
    with engine.serving(tmp_path / "composed", dtype="bfloat16") as llm:
        outputs = engine.run(llm, prompts, generated=1)
    ours = [engine.found_log_probs(output)[: len(prompt) - 1] for output, prompt in zip(outputs, prompts, strict=True)]
    error = torch.cat([a - b for a, b in zip(ours, exact, strict=True)]).abs().mean()
    reference = torch.cat([a - b for a, b in zip(theirs, exact, strict=True)]).abs().mean()
    assert 0 < error < 1.1 * reference, f"{error:.2e} in vLLM, {reference:.2e} in transformers"
