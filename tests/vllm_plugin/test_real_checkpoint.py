"""SmolLM2-135M with its own first layers as the augmenting model, served with transformers' logits."""

from __future__ import annotations

import sys
from pathlib import Path

import engine
import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from serving_models import TEXT, smollm2_composition

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_logits_and_greedy_tokens(tmp_path: Path) -> None:
    model = smollm2_composition(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path / "anchor")(TEXT).input_ids
    prompts = [ids[start : start + length] for start, length in ((0, 5), (50, 40), (300, 100), (600, 64))]
    expected = engine.expect(model, prompts, 32)
    with engine.serving(tmp_path / "composed", max_model_len=256, max_num_batched_tokens=64) as llm:
        outputs = engine.run(llm, prompts, 32)
    assert engine.worst(outputs, expected) < 1e-3
    with model.composition_disabled():
        alone = [engine.log_probs_of(model, prompt) for prompt in prompts]
    differences = [
        (one.log_probs[: len(bare)] - bare).abs().max().item() for one, bare in zip(expected, alone, strict=True)
    ]
    assert max(differences) > 0.1, "the connections add too little for the comparison to mean anything"
