"""vLLM serves a composition with transformers' logits: every family in both roles, batches, chunks, prefix hits."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
import torch
from engine import Expected
from factories import WINDOW, Mix, config, open_gates, word_tokenizer
from transformers import PreTrainedModel

import calm
import calm.serving.vllm.connection
from calm.attention import root_mean_square

TOLERANCE = 1e-3  # of log-probabilities in float32 (issue 5); 1e-5 is usual

# Widths, depths and heads of the two differ; heads of size 32 as kernels have them, and of other sizes. Connections in
# the middle, several at a layer, from one layer; each family once in both roles.
MIXES = {
    "gpt2-llama": Mix("gpt2", ("llama",), 3, "paper", anchor_shape=(96, 3, 4), augmenting_shapes=((64, 4, 2),)),
    "llama-gpt2": Mix("llama", ("gpt2",), 3, "normalized", anchor_shape=(96, 3, 4), augmenting_shapes=((64, 3, 4),)),
    "gemma2-gemma3": Mix("gemma2", ("gemma3_text",), anchor_shape=(64, 4, 2), augmenting_shapes=((96, 6, 3),)),
    "gemma3-gemma2": Mix("gemma3_text", ("gemma2",), anchor_shape=(64, 6, 2), augmenting_shapes=((96, 3, 3),)),
    "qwen2-qwen3": Mix(
        "qwen2", ("qwen3",), attention="paper", anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3),)
    ),
    "qwen3-qwen2": Mix("qwen3", ("qwen2",), num_heads=8, anchor_shape=(64, 4, 4), augmenting_shapes=((32, 5, 1),)),
    "mistral-two": Mix(
        "mistral",
        ("gemma3_text", "llama"),
        (((2, 1), (0, 2)), ((0, 1), (0, 3))),
        anchor_shape=(64, 4, 2),
        augmenting_shapes=((96, 3, 3), (32, 2, 4)),
    ),
    "llama-mistral": Mix("llama", ("mistral",), anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3),)),
    "gemma-olmo": Mix("gemma", ("olmo",), attention="paper", anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3),)),
    "olmo-gemma": Mix(
        "olmo", ("gemma",), attention="normalized", anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3),)
    ),
    "olmo2-olmo3": Mix("olmo2", ("olmo3",), anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3),)),
    "olmo3-olmo2": Mix("olmo3", ("olmo2",), anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3),)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compositions")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[Expected]]:
    """Of all compositions before any is served: vLLM changes the classes of models that it takes from transformers."""
    return {name: _expect(mix, folder / name) for name, mix in MIXES.items()}


def _expect(mix: Mix, folder: Path) -> list[Expected]:
    return engine.expect(engine.eager(engine.save(mix, folder)), engine.prompts())


@pytest.mark.parametrize("name", MIXES)
def test_logits_and_greedy_tokens(name: str, folder: Path, expected: dict[str, list[Expected]]) -> None:
    wanted = expected[name]
    prompts = [one.prompt for one in wanted]
    assert max(map(len, prompts)) > engine.CHUNK, "no prompt is computed in chunks"
    with engine.serving(folder / name / "composed") as llm:
        together = engine.run(llm, prompts)
        again = engine.run(llm, prompts, whole=False)
        alone = engine.run(llm, prompts[-1:], whole=False)
    assert engine.worst(together, wanted) < TOLERANCE
    assert engine.worst(again, wanted) < TOLERANCE
    assert engine.worst(alone, wanted[-1:]) < TOLERANCE
    if not _has_windows(MIXES[name]):
        assert sum(output.num_cached_tokens for output in again) >= 2 * engine.BLOCK, "no prefix was found again"


def _has_windows(mix: Mix) -> bool:
    """Whether layers' caches differ in kind, which makes blocks longer than the prompts above."""
    return any(getattr(config(name), "sliding_window", None) for name in (mix.anchor, *mix.augmenting))


def test_prefix_hits_beside_sliding_windows(tmp_path: Path) -> None:
    mix = MIXES["mistral-two"]
    lengths, shared = (300, 290), 256
    model = engine.eager(engine.save(mix, tmp_path, context=512))
    first, second = engine.prompts(lengths)
    second[:shared] = first[:shared]
    expected = engine.expect(model, [first, second])
    with engine.serving(tmp_path / "composed", max_num_batched_tokens=64) as llm:
        engine.run(llm, [first], whole=False)
        outputs = engine.run(llm, [first, second], whole=False)
    assert all(output.num_cached_tokens > WINDOW for output in outputs), "no prefix was found again"
    assert engine.worst(outputs, expected) < TOLERANCE


def composed_of(
    anchor: PreTrainedModel, small: PreTrainedModel, known: int, folder: Path
) -> tuple[calm.CalmForCausalLM, list[list[int]]]:
    """Two models with one tokenizer composed, and saved as `composed` in a folder; prompts of the tokens of both."""
    words = word_tokenizer(known)
    for name, base in (("anchor", anchor), ("m0", small)):
        base.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    model = calm.compose(str(folder / "anchor"), {"m0": str(folder / "m0")}, 2)
    open_gates(model)
    model.save_pretrained(folder / "composed")
    return model, [[token % known for token in prompt] for prompt in engine.prompts()]


def test_tokens_that_one_model_has_not(tmp_path: Path) -> None:
    """Embeddings padded differently for one tokenizer: the anchor's head would emit what the other cannot read."""
    mix, known = Mix("llama", ("gpt2",)), 60
    anchor, small = mix.anchor_model(), mix.augmenting_models()["m0"]
    small.resize_token_embeddings(known)
    with torch.no_grad():
        anchor.lm_head.weight[known:] *= 10
    model, prompts = composed_of(anchor, small, known, tmp_path)
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    assert max(of_last.argmax() for of_last in logits) >= known, "the case that is tested"
    with engine.serving(tmp_path / "composed") as llm:
        outputs = engine.run(llm, prompts, generated=8, whole=False)
    for output, of_last in zip(outputs, logits, strict=True):
        found = engine.found_log_probs(output)
        assert found[:, known:].isinf().all() and max(output.outputs[0].token_ids) < known
        assert (found[0, :known] - of_last[:known].log_softmax(-1)).abs().max() < TOLERANCE


def test_a_token_that_an_augmenting_model_has_not_ends_nothing(tmp_path: Path) -> None:
    """Ids may be those that the anchor's table holds, here far more than the other's, which vLLM pads to 64 rows."""
    mix, known, many = Mix("llama", ("gpt2",)), 60, 200
    anchor, small = mix.anchor_model(), mix.augmenting_models()["m0"]
    anchor.resize_token_embeddings(many)
    small.resize_token_embeddings(known)
    model, prompts = composed_of(anchor, small, known, tmp_path)
    beyond = [5, many - 1, 7]
    with torch.no_grad():
        wanted = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        wanted.append(model.anchor(torch.tensor([beyond])).logits[0, -1])
    with engine.serving(tmp_path / "composed") as llm:
        engine.run(llm, [beyond], generated=2, whole=False)
        choices = [*(["all"] * len(prompts)), "none"]  # nothing but the anchor reads the last one
        outputs = engine.run(llm, [*prompts, beyond], generated=2, whole=False, augmenting=choices)
    for output, of_last in zip(outputs, wanted, strict=True):
        found = engine.found_log_probs(output)[0, :known]
        assert (found - of_last[:known].log_softmax(-1)).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def plain(folder: Path, expected: dict[str, list[Expected]]) -> Path:
    """The composition whose parts the negative controls leave out."""
    return folder / "llama-mistral" / "composed"


@pytest.mark.parametrize("broken", ["slopes", "norm", "connection", "gate.weight", "gate.bias", "gate", "size"])
def test_the_comparison_sees_what_is_left_out(
    broken: str, plain: Path, expected: dict[str, list[Expected]], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = calm.serving.vllm.connection
    load, opened = connection.Connection.load, connection.Gate.forward
    if broken == "slopes":
        monkeypatch.setattr(connection, "alibi_slopes", lambda heads, device: torch.zeros(heads))
    elif broken == "norm":
        monkeypatch.setattr(connection.F, "rms_norm", lambda states, shape, eps: states)
    elif broken in ("gate.weight", "gate.bias"):
        monkeypatch.setattr(
            connection.Connection,
            "load",
            lambda self, weights: load(self, weights | {broken: torch.zeros_like(weights[broken])}),
        )
    elif broken == "gate":
        monkeypatch.setattr(connection.Gate, "forward", lambda self, states: root_mean_square(states))
    elif broken == "size":
        monkeypatch.setattr(
            connection.Gate, "forward", lambda self, states: opened(self, states) / root_mean_square(states)
        )
    else:
        monkeypatch.setattr(connection.Connection, "forward", lambda self, hidden, context: torch.zeros_like(hidden))
    wanted = expected["llama-mistral"]
    with engine.serving(plain) as llm:
        found = [engine.found_log_probs(output) for output in engine.run(llm, [one.prompt for one in wanted])]
    differences = [
        (log_probs[: len(one.prompt) - 1] - one.log_probs[: len(one.prompt) - 1]).abs().max().item()
        for log_probs, one in zip(found, wanted, strict=True)
    ]
    assert max(differences) > 30 * TOLERANCE
