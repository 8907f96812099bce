"""How bases and baselines are made: cut, trained, saved; and what an anchor writes by itself."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from calm import loss
from calm.data import load_tokenizer
from calm.errors import CalmError
from calm.experiments.methods import bases, scoring, training
from calm.experiments.methods.settings import BATCHES, Fit
from calm.training import rehearsal


@pytest.mark.parametrize(("dtype", "close"), [("float32", 0.0), ("bfloat16", 0.02)])
def test_lora_comes_back_as_it_was_trained(anchor, data, tmp_path, dtype, close):
    """But for the rotary frequencies, which `to` rounds to bfloat16 and loading does not."""
    tokenizer = load_tokenizer(str(anchor))
    model = training.with_lora(bases.load(str(anchor)), 1000, seed=0)
    rows = scoring.completion_rows(data.specialist, tokenizer, 64)
    training.fine_tune(model, tokenizer, rows, Fit(4, 8, 3e-2), 0, False, tmp_path / "training")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    again = training.load_lora(bases.load(str(anchor), dtype), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, plain = again(ids).logits, bases.load(str(anchor), dtype)(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=close)
    assert (found - plain).abs().max() > 0.1
    assert {weight.dtype for weight in again.parameters()} == {getattr(torch, dtype)}


def test_steps_of_the_baselines_are_drawn_as_those_of_a_composition(anchor, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(training.SortedSteps, "__iter__", lambda self: drawn.append(self.step_size) or iter(range(20)))
    model, tokenizer = bases.load(str(anchor)), load_tokenizer(str(anchor))
    rows = scoring.text_rows(["1 + 2 = 3"] * 20, tokenizer, 64)
    training.fine_tune(model, tokenizer, rows, Fit(2, 8, 1e-3), 0, False, tmp_path)
    assert drawn == [8]
    with pytest.raises(ValueError, match="rows = 6: expected a multiple of 4"):
        Fit(2, 6, 1e-3)


@pytest.mark.parametrize("trained", ["cut", "lora"])
def test_baselines_compute_in_bfloat16_if_asked_to_the_head_too(anchor, data, trained, tmp_path):
    tokenizer, computed = load_tokenizer(str(anchor)), {}
    model = bases.load(str(anchor))
    plain = model
    if trained == "cut":
        bases.keep_vocabulary(model)
    else:
        model = training.with_lora(model, 1000, seed=0)
    for name in ("lm_head", "model.layers.3.mlp.up_proj"):
        computed[name] = set()
        plain.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: computed[name].add(output.dtype)
        )
    rows = scoring.completion_rows(data.specialist, tokenizer, 64)
    training.fine_tune(model, tokenizer, rows, Fit(1, 8, 1e-3), 0, True, tmp_path)
    assert computed == {name: {torch.bfloat16} for name in computed}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("trained", ["cut", "lora", "everything"])
def test_a_baseline_learns_the_same_without_logits_of_its_prompts(anchor, data, monkeypatch, trained, tmp_path):
    tokenizer = load_tokenizer(str(anchor))
    rows = scoring.completion_rows(data.specialist, tokenizer, 64)
    weights, chunks = [], []
    chunked = loss.loss_without_logits
    monkeypatch.setattr(loss, "loss_without_logits", lambda *args: chunks.append(args) or chunked(*args))
    for skip in (True, False):
        if not skip:
            monkeypatch.setattr(loss, "can_skip_logits", lambda model: False)
        model = bases.load(str(anchor))
        if trained == "cut":
            bases.keep_vocabulary(model)
        elif trained == "lora":
            model = training.with_lora(model, 1000, seed=0)
        training.fine_tune(model, tokenizer, rows, Fit(3, 8, 1e-3), 0, False, tmp_path / str(skip))
        weights.append({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(chunks) == (0 if trained == "everything" else 3 * BATCHES)
    untrained = dict(bases.load(str(anchor)).named_parameters())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)
        assert name not in untrained or (weight - untrained[name]).abs().max() > 1e-4


@pytest.mark.parametrize("trained", ["cut", "lora", "everything"])
def test_an_interrupted_training_goes_on_from_its_last_checkpoint_to_the_same_weights(
    anchor, data, monkeypatch, trained, tmp_path
):
    tokenizer = load_tokenizer(str(anchor))
    rows = scoring.completion_rows(data.specialist, tokenizer, 64)
    steps, computed, weights = 7, [], []
    monkeypatch.setattr(training, "SAVE_STEPS", 4)
    loss_of = training._Trainer.compute_loss

    def count(self, *args, **kwargs):
        if len(computed) == killed_before:
            raise KeyboardInterrupt
        computed.append(self.state.global_step)
        return loss_of(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "compute_loss", count)
    for end, folder in ((None, "whole"), (6 * BATCHES, "cut short"), (None, "cut short")):
        killed_before = end
        computed.clear()
        model = bases.load(str(anchor))
        if trained == "cut":
            bases.keep_vocabulary(model)
        elif trained == "lora":
            model = training.with_lora(model, 1000, seed=0)
        try:
            training.fine_tune(model, tokenizer, rows, Fit(steps, 8, 1e-3), 0, False, tmp_path / folder)
        except KeyboardInterrupt:
            continue
        weights.append(model.state_dict())
    assert computed == [step for step in range(4, steps) for _ in range(BATCHES)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=0, msg=name)


def test_a_model_writes_what_it_finds_likely_and_the_same_under_one_seed(anchor, monkeypatch):
    model, tokenizer = bases.load(str(anchor)), load_tokenizer(str(anchor))
    written = rehearsal.write(model, tokenizer, 20, 8, seed=0)
    assert written == rehearsal.write(model, tokenizer, 20, 8, seed=0) != rehearsal.write(model, tokenizer, 20, 8, 1)
    words = [word for text in written for word in text.split()]
    random.Random(0).shuffle(words)
    shuffled = [" ".join(words[start : start + 8]) for start in range(0, len(words) - 8, 8)]

    def nats(texts: list[str]) -> float:
        rows = scoring.text_rows(texts, tokenizer, 64)
        return scoring.mean_nll(scoring.negative_log_likelihoods(scoring.logits_of(model), rows, tokenizer, 8))

    assert nats(written) < nats(shuffled) - 0.05

    model.generation_config.update(temperature=0.01, repetition_penalty=5.0)  # which some checkpoints come with
    assert rehearsal.write(model, tokenizer, 20, 8, seed=0) == written
    assert model.generation_config.temperature == 0.01

    monkeypatch.setattr(model, "generate", lambda begun, **_: torch.full_like(begun, tokenizer.eos_token_id))
    with pytest.raises(CalmError, match="wrote 0 texts of two words or more where 3"):
        rehearsal.write(model, tokenizer, 3, 8, seed=0)


def test_a_cut_keeps_the_anchors_vocabulary_while_its_layers_learn(finished, anchor):
    whole = bases.load(anchor)
    expected = {"model.embed_tokens.weight": whole.get_input_embeddings(), "lm_head.weight": whole.lm_head}
    layers = {}
    for kind in ("vanilla", "cell/m_A"):
        weights = load_file(finished[0] / "seed-0" / kind / "model.safetensors")
        for name, module in expected.items():
            torch.testing.assert_close(weights[name], module.weight.data, rtol=0, atol=0)
        layers[kind] = weights["model.layers.1.mlp.up_proj.weight"]
    untrained = whole.model.layers[3].mlp.up_proj.weight.data
    assert (layers["vanilla"] - untrained).abs().max() > 1e-4
    assert (layers["cell/m_A"] - layers["vanilla"]).abs().max() > 1e-3


def test_a_cut_model_computes_with_the_layers_it_was_given(anchor):
    model = bases.load(anchor)
    smaller = bases.cut(model, (0, 3))
    ids = torch.tensor([[5, 6, 7]])
    kept = [model.model.layers[0], model.model.layers[3]]
    model.model.layers = torch.nn.ModuleList(kept)
    torch.testing.assert_close(smaller(ids).logits, model(ids, use_cache=False).logits)
    with pytest.raises(CalmError, match=r"expected layers from 0 to 1"):
        bases.cut(smaller, (0, 2))


def test_a_model_with_layers_of_several_kinds_is_not_cut(anchor):
    model = bases.load(anchor)
    model.config.layer_types = ["sliding_attention", "full_attention"] * 2
    with pytest.raises(CalmError, match=r"several kinds \(full_attention, sliding_attention\)"):
        bases.cut(model, (0, 3))
