"""Two processes that share each layer (tensor parallelism), and torch.compile, give the same logits; switches too."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
from factories import Mix

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MIX = Mix("gemma3_text", ("llama", "gpt2"), anchor_shape=(64, 6, 2), augmenting_shapes=((96, 3, 4), (32, 2, 2)))
SETTINGS = [["m0"], [], ["m1"], ["m0", "m1"]]  # of the augmenting models that are on, one for each prompt


@pytest.mark.parametrize(
    "arguments",
    [{"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, {"enforce_eager": False}],
    ids=["two processes", "compiled"],
)
def test_the_same_logits(arguments: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tensor_parallel_size" in arguments:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = engine.eager(engine.save(MIX, tmp_path))
    expected = engine.expect(model, engine.prompts())
    others = engine.expect_each(model, engine.prompts(), SETTINGS)
    with engine.serving(tmp_path / "composed", **arguments) as llm:
        outputs = engine.run(llm, [one.prompt for one in expected])
        switched = engine.run(llm, [one.prompt for one in expected], augmenting=SETTINGS)
        again = engine.run(llm, [one.prompt for one in expected], whole=False, augmenting=SETTINGS)
    assert engine.worst(outputs, expected) < 1e-3
    assert engine.worst(switched, others) < 1e-3
    assert engine.worst(again, others) < 1e-3
