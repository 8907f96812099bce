"""Training: what is trained, the best model kept, packing, statistics, errors that stop it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bases import byte_tokenizer, save_base, sums, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from runs import DieAt, Killed, MakeRecipe, checkpoints, log_of, losses, weights
from torch.utils.data import RandomSampler
from transformers import BloomConfig, BloomForCausalLM

import calm
from calm.data import CompletionCollator, load_examples, load_tokenizer, pack
from calm.errors import CalmError
from calm.training import Recipe, trainer
from calm.training.loop import SortedSteps


def test_training_lowers_the_loss_and_changes_only_the_connections(make_recipe: MakeRecipe, tiny_bases: dict[str, str]):
    recipe = make_recipe(max_steps=30)
    before = {name: weights(folder) for name, folder in tiny_bases.items()}
    result = trainer.train(recipe)
    out = recipe.training.output_dir
    evaluated = losses(recipe)["eval_loss"]
    assert evaluated[30] < evaluated[2] - 0.1
    assert all(torch.equal(w, before[n][k]) for n, f in tiny_bases.items() for k, w in weights(f).items())
    assert all(key.startswith("connections.") for key in weights(out))
    assert all(w.abs().max() > 0 for w in weights(out).values()), "also the gates, which start at zero"
    assert result.trainable_parameters == sum(w.numel() for w in weights(out).values())
    assert result.eval_loss == min(evaluated.values()) == evaluated[result.best_step]
    assert log_of(recipe)["result"] == {**log_of(recipe)["result"], "steps": 30, "train_examples": 22}
    assert Path(out, "loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(out), load_tokenizer(out)
    assert model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=2).shape[1] > 5


def test_attention_implementation_of_the_bases(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    """The recipe's reaches both bases; one that is not installed is an error before training."""
    original, seen = trainer.CompositionTrainer.training_step, set()

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.add((model.anchor.config._attn_implementation, model.augmenting["augmenting"].config._attn_implementation))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.CompositionTrainer, "training_step", training_step)
    trainer.train(make_recipe(top={"attn_implementation": "eager"}, evaluates=False, max_steps=1))
    assert seen == {("eager", "eager")}
    with pytest.raises(CalmError, match=r"Cannot load .*[Ff]lash"):
        trainer.train(make_recipe("flash", top={"attn_implementation": "flash_attention_2"}))


def test_logged_means_are_the_same_when_logging_is_coarser_than_saving(make_recipe: MakeRecipe, die_at: DieAt):
    settings = {"evaluates": False, "log_steps": 5, "save_steps": 4}
    whole, halves = make_recipe("whole", **settings), make_recipe("halves", **settings)
    trainer.train(whole)
    with die_at(6), pytest.raises(Killed):
        trainer.train(halves)
    trainer.train(halves, resume=True)
    assert losses(halves) == losses(whole)
    assert list(losses(whole)["loss"]) == [4, 5, 8, 10, 12]


def test_gradient_accumulation_is_one_large_batch(make_recipe: MakeRecipe, tmp_path: Path):
    """The mean is over the completion tokens of the whole step, however it is cut into batches."""
    folders = {
        name: str(save_base(tmp_path / name, byte_tokenizer(), seed=seed, attention_dropout=0.0))
        for seed, name in enumerate(("anchor", "augmenting"))
    }
    recipes = [
        make_recipe(
            f"{size}",
            top=folders,
            evaluates=False,
            max_steps=4,
            per_device_batch_size=size,
            gradient_accumulation=4 // size,
        )
        for size in (4, 1)
    ]
    for recipe in recipes:
        trainer.train(recipe)
    large, small = (losses(recipe)["loss"] for recipe in recipes)
    assert large == pytest.approx(small, rel=1e-5)


def test_early_stop_keeps_the_best_model_and_its_patience_survives_a_resume(
    make_recipe: MakeRecipe, tmp_path: Path, die_at: DieAt
):
    """The evaluation loss first falls (answers are digits) and then rises (they are other ones)."""
    rows = {name: [{"prompt": f"{i}+1=", "completion": name} for i in range(20)] for name in "91"}
    data = {
        "train": str(write_jsonl(tmp_path / "9.jsonl", rows["9"])),
        "eval": str(write_jsonl(tmp_path / "1.jsonl", rows["1"][:4])),
    }
    settings = {"top": {"data": data}, "max_steps": 60, "early_stopping_patience": 3, "keep_checkpoints": 1}
    recipe = make_recipe(**settings, save_steps=60)
    result = trainer.train(recipe)
    evaluated = losses(recipe)["eval_loss"]
    best = min(evaluated, key=evaluated.__getitem__)
    assert result.stopped_early
    assert 2 < best == result.best_step == result.steps - 2 * 3
    assert f"checkpoint-{best}" in checkpoints(recipe), "though 60 steps lie between regular checkpoints"

    out = recipe.training.output_dir
    best_weights = weights(Path(out, f"checkpoint-{best}"))
    assert all(torch.equal(w, best_weights[k]) for k, w in weights(out).items())
    assert evaluated[result.steps] > evaluated[best] + 0.01, "the last model is worse, so it can be told apart"
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(out), load_tokenizer(out)
    with torch.no_grad():
        batch = CompletionCollator.for_tokenizer(tokenizer)(load_examples(data["eval"], tokenizer, max_length=64))
        assert model(**batch).loss.item() == pytest.approx(evaluated[best], rel=1e-5)

    halves = make_recipe("halves", **settings, save_steps=2)
    with die_at(result.steps - 1), pytest.raises(Killed):  # after two of three evaluations without improvement
        trainer.train(halves)
    resumed = trainer.train(halves, resume=True)
    assert (resumed.steps, resumed.best_step, resumed.eval_loss) == (result.steps, best, result.eval_loss)
    patient = make_recipe("halves", **settings | {"early_stopping_patience": 5}, save_steps=2)
    assert trainer.train(patient, resume=True).steps == best + 2 * 5, "the recipe's patience, and three waited already"


def test_loss_that_is_not_a_number_stops_the_run(make_recipe: MakeRecipe):
    recipe = make_recipe(learning_rate=1e38, warmup=0, max_grad_norm=1e30)
    with pytest.raises(CalmError, match=r"not a number at step 2 .*norm is nan.*lower training.learning_rate"):
        trainer.train(recipe)
    assert not Path(recipe.training.output_dir, "model.safetensors").exists()


def test_gradient_that_is_not_a_number_stops_before_it_reaches_the_weights(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(CalmError, match="not a number at step 1 "):
        trainer.train(make_recipe())


def test_examples_longer_than_the_smaller_context_are_dropped(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The bases' context is 64 tokens, max_length 1024 by default."""
    rows = [*sums(8), {"prompt": "x" * 70, "completion": "y"}]
    data = {"train": str(write_jsonl(tmp_path / "long.jsonl", rows))}
    result = trainer.train(make_recipe(top={"data": data}, evaluates=False, max_steps=3))
    assert result.train_examples == 8
    assert "dropped 1 of 9 examples, longer than max_length = 64" in caplog.text


def packed_data(tmp_path: Path, **kwargs: Any) -> dict[str, Any]:
    return {"train": str(write_jsonl(tmp_path / "train.jsonl", sums(22))), "packing": True, **kwargs}


def test_packed_and_unpacked_training_are_the_same(make_recipe: MakeRecipe, tmp_path: Path):
    """One step over all examples: the same loss, gradient and weights, whatever rows they lie in."""
    bases = {
        role: str(save_base(tmp_path / role, byte_tokenizer(), seed=seed, attention_dropout=0.0))
        for seed, role in enumerate(("anchor", "augmenting"))
    }
    found = []
    for name, packing in (("packed", True), ("apart", False)):
        recipe = make_recipe(
            name,
            top={"data": packed_data(tmp_path, packing=packing), **bases},
            evaluates=False,
            **{"max_steps": 1, "per_device_batch_size": 22, "gradient_accumulation": 1, "save_steps": 1},
        )
        result = trainer.train(recipe)
        assert result.train_examples == 22
        log = next(log for log in log_of(recipe)["history"] if "loss" in log)
        found.append((log["loss"], log["grad_norm"], weights(recipe.training.output_dir)))
    (loss, norm, trained), (loss_apart, norm_apart, trained_apart) = found
    assert loss == pytest.approx(loss_apart, rel=1e-5) and norm == pytest.approx(norm_apart, rel=1e-4)
    for name in trained:
        torch.testing.assert_close(trained[name], trained_apart[name], rtol=1e-3, atol=1e-4)


def test_packed_rows_hold_every_example_once_and_none_is_cut(tmp_path: Path):
    rows = load_examples(write_jsonl(tmp_path / "x.jsonl", sums(50)), byte_tokenizer(), max_length=64)
    packs = pack(rows, 64)
    assert len(packs) < 25 and all(len(p["input_ids"]) <= 64 for p in packs)
    documents = []
    for packed in packs:
        starts = [*np.flatnonzero(packed["position_ids"] == 0), len(packed["input_ids"])]
        for start, end in itertools.pairwise(starts):
            assert packed["position_ids"][start:end].tolist() == list(range(end - start))
            assert packed["labels"][start] == -100, "an example would be predicted from the one before it"
            documents.append((packed["input_ids"][start:end].tolist(), packed["labels"][start:end].tolist()))
    expected = [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]
    assert sorted(documents) == sorted(expected)


def test_resumed_packed_run_is_the_uninterrupted_one(make_recipe: MakeRecipe, tmp_path: Path, die_at: DieAt):
    settings = {"top": {"data": packed_data(tmp_path)}, "evaluates": False}
    trainer.train(make_recipe("whole", **settings))
    with die_at(7), pytest.raises(Killed):
        trainer.train(make_recipe("killed", **settings))
    trainer.train(make_recipe("killed", **settings), resume=True)
    assert losses(make_recipe("killed", **settings)) == losses(make_recipe("whole", **settings))


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
def test_bases_that_cannot_be_packed_are_refused(make_recipe: MakeRecipe, tmp_path: Path, role: str):
    """BLOOM knows no positions to restart."""
    config = BloomConfig(vocab_size=len(byte_tokenizer()), hidden_size=32, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    recipe = make_recipe(top={"data": packed_data(tmp_path), role: str(tmp_path / "bloom")}, evaluates=False)
    with pytest.raises(CalmError, match=r"packing = True.*'bloom'.*packing: false"):
        trainer.train(recipe)


def test_steps_are_drawn_at_random_and_their_batches_hold_examples_of_about_equal_length():
    lengths = [n % 40 + 3 for n in range(1003)]
    sampler = SortedSteps(lengths, 32, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(1003)) and order == list(sampler)

    def padded(order: Iterable[int]) -> int:
        indices = list(order)
        return sum(8 * max(lengths[i] for i in indices[at : at + 8]) for at in range(0, len(indices), 8))

    assert padded(order) < 1.3 * sum(lengths)
    assert padded(RandomSampler(lengths, generator=torch.Generator().manual_seed(0))) > 1.6 * sum(lengths)
    means = [np.mean([lengths[i] for i in order[at : at + 32]]) for at in range(0, 992, 32)]
    assert np.std(means) < 1.5 * np.std(lengths) / 32**0.5  # were they equally long: np.std(lengths)
    sampler.set_epoch(1)
    assert list(sampler) != order


@given(st.lists(st.integers(2, 50), min_size=1, max_size=100), st.integers(1, 40))
def test_every_example_comes_once_an_epoch_and_a_longest_one_first(lengths: list[int], step_size: int):
    order = list(SortedSteps(lengths, step_size, seed=0))
    assert sorted(order) == list(range(len(lengths)))
    assert lengths[order[0]] == max(lengths)


def test_statistics_say_which_connections_are_used(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    """All add nothing at first; one whose gradients are taken away never does."""
    original = trainer.CompositionTrainer.training_step
    gates: dict[int, float] = {}
    states: list[torch.Tensor] = []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        first, second = model.connections
        handle = first.register_forward_hook(lambda module, args, output: states.append(args[0].detach().double()))
        ends = [int(row.nonzero()[-1]) + 1 for row in inputs["labels"] != -100]  # what follows is padding
        loss = original(self, model, inputs, *args, **kwargs)
        handle.remove()
        for weight in second.parameters():
            weight.grad = None
        normed = torch.nn.functional.rms_norm(states[-1], states[-1].shape[-1:])
        opened = first.gate.bias * states[-1].shape[-1] / 8 + normed @ first.gate.weight[0].double()
        real = torch.cat([row[:end] for row, end in zip(opened, ends, strict=True)])
        gates[self.state.global_step + 1] = real.mean().item()
        return loss

    monkeypatch.setattr(trainer.CompositionTrainer, "training_step", training_step)
    recipe = make_recipe()
    trainer.train(recipe)
    logs = [log for log in log_of(recipe)["history"] if "loss" in log]
    assert len(logs) == 12
    assert logs[0]["connection_0/injection"] == logs[-1]["connection_1/injection"] == 0
    assert logs[-1]["connection_0/injection"] > 0.01
    assert [log["connection_0/gate"] for log in logs] == pytest.approx([gates[log["step"]] for log in logs])
    assert abs(logs[-1]["connection_0/gate"]) > 0.01 and logs[-1]["connection_1/gate"] == 0
    assert logs[-1]["connection_0/gradient"] > 0 and logs[-1]["connection_1/gradient"] == 0
    assert all(0 < log[f"connection_{i}/entropy"] < np.log(64) for log in logs for i in (0, 1))
    assert (Path(recipe.training.output_dir) / "connections.png").stat().st_size > 1000


def test_a_logger_that_is_not_there_is_refused_at_once(make_recipe: MakeRecipe):
    with pytest.raises(CalmError, match=r"training.report_to = 'nonsense': not installed"):
        trainer.train(make_recipe(report_to=["nonsense"]))


def test_activation_checkpointing_trains_the_same(make_recipe: MakeRecipe, whole: Recipe):
    recipe = make_recipe(activation_checkpointing=True)
    trainer.train(recipe)
    for key, expected in losses(whole).items():
        assert losses(recipe)[key] == pytest.approx(expected, rel=1e-4), key


def test_activation_checkpointing_that_transformers_gets_wrong_is_refused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    """Before its TrainingArguments are made, which do not know the word either."""

    def of_that_version(**kwargs: Any) -> None:
        raise TypeError(f"unexpected keyword arguments {list(kwargs)}")

    monkeypatch.setattr(transformers, "__version__", "5.22.1")
    monkeypatch.setattr(trainer, "TrainingArguments", of_that_version)
    with pytest.raises(CalmError, match=r"Activation checkpointing.* needs transformers 5.23 or later, found 5.22.1"):
        trainer.train(make_recipe(activation_checkpointing=True))


@pytest.mark.parametrize("settings", [{"top": {"dtype": "bfloat16"}}, {"bf16": True}])
def test_bfloat16(make_recipe: MakeRecipe, settings: dict[str, Any]):
    recipe = make_recipe(max_steps=20, eval_steps=10, save_steps=20, **settings)
    trainer.train(recipe)
    evaluated = losses(recipe)["eval_loss"]
    assert evaluated[20] < evaluated[10] - 0.02
    # the frozen models may be in bfloat16; what is trained and saved never is
    assert {w.dtype for w in weights(recipe.training.output_dir).values()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_bases(make_recipe: MakeRecipe, die_at: DieAt, quantization: str):
    """The loss falls also after evaluations, a resumed run is the same, and what was trained is found again."""
    settings = {"top": {"quantization": quantization}, "max_steps": 20, "eval_steps": 4}
    whole, halves = make_recipe("whole", **settings), make_recipe("halves", **settings)
    trainer.train(whole)
    evaluated = losses(whole)["eval_loss"]
    assert evaluated[20] < evaluated[8] < evaluated[4]
    with die_at(6), pytest.raises(Killed):
        trainer.train(halves)
    trainer.train(halves, resume=True)
    assert losses(halves) == losses(whole)
    assert {w.dtype for w in weights(whole.training.output_dir).values()} == {torch.float32}
    model = calm.CalmForCausalLM.from_pretrained(whole.training.output_dir, dtype="auto")
    names = {type(weight).__name__ for weight in (*model.anchor.parameters(), *model.augmenting.parameters())}
    assert names == {"Parameter", {"int8": "Int8Tensor", "nf4": "Params4bit"}[quantization]}
    with pytest.raises(CalmError, match=r"trained with another quantization \(quantization: '\w+' -> None\)"):
        trainer.train(make_recipe("whole", max_steps=30), resume=True)


def test_a_missing_quantization_library_is_named_at_once(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("calm.training.quantization.is_torchao_available", lambda: False)
    with pytest.raises(CalmError, match=r"quantization = 'int8' needs torchao.*pip install 'calm-lm\[quantization\]'"):
        trainer.train(make_recipe(top={"quantization": "int8"}))
