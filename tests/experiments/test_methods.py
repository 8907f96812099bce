"""The engine of the experiments: every method on tiny models and a tiny data set, from training to intervals."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import random
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import calm
from calm import loss
from calm.data import load_tokenizer
from calm.errors import CalmError, DivergedError
from calm.experiments.key_value_arithmetic.data import DataSettings, build_tokenizer
from calm.experiments.methods import bases, mixing, rehearsal, scoring, table, training
from calm.experiments.methods.examples import Data, Example, TaskSet
from calm.experiments.methods.metrics import Bleu, Chrf, FirstWord, Perplexity
from calm.experiments.methods.run import _beyond, run, seconds_of
from calm.experiments.methods.settings import BATCHES, Fit, Settings
from calm.experiments.results import METHODS, Results, made_here

WORDS = ("ba", "be", "bi", "bo", "bu")


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def finished(data, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shown = io.StringIO()
    outcomes = run(data, settings, 0, folder / "seed-0/cell", folder / "seed-0/shared", Console(file=shown, width=200))
    return folder, outcomes, shown.getvalue()


def test_methods_are_trained_as_long_as_one_another_but_for_the_upper_reference_and_answer_all(
    finished, data, settings
):
    _, outcomes, _ = finished
    assert list(outcomes) == list(METHODS)
    for method, outcome in outcomes.items():
        assert len(outcome["answers"]["syllables"]) == 10, method
        assert len(outcome["nll"]["Arithmetic"]) == len(outcome["answers"]["Sums"]) == 2, method
    trained = {method: o["training"] for method, o in outcomes.items() if o["training"].get("steps")}
    assert len(trained) == 7
    steps = {method: training["steps"] for method, training in trained.items()}
    assert steps == {**dict.fromkeys(steps, settings.steps), "full_on_all": settings.steps_on_all}
    sizes = {method: trained[method]["trainable_parameters"] for method in ("composed", "random_m_A", "lora")}
    assert sizes["composed"] == sizes["random_m_A"]
    assert abs(sizes["lora"] - sizes["composed"]) < 0.1 * sizes["composed"]
    searched = outcomes["composed"]["training"]["searched"]
    assert searched.keys() > {"0.001", "0.005"}  # one of two is an end
    rate = f"{outcomes['composed']['training']['learning_rate']:g}"
    assert searched[rate] == min(searched.values())
    composed = finished[0] / "seed-0/cell/composed"
    assert {path.stem for path in composed.glob("*.json")} == set(searched)
    assert [path.name for path in composed.iterdir() if path.is_dir()] == [rate]  # the others are lighter for it
    assert calm.CalmConfig.from_pretrained(composed / rate).num_heads == settings.num_heads
    assert outcomes["lora"]["training"]["searched"] == {}  # there was one to choose from


def test_a_finished_run_is_its_json_files_and_is_done_elsewhere_without_models(
    finished, data, settings, monkeypatch, tmp_path
):
    folder, outcomes, _ = finished
    for path in folder.rglob("*.json"):
        if "fingerprint" in json.loads(path.read_text()):  # of a step, not of a model
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(folder))
    for name in ("fine_tune", "train_composition"):
        monkeypatch.setattr(training, name, interrupted)
    monkeypatch.setattr(bases, "load", interrupted)
    cell, shared = tmp_path / "seed-0/cell", tmp_path / "seed-0/shared"
    assert json.loads(json.dumps(run(data, settings, 0, cell, shared, Console(file=io.StringIO())))) == outcomes


def test_a_finished_run_is_not_run_again_and_an_interrupted_one_goes_on(
    finished, data, settings, monkeypatch, tmp_path
):
    folder, outcomes, _ = finished
    shown = io.StringIO()
    again = run(data, settings, 0, folder / "seed-0/cell", folder / "seed-0/shared", Console(file=shown, width=200))
    assert json.loads(json.dumps(again)) == outcomes
    assert shown.getvalue() == ""
    assert seconds_of(folder, [0]) > 0 and seconds_of(folder, [1]) == 0

    (folder / "seed-0/cell/lora.json").unlink()  # as if it had been interrupted there
    redone = run(data, settings, 0, folder / "seed-0/cell", folder / "seed-0/shared", Console(file=shown, width=200))
    assert "lora" in shown.getvalue() and "composed" not in shown.getvalue()
    assert redone["lora"]["answers"] == outcomes["lora"]["answers"]
    assert redone["lora"]["nll"] == outcomes["lora"]["nll"]

    searched = outcomes["composed"]["training"]["searched"]
    other = next(float(rate) for rate in searched if float(rate) != outcomes["composed"]["training"]["learning_rate"])
    alone = dataclasses.replace(settings, methods=("composed",))  # asks for a model that the search has removed
    shutil.copytree(folder, tmp_path / "copy")
    cell, shared = tmp_path / "copy/seed-0/cell", tmp_path / "copy/seed-0/shared"

    def with_another() -> dict:
        return run(data, alone, 0, cell, shared, Console(file=shown, width=200), {"composed": other})["composed"]

    rate = f"{outcomes['composed']['training']['learning_rate']:g}"
    for step in ("composed", f"composed/{rate}"):  # trained to its end, but not measured
        (cell / f"{step}.json").unlink()
    redone = run(data, alone, 0, cell, shared, Console(file=shown, width=200))
    assert redone["composed"]["nll"] == outcomes["composed"]["nll"]

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_composition", interrupted)
        with pytest.raises(KeyboardInterrupt):
            with_another()
    found = with_another()
    assert found["training"]["learning_rate"] == other and found["nll"] != outcomes["composed"]["nll"]


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_rate_that_diverges_is_not_taken_and_ends_no_search(finished, data, settings, monkeypatch, tmp_path):
    shutil.copytree(finished[0] / "seed-0", tmp_path / "seed-0")
    cell, shared = tmp_path / "seed-0/cell", tmp_path / "seed-0/shared"
    trained, highest = training.train_composition, max(settings.learning_rates["composition"])
    limits = [highest]

    def diverging(*arguments, **options):
        if next(one for one in arguments if isinstance(one, Fit)).learning_rate >= limits[-1]:
            raise DivergedError("not a number")
        return trained(*arguments, **options)

    def search() -> dict:
        shutil.rmtree(cell / "composed")
        return run(data, alone, 0, cell, shared, Console(file=io.StringIO()))["composed"]["training"]

    monkeypatch.setattr(training, "train_composition", diverging)
    alone = dataclasses.replace(settings, methods=("composed",), steps=3)
    found = search()
    assert found["learning_rate"] < highest and f"{highest:g}" not in found["searched"]
    limits.append(0.0)
    with pytest.raises(CalmError, match=r"composed diverged with seed 0 at every learning rate that was tried, "):
        search()


def test_a_seed_that_diverges_at_another_ones_rate_searches_for_its_own(
    finished, data, settings, monkeypatch, tmp_path
):
    """The others of a run are not lost for it."""
    shutil.copytree(finished[0] / "seed-0", tmp_path / "seed-0")
    trained, given = training.train_composition, 0.5

    def diverging(*arguments, **options):
        if next(one for one in arguments if isinstance(one, Fit)).learning_rate == given:
            raise DivergedError("not a number")
        return trained(*arguments, **options)

    monkeypatch.setattr(training, "train_composition", diverging)
    alone = dataclasses.replace(settings, methods=("composed",), steps=3)
    told = io.StringIO()
    cell, shared = tmp_path / "seed-0/cell", tmp_path / "seed-0/shared"
    outcome = run(data, alone, 0, cell, shared, Console(file=told, width=200), {"composed": given})["composed"]
    assert f"{outcome['training']['learning_rate']:g}" in outcome["training"]["searched"]
    assert "composed searches for a learning rate of its own with seed 0" in told.getvalue()


@pytest.mark.parametrize(("dtype", "close"), [("float32", 0.0), ("bfloat16", 0.02)])
def test_lora_comes_back_as_it_was_trained(anchor, data, tmp_path, dtype, close):
    """But for the rotary frequencies, which `to` rounds to bfloat16 and loading does not."""
    tokenizer = load_tokenizer(str(anchor))
    model = training.with_lora(bases.load(str(anchor)), 1000, seed=0)
    rows = scoring.completion_rows(data.specialist, tokenizer, 64)
    training.fine_tune(model, tokenizer, rows, Fit(4, 8, 3e-2), 0, False)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    again = training.load_lora(bases.load(str(anchor), dtype), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, plain = again(ids).logits, bases.load(str(anchor), dtype)(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=close)
    assert (found - plain).abs().max() > 0.1
    assert {weight.dtype for weight in again.parameters()} == {getattr(torch, dtype)}


def test_seconds_of_one_data_set_are_its_own_and_those_of_the_shared_vanilla_m_a(finished, tmp_path):
    shutil.copytree(finished[0] / "seed-0/cell", tmp_path / "seed-0/cy")
    shutil.copytree(finished[0] / "seed-0/cell", tmp_path / "seed-0/xh")
    shutil.copytree(finished[0] / "seed-0/shared/vanilla", tmp_path / "seed-0/vanilla")
    shared, with_cy = seconds_of(tmp_path, [0], ["none"]), seconds_of(tmp_path, [0], ["cy"])
    assert 0 < shared < with_cy
    assert seconds_of(tmp_path, [0]) == pytest.approx(2 * with_cy - shared)
    assert seconds_of(tmp_path, [0], ["cy", "xh"]) == pytest.approx(seconds_of(tmp_path, [0]))


def test_the_anchors_own_texts_are_a_fifth_of_what_a_method_is_trained_on(finished, data, settings, anchor):
    folder = finished[0] / "seed-0/cell"
    texts = json.loads((folder / "rehearsal.json").read_text())["result"]["texts"]
    assert len(texts) == 5 and len(data.composition) == 20
    assert all(len(text.split()) > 1 for text in texts)
    (trained,) = (folder / "composed").glob("*/train.jsonl")  # the models of the other rates are gone
    rows = [json.loads(line) for line in trained.read_text().splitlines()]
    assert [row["text"] for row in rows if "text" in row] == texts
    assert [Example(**row) for row in rows if "prompt" in row] == list(data.composition)
    assert [dataclasses.replace(settings, rehearsal=share).rehearsed(20) for share in (0.0, 0.2, 0.5)] == [0, 5, 20]


@given(
    examples=st.integers(1, 3000),
    steps=st.integers(1, 200),
    rows=st.sampled_from([4, 16, 32]),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.5]),
)
def test_no_text_of_the_anchors_comes_twice_in_a_training_and_their_share_stays(examples, steps, rows, share):
    settings = Settings("m_B", "m_A", None, "m_A", 1, steps=steps, steps_on_all=1, rows=rows, rehearsal=share)
    copies, texts = settings.copies(examples), settings.rehearsed(examples)
    assert texts == round(copies * examples * share / (1 - share))
    if not share:
        assert copies == 1
        return
    assert copies * examples + texts >= steps * rows, "none of them comes again before each has come"
    assert copies == 1 or (copies - 1) * examples < steps * rows * (1 - share)  # and not more of them than that


@pytest.mark.parametrize("method", ["composed", "lora"])
def test_a_small_dc_comes_as_often_as_keeps_the_share_of_the_anchors_texts(
    finished, data, settings, monkeypatch, tmp_path, method
):
    shutil.copytree(finished[0] / "seed-0", tmp_path / "seed-0")
    longer = dataclasses.replace(settings, methods=(method,), steps=-(-50 // settings.rows))  # 20 examples, twice over
    learned = []

    def look(model, tokenizer, rows, *_):
        learned.extend(tokenizer.decode(row["input_ids"]) for row in rows)
        raise InterruptedError

    def look_at_file(anchor, augmenting, examples, texts, *_, **__):
        learned.extend([*(example.prompt + example.completion for example in examples), *texts])
        raise InterruptedError

    monkeypatch.setattr(training, "fine_tune", look)
    monkeypatch.setattr(training, "train_composition", look_at_file)
    with pytest.raises(InterruptedError):
        cell, shared = tmp_path / "seed-0/cell", tmp_path / "seed-0/shared"
        run(data, longer, 0, cell, shared, Console(file=io.StringIO()), {method: 1e-4})
    assert len(learned) == 3 * 20 + 15
    assert all(count % 3 == 0 for _, count in collections.Counter(learned).most_common(18))


@pytest.mark.parametrize("method", ["lora", "full_on_DC", "full_on_all"])
def test_every_method_that_is_trained_on_dc_has_them(finished, data, settings, monkeypatch, tmp_path, method):
    """All but the compositions, whose file of examples is read above."""
    shutil.copytree(finished[0] / "seed-0", tmp_path / "seed-0")
    examples = len(data.specialist if method == "full_on_all" else data.composition)  # which it is a part of
    learned = []
    monkeypatch.setattr(training, "fine_tune", lambda model, tokenizer, rows, *_: learned.append(rows) or 0)
    for rehearsal_share, texts in ((0.2, 5), (0.0, 0)):
        shutil.rmtree(tmp_path / f"seed-0/cell/{method}", ignore_errors=True)
        alone = dataclasses.replace(settings, methods=(method,), rehearsal=rehearsal_share)
        cell, shared = tmp_path / "seed-0/cell", tmp_path / "seed-0/shared"
        run(data, alone, 0, cell, shared, Console(file=io.StringIO()), {method: 1e-4})
        rows = learned.pop()
        assert not learned
        assert sum((row["labels"][1:] != -100).all() for row in rows) == texts
        assert len(rows) == texts + examples


def test_steps_of_the_baselines_are_drawn_as_those_of_a_composition(anchor, monkeypatch):
    drawn = []
    monkeypatch.setattr(training.SortedSteps, "__iter__", lambda self: drawn.append(self.step_size) or iter(range(20)))
    model, tokenizer = bases.load(str(anchor)), load_tokenizer(str(anchor))
    training.fine_tune(
        model, tokenizer, scoring.text_rows(["1 + 2 = 3"] * 20, tokenizer, 64), Fit(2, 8, 1e-3), 0, False
    )
    assert drawn == [8]
    with pytest.raises(ValueError, match="rows = 6: expected a multiple of 4"):
        Fit(2, 6, 1e-3)


@pytest.mark.parametrize("trained", ["cut", "lora"])
def test_baselines_compute_in_bfloat16_if_asked_to_the_head_too(anchor, data, trained):
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
    training.fine_tune(model, tokenizer, rows, Fit(1, 8, 1e-3), 0, True)
    assert computed == {name: {torch.bfloat16} for name in computed}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("trained", ["cut", "lora", "everything"])
def test_a_baseline_learns_the_same_without_logits_of_its_prompts(anchor, data, monkeypatch, trained):
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
        training.fine_tune(model, tokenizer, rows, Fit(3, 8, 1e-3), 0, False)
        weights.append({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(chunks) == (0 if trained == "everything" else 3 * BATCHES)
    untrained = dict(bases.load(str(anchor)).named_parameters())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)
        assert name not in untrained or (weight - untrained[name]).abs().max() > 1e-4


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


def test_what_was_made_with_other_settings_or_data_is_made_anew(finished, data, settings, tmp_path):
    shutil.copytree(finished[0] / "seed-0", tmp_path / "seed-0")

    def redone(data, settings, rates=None) -> str:
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        run(data, settings, 0, tmp_path / "seed-0/cell", tmp_path / "seed-0/shared", console, rates)
        return shown.getvalue()

    both = dataclasses.replace(settings, methods=("full_on_DC", "full_on_all"))
    assert redone(data, both) == ""
    on_all = redone(data, dataclasses.replace(both, steps_on_all=7))
    assert "full_on_all.json" in on_all and "full_on_DC" not in on_all
    on_dc = redone(data, dataclasses.replace(both, steps=5, steps_on_all=7))
    assert "full_on_DC.json" in on_dc and "full_on_all" not in on_dc

    few = dataclasses.replace(settings, methods=("m_B", "mixed_logits"))
    assert redone(data, few) == ""
    assert "mixed_logits" in redone(data, few, {"mixed_logits": 0.1})
    developed = data.development["syllables"]
    for other in (
        dataclasses.replace(developed, examples=developed.examples[:5]),
        dataclasses.replace(developed, few_shot=()),
        dataclasses.replace(developed, metric=Bleu()),
    ):
        assert "mixed_logits" in redone(dataclasses.replace(data, development={"syllables": other}), few)
    sums = data.preserved_tests["Sums"]
    alone = dataclasses.replace(settings, methods=("m_B",))
    titled = {"Sums": dataclasses.replace(sums, title="Other", metric=Chrf())}  # what is shown of the same answers
    assert redone(dataclasses.replace(data, preserved_tests=titled), alone) == ""
    fewer = {"Sums": dataclasses.replace(sums, examples=sums.examples[:1])}
    assert "m_B.json" in redone(dataclasses.replace(data, preserved_tests=fewer), alone)
    longer = redone(data, dataclasses.replace(few, max_length=12))
    assert all(name in longer for name in ("vanilla", "m_A", "m_B.json"))

    composed = dataclasses.replace(settings, methods=("composed",))
    redone(data, composed, {"composed": 1e-3})
    assert redone(data, composed, {"composed": 1e-3}) == ""
    assert "composed.json" in redone(data, dataclasses.replace(composed, num_heads=None), {"composed": 1e-3})
    (left_behind,) = (tmp_path / "seed-0/cell/composed").glob("*/train.jsonl")
    rate = float(left_behind.parent.name)
    (left_behind.parent / "left_behind").touch()
    other = dataclasses.replace(data, composition=data.composition[:10])
    assert "composed.json" in redone(other, composed, {"composed": rate})
    assert not (left_behind.parent / "left_behind").exists()  # nothing of the other training is gone on with
    learned = [json.loads(line) for line in left_behind.read_text().splitlines()]
    assert sum("prompt" in row for row in learned) == 10 and sum("text" in row for row in learned) == 2


def test_a_cut_keeps_the_anchors_vocabulary_while_its_layers_learn(finished, anchor):
    whole = bases.load(anchor)
    expected = {"model.embed_tokens.weight": whole.get_input_embeddings(), "lm_head.weight": whole.lm_head}
    layers = {}
    for kind in ("shared/vanilla", "cell/m_A"):
        weights = load_file(finished[0] / "seed-0" / kind / "model.safetensors")
        for name, module in expected.items():
            torch.testing.assert_close(weights[name], module.weight.data, rtol=0, atol=0)
        layers[kind] = weights["model.layers.1.mlp.up_proj.weight"]
    untrained = whole.model.layers[3].mlp.up_proj.weight.data
    assert (layers["shared/vanilla"] - untrained).abs().max() > 1e-4
    assert (layers["cell/m_A"] - layers["shared/vanilla"]).abs().max() > 1e-3


def test_a_public_m_a_is_taken_as_it_is_and_only_the_upper_reference_depends_on_other_data(
    finished, data, settings, tmp_path
):
    public = bases.load(finished[0] / "seed-0/cell/m_A")
    for weight in public.parameters():
        weight.data += 0.01
    public.save_pretrained(tmp_path / "public")
    methods = ("m_A", "full_on_DC", "full_on_all")
    given = dataclasses.replace(settings, specialist=str(tmp_path / "public"), methods=methods)

    def redone(data) -> str:
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        run(data, given, 0, tmp_path / "seed-0/cell", tmp_path / "seed-0/shared", console, {m: 1e-4 for m in methods})
        return shown.getvalue()

    assert "m_A/base.json" in redone(data)
    taken = load_file(tmp_path / "seed-0/cell/m_A/model.safetensors")
    for name, weight in load_file(tmp_path / "public/model.safetensors").items():
        torch.testing.assert_close(taken[name], weight, rtol=0, atol=0)
    assert redone(data) == ""
    other = redone(dataclasses.replace(data, specialist=data.specialist[:50]))
    assert "full_on_all.json" in other and "full_on_DC" not in other and "m_A" not in other
    assert given.notes()[-1].endswith("public, whose own data is not public: it is all that D_C is a part of.")


def test_an_upper_reference_that_saw_less_than_m_a_is_called_less_than_one(settings):
    minutes, vanilla, rehearsed, mixture, on_all = settings.notes()
    assert "took 2 steps of 4 general texts, and m_A after these 20 of 16 of its own data" in vanilla
    assert not any("vanilla" in note for note in dataclasses.replace(settings, general=None).notes())
    assert "without the search" in minutes
    assert "answers to the development examples are best" in mixture
    assert "texts that m_B wrote by itself" in rehearsed and "20% of all examples" in rehearsed
    assert dataclasses.replace(settings, rehearsal=0.0).notes() == [minutes, vanilla, mixture, on_all]
    assert dataclasses.replace(settings, methods=("composed",)).notes() == [minutes, vanilla, rehearsed]
    assert on_all == (
        "m_B fine-tuned on all of m_A's data takes 6 steps of 4 examples, every other method 4; m_A took 20 of 16: "
        "fewer examples, so that it is less than an upper reference."
    )
    assert dataclasses.replace(settings, steps_on_all=80).notes()[-1].endswith("m_A took 20 of 16.")


def test_results_hold_the_table_with_intervals_and_paired_differences(finished, data, tmp_path):
    _, outcomes, _ = finished
    fields = table.fields(data, {0: outcomes, 1: outcomes})
    results = Results(
        domain="test", preset="tiny", command="", settings={}, seeds=(0, 1), seconds=0.0, **made_here(), **fields
    )
    assert Results.load(results.save(tmp_path)) == results
    references = [[example.completion.strip() for example in data.tests["syllables"].examples]]
    for method, outcome in outcomes.items():
        answers = outcome["answers"]["syllables"]
        assert results.table["syllables"][method].mean == pytest.approx(
            sacrebleu.corpus_chrf(answers, references).score
        )
        assert results.other["syllables BLEU"][method].mean == pytest.approx(
            sacrebleu.corpus_bleu(answers, references).score
        )
        nats, tokens = np.sum(outcome["references"]["syllables"], axis=0)
        perplexity = results.other["syllables perplexity of the reference"][method]
        assert perplexity.mean == pytest.approx(np.exp(nats / tokens))
        low, high = perplexity.interval
        assert 0 < low < perplexity.mean < high
        low, high = results.table["syllables"][method].interval
        assert low <= results.table["syllables"][method].mean <= high
    kept, changes = results.preservation["Sums"], results.preservation_changes["Sums"]
    assert set(kept) == set(METHODS) and set(changes) == set(METHODS) - {"m_B"}
    assert all(changes[method].mean == pytest.approx(kept[method].mean - kept["m_B"].mean) for method in changes)
    perplexities = results.preservation_changes["Arithmetic perplexity"]
    assert "pipeline" not in results.preservation["Arithmetic perplexity"]  # it would be m_B's own
    assert perplexities["m_B_zero_shot"].interval == (0, 0)  # paired: on the same texts the same model
    low, high = results.preservation["Arithmetic perplexity"]["m_B"].interval
    assert low < high  # unpaired it would not be told from another
    assert perplexities["m_A"].interval != (0, 0)
    composed, alone = (results.table["syllables"][method].mean for method in ("composed", "m_A"))
    assert results.differences["syllables"]["m_A"].mean == pytest.approx(composed - alone)
    for row in ("syllables BLEU", "syllables perplexity of the reference"):  # no metric is without a verdict
        ours, theirs = (results.other[row][method].mean for method in ("composed", "m_A"))
        found = results.differences[row]["m_A"]
        assert found.mean == pytest.approx(ours - theirs)
        assert found.interval[0] <= found.mean <= found.interval[1]
    assert (
        results.preservation["Arithmetic perplexity"]["m_B"]
        == results.preservation["Arithmetic perplexity"]["m_B_zero_shot"]
    )


def test_a_perplexity_is_that_of_the_models_own_loss(anchor):
    model, tokenizer = bases.load(anchor), load_tokenizer(anchor)
    rows = scoring.text_rows(["1 + 2 = 3", "4 - 1 - 1 = 2 x 1"], tokenizer, 64)
    found = scoring.negative_log_likelihoods(scoring.logits_of(model), rows, tokenizer, batch=2)
    for row, (nats, tokens) in zip(rows, found, strict=True):
        ids = torch.from_numpy(row["input_ids"]).long()[None]
        assert nats / tokens == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    expected = np.exp(sum(nats for nats, _ in found) / sum(tokens for _, tokens in found))
    assert Perplexity().value(np.asarray(found).sum(axis=0), 2) == pytest.approx(expected)


def test_mixed_logits_are_one_model_at_each_end_and_cached_as_uncached_between(anchor, settings, tmp_path):
    bases.save_random(anchor, tmp_path / "random", 1)
    first, second, tokenizer = bases.load(anchor), bases.load(tmp_path / "random"), load_tokenizer(anchor)
    prompts = tokenizer(["1 + 2 =", "3 - 1 + 2 ="], return_tensors="pt", padding=True, padding_side="left")
    own = tokenizer(["2 =", "4 - 4 + 4 ="], return_tensors="pt", padding=True, padding_side="left")

    def last(model, inputs: dict[str, torch.Tensor], written: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(written)], 1)
        tokens, positions = torch.cat([inputs["input_ids"], written], 1), (mask.cumsum(-1) - 1).clamp(0)
        return model(tokens, attention_mask=mask, position_ids=positions).logits[:, -1]

    def decode(weight: float) -> list[torch.Tensor]:
        begins = prompts["input_ids"].shape[1]
        processor = mixing.MixedLogits(second, weight, own["input_ids"], own["attention_mask"], begins=begins)
        written, steps = prompts["input_ids"][:, :0], []
        for _ in range(3):
            scores, other = last(first, prompts, written), last(second, own, written)
            mixed = processor(torch.cat([prompts["input_ids"], written], 1), scores)
            expected = (1 - weight) * scores.log_softmax(-1) + weight * other.log_softmax(-1)
            steps.append((mixed, expected, scores.log_softmax(-1), other.log_softmax(-1)))
            written = torch.cat([written, mixed.argmax(-1, keepdim=True)], 1)
        return steps

    with torch.no_grad():
        for mixed, expected, _, _ in decode(0.4):
            torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
        for mixed, _, alone, other in decode(0.0):
            torch.testing.assert_close(mixed, alone)
            assert not torch.allclose(mixed, other, atol=1e-2)  # the two are not the same model
        for mixed, _, _, other in decode(1.0):
            torch.testing.assert_close(mixed, other, atol=1e-5, rtol=1e-5)


def test_the_mixture_of_a_run_is_of_its_models_and_its_anchor_has_the_examples(finished, anchor, data):
    folder, outcomes, _ = finished
    first, second = bases.load(anchor), bases.load(folder / "seed-0/cell/m_A")
    tokenizer, training = load_tokenizer(anchor), outcomes["mixed_logits"]["training"]
    developed, searched = data.development["syllables"], {}
    for weight in mixing.WEIGHTS:
        given = scoring.answers(first, tokenizer, developed, 4, few_shot=True, mix=(second, weight))
        references = [[example.completion.strip() for example in developed.examples]]
        searched[weight] = sacrebleu.corpus_chrf(given, references).score
    assert len(set(searched.values())) > 1
    assert {float(weight): chrf for weight, chrf in training["searched"].items()} == pytest.approx(searched)
    weight = training["learning_rate"]
    assert searched[weight] == max(searched.values())
    task = data.tests["syllables"]
    given = scoring.answers(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))
    assert outcomes["mixed_logits"]["answers"]["syllables"] == given
    assert given != scoring.answers(first, tokenizer, task, 4, mix=(second, weight))
    references = scoring.reference_likelihoods(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))
    np.testing.assert_allclose(outcomes["mixed_logits"]["references"]["syllables"], references, rtol=1e-5)


def test_references_are_scored_after_the_prompts_that_are_answered(finished, anchor, data):
    folder, outcomes, _ = finished
    first, second = bases.load(anchor), bases.load(folder / "seed-0/cell/m_A")
    tokenizer, task = load_tokenizer(anchor), data.tests["syllables"]

    def nats_after(model, before: str) -> list[float]:
        found = []
        for example in task.examples:
            prompt = tokenizer(before + example.prompt)["input_ids"]
            ids = torch.tensor([prompt + tokenizer(example.completion)["input_ids"]])
            predicted = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(float(-predicted.gather(-1, ids[0, len(prompt) :, None]).sum()))
        return found

    def nats(found) -> list[float]:
        assert [tokens for _, tokens in found] == [len(tokenizer(e.completion)["input_ids"]) for e in task.examples]
        return [nats for nats, _ in found]

    shown = scoring.shown(task.few_shot)
    with torch.no_grad():
        alone = {"m_A": nats_after(second, ""), "m_B": nats_after(first, shown)}
        assert nats_after(first, "") != pytest.approx(alone["m_B"], rel=1e-2), "the examples make a difference"
    for method, expected in alone.items():
        assert nats(outcomes[method]["references"]["syllables"]) == pytest.approx(expected, rel=1e-4)
    for weight, method in ((0.0, "m_B"), (1.0, "m_A")):
        mixed = scoring.reference_likelihoods(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))
        assert nats(mixed) == pytest.approx(alone[method], rel=1e-4)


def test_in_a_mixture_the_anchor_reads_examples_and_m_a_does_not(anchor, data, tmp_path):
    bases.save_random(anchor, tmp_path / "random", 1)
    first, second, tokenizer = bases.load(anchor), bases.load(tmp_path / "random"), load_tokenizer(anchor)
    task = data.tests["syllables"]

    def answers(model, **options) -> list[str]:
        return scoring.answers(model, tokenizer, task, 4, **options)

    alone = answers(first), answers(first, few_shot=True), answers(second)
    assert alone[0] != alone[1] != alone[2]
    assert answers(first, few_shot=True, mix=(second, 0.0)) == alone[1]
    assert answers(first, few_shot=True, mix=(second, 1.0)) == alone[2]

    asked = [e._replace(prompt=scoring.shown(task.few_shot) + e.prompt) for e in task.examples]
    rows = [scoring.completion_rows(read, tokenizer, 256, append_eos=False) for read in (asked, task.examples)]

    def likelihoods(weight: float) -> list[tuple[float, int]]:
        return scoring.reference_likelihoods(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))

    for weight, model, read in ((0.0, first, rows[0]), (1.0, second, rows[1])):
        expected = scoring.negative_log_likelihoods(scoring.logits_of(model), read, tokenizer, 4)
        np.testing.assert_allclose(likelihoods(weight), expected, rtol=1e-5)
    nats = []
    for own, plain in zip(*rows, strict=True):
        predicted = []
        for model, row in ((first, own), (second, plain)):
            ids, labelled = torch.from_numpy(row["input_ids"]).long()[None], row["labels"][1:] != -100
            predicted.append(model(ids).logits[0, :-1][labelled].log_softmax(-1))
        mixed = (0.6 * predicted[0] + 0.4 * predicted[1]).log_softmax(-1)
        targets = torch.from_numpy(plain["labels"][1:][plain["labels"][1:] != -100]).long()
        nats.append((-mixed[range(len(targets)), targets]).sum().item())
    assert [of_example for of_example, _ in likelihoods(0.4)] == pytest.approx(nats, rel=1e-5)


def test_a_mixture_is_worth_the_mean_of_its_tasks_metrics(anchor, data, tmp_path):
    bases.save_random(anchor, tmp_path / "random", 1)
    first, second, tokenizer = bases.load(anchor), bases.load(tmp_path / "random"), load_tokenizer(anchor)
    by_chrf = data.development["syllables"]
    by_bleu = dataclasses.replace(by_chrf, metric=Bleu(), examples=by_chrf.examples[:3])

    def values(*tasks: TaskSet) -> dict[float, float]:
        return scoring.mixture_values(first, second, tasks, (0.1, 0.9), tokenizer, 4)

    one, other, both = values(by_chrf), values(by_bleu), values(by_chrf, by_bleu)
    assert one != other
    assert both == pytest.approx({weight: (one[weight] + other[weight]) / 2 for weight in (0.1, 0.9)})


def test_in_a_pipeline_the_anchor_reads_what_m_a_answered_to_the_question_and_to_the_examples(finished, anchor, data):
    folder, outcomes, _ = finished
    first, second = bases.load(anchor), bases.load(folder / "seed-0/cell/m_A")
    tokenizer, task = load_tokenizer(anchor), data.tests["syllables"]
    answered = outcomes["m_A"]["answers"]["syllables"]
    shown = dataclasses.replace(task, examples=task.few_shot)
    before = "".join(
        f"Hint: {answer.strip()}\n{example.prompt}{example.completion}\n\n"
        for example, answer in zip(task.few_shot, scoring.answers(second, tokenizer, shown, 4), strict=True)
    )
    prompts = [
        f"{before}Hint: {answer.strip()}\n{example.prompt}"
        for example, answer in zip(task.examples, answered, strict=True)
    ]
    pairs = zip(prompts, task.examples, strict=True)
    asked = dataclasses.replace(task, examples=tuple(Example(prompt, e.completion) for prompt, e in pairs))
    assert outcomes["pipeline"]["answers"]["syllables"] == scoring.answers(first, tokenizer, asked, 4)
    references = scoring.reference_likelihoods(first, tokenizer, asked, 4)
    np.testing.assert_allclose(outcomes["pipeline"]["references"]["syllables"], references, rtol=1e-4)
    assert outcomes["pipeline"]["answers"] != outcomes["m_B"]["answers"]
    assert outcomes["pipeline"]["nll"] == outcomes["m_B"]["nll"], "plain text has no question"


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


def test_answers_end_at_the_first_stop_string():
    assert scoring.until("one\ntwo; three", ("\n", ";")) == "one"
    assert scoring.until("one", ("\n",)) == "one"


def test_the_search_goes_on_beyond_an_end_that_is_the_best():
    assert _beyond({1e-4: 3.0, 3e-4: 2.0, 1e-3: 2.5}) is None
    assert _beyond({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.5}) == 3e-3
    assert _beyond({1e-4: 1.0, 3e-4: 2.0, 1e-3: math.nan}) == 3e-5
