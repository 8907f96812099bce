"""Real checkpoints, composed: SmolLM2-135M with a smaller specialist of its tokenizer, Gemma 3 270M with itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from factories import assert_identical, assert_same
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import calm
from calm.experiments.checkpoints import GEMMA3_270M, SMOLLM2_135M

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()
SHARE = 0.12  # of the residual stream's norm, that a perturbed connection injects


@dataclass
class Composed:
    model: calm.CalmForCausalLM
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor  # [1, length] of real text, longer than any sliding window
    last: int  # positions at the end at which logits are compared

    def logits(self) -> Tensor:
        """Of one pass over the whole text, without a cache."""
        with torch.no_grad():
            return self.model(self.ids, use_cache=False, logits_to_keep=self.last).logits


@pytest.fixture(scope="module")
def specialist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's first 8 layers and its head as a checkpoint of its own, with its tokenizer."""
    file = SMOLLM2_135M.fetch()
    whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = whole.config.__class__.from_dict(whole.config.to_dict() | {"num_hidden_layers": 8})
    del config.quantization_config
    small = LlamaForCausalLM(config)
    small.load_state_dict({key: weight for key, weight in whole.state_dict().items() if key in small.state_dict()})
    folder = tmp_path_factory.mktemp("specialist")
    small.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["smollm2+specialist", "gemma3+gemma3"])
def composed(request: pytest.FixtureRequest) -> Iterator[Composed]:
    if request.param == "smollm2+specialist":
        anchor, augmenting = SMOLLM2_135M.fetch(), request.getfixturevalue("specialist")
        connections, length, last = 4, 128, 128
    else:
        anchor = augmenting = GEMMA3_270M.fetch()
        connections, length, last = 3, 560, 48  # its sliding window is 512 tokens; its vocabulary makes logits large
    model = calm.compose(anchor, augmenting, connections, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(anchor.parent, gguf_file=anchor.name)
    yield Composed(model, tokenizer, tokenizer(TEXT, return_tensors="pt").input_ids[:, :length], last)
    del model
    gc.collect()


@pytest.fixture
def perturbed(composed: Composed) -> Iterator[Composed]:
    """Each connection's output matrix random, scaled so that it injects `SHARE` of the norm of what it is added to."""
    generator = torch.Generator().manual_seed(0)
    handles = []

    def scale(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        factor = SHARE * args[0].norm() / output.norm()
        for strength in module.gate.parameters():
            strength.data *= factor
        return output * factor

    for connection in composed.model.connections:
        connection.w_o.weight.data = torch.randn(connection.w_o.weight.shape, generator=generator)
        torch.nn.init.ones_(connection.gate.bias)
        torch.nn.init.normal_(connection.gate.weight, generator=generator)
        handles.append(connection.register_forward_hook(scale))
    composed.logits()
    for handle in handles:
        handle.remove()
    yield composed
    for connection in composed.model.connections:
        torch.nn.init.zeros_(connection.gate.bias)
        torch.nn.init.zeros_(connection.gate.weight)


def test_a_new_composition_is_the_anchor_bit_for_bit(composed: Composed) -> None:
    with torch.no_grad():
        alone = composed.model.anchor(composed.ids, use_cache=False, logits_to_keep=composed.last).logits
    assert_identical(composed.logits(), alone)


@pytest.mark.parametrize("composed", ["smollm2+specialist"], indirect=True)  # Gemma's base does not answer
def test_a_new_composition_knows_what_its_anchor_knows(composed: Composed) -> None:
    prompt = composed.tokenizer("The capital of France is", return_tensors="pt")
    arguments = {**prompt, "max_new_tokens": 8, "do_sample": False}
    generated = composed.model.generate(**arguments)
    with composed.model.composition_disabled():
        assert torch.equal(composed.model.generate(**arguments), generated)
    assert "Paris" in composed.tokenizer.decode(generated[0])


def test_cached_logits_are_the_uncached_ones(perturbed: Composed) -> None:
    """Prefill in two chunks (of Gemma's text the second crosses the window), then one token at a time."""
    uncached, model, length = perturbed.logits(), perturbed.model, perturbed.ids.shape[1]
    with torch.no_grad():
        bare = model.anchor(perturbed.ids, use_cache=False, logits_to_keep=perturbed.last).logits
        one_by_one = length - 16
        chunks = [perturbed.ids[:, : length // 3], perturbed.ids[:, length // 3 : one_by_one]]
        chunks += perturbed.ids[:, one_by_one:].split(1, dim=1)
        cache, logits = None, []
        for chunk in chunks:
            outputs = model(chunk, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits[:, -perturbed.last :])
    assert_same(torch.cat(logits, dim=1)[:, -perturbed.last :], uncached, tolerance=1e-4)
    # what the connections add must be far above what is tolerated, or a wrong one would pass
    assert (uncached - bare).abs().max() > 0.02 * bare.abs().max()


def test_generating_gives_the_uncached_logits(perturbed: Composed) -> None:
    prompt = perturbed.ids[:, -40:]
    outputs = perturbed.model.generate(
        prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    steps = torch.stack(outputs.logits, dim=1)
    with torch.no_grad():
        uncached = perturbed.model(outputs.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    assert_same(steps, uncached[:, : steps.shape[1]], tolerance=1e-4)


def test_saved_and_loaded_by_reference_it_gives_the_same_logits(perturbed: Composed, tmp_path: Path) -> None:
    perturbed.model.save_pretrained(tmp_path)
    parameters = perturbed.model.get_nb_trainable_parameters()[0]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4 * parameters + 16 * 1024
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.anchor_reference["gguf_file"] == perturbed.model.config.anchor_reference["gguf_file"]
    with torch.no_grad():
        logits = loaded(perturbed.ids, use_cache=False, logits_to_keep=perturbed.last).logits
    assert_identical(logits, perturbed.logits())


def test_models_of_different_tokenizers_are_refused_by_name() -> None:
    smollm2, gemma3 = SMOLLM2_135M.fetch(), GEMMA3_270M.fetch()
    with pytest.raises(calm.TokenizerMismatchError) as refused:
        calm.compose(smollm2, gemma3)
    for name in (smollm2.name, gemma3.name, "49152", "262144"):
        assert name in str(refused.value)
