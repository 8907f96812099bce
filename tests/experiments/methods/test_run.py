"""The engine of the experiments: what is trained with what, searched for, kept, and made anew."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

import calm
from calm.errors import CalmError, DivergedError
from calm.experiments.methods import bases, training
from calm.experiments.methods.examples import Example
from calm.experiments.methods.finished import notes_of, parameters_of, seconds_of
from calm.experiments.methods.metrics import Bleu, Chrf
from calm.experiments.methods.mixing import WEIGHTS
from calm.experiments.methods.run import WEIGHTS_OF, _best, _beyond, _Run, run
from calm.experiments.methods.settings import Fit, Settings
from calm.experiments.results import METHODS


def run_cell(data, settings, seed, folder, console, rates=None):
    return run({"cell": data}, settings, (seed,), folder, console, {"cell": rates} if rates else None)["cell"][seed]


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
    assert searched[rate] == max(searched.values())
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
    again = run_cell(data, settings, 0, tmp_path, Console(file=io.StringIO()))
    assert json.loads(json.dumps(again)) == outcomes


def test_a_finished_run_is_not_run_again_and_an_interrupted_one_goes_on(
    finished, data, settings, monkeypatch, tmp_path
):
    folder, outcomes, _ = finished
    shown = io.StringIO()
    again = run_cell(data, settings, 0, folder, Console(file=shown, width=200))
    assert json.loads(json.dumps(again)) == outcomes
    assert shown.getvalue() == ""
    assert seconds_of(folder, [0]) > seconds_of(folder, [1]) > 0  # what no seed changes counts for each

    (folder / "seed-0/cell/lora.json").unlink()  # as if it had been interrupted there
    redone = run_cell(data, settings, 0, folder, Console(file=shown, width=200))
    assert "lora" in shown.getvalue() and "composed" not in shown.getvalue()
    assert redone["lora"]["answers"] == outcomes["lora"]["answers"]
    assert redone["lora"]["nll"] == outcomes["lora"]["nll"]

    searched = outcomes["composed"]["training"]["searched"]
    other = next(float(rate) for rate in searched if float(rate) != outcomes["composed"]["training"]["learning_rate"])
    alone = dataclasses.replace(settings, methods=("composed",))  # asks for a model that the search has removed
    shutil.copytree(folder, tmp_path / "copy")
    copy, cell = tmp_path / "copy", tmp_path / "copy/seed-0/cell"

    def with_another() -> dict:
        return run_cell(data, alone, 0, copy, Console(file=shown, width=200), {"composed": other})["composed"]

    rate = f"{outcomes['composed']['training']['learning_rate']:g}"
    for step in ("composed", f"composed/{rate}"):  # trained to its end, but not measured
        (cell / f"{step}.json").unlink()
    redone = run_cell(data, alone, 0, copy, Console(file=shown, width=200))
    assert redone["composed"]["nll"] == outcomes["composed"]["nll"]

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_composition", interrupted)
        with pytest.raises(KeyboardInterrupt):
            with_another()
    found = with_another()
    assert found["training"]["learning_rate"] == other and found["nll"] != outcomes["composed"]["nll"]


def test_an_interrupted_training_of_m_a_goes_on_where_it_was(finished, data, settings, monkeypatch, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    m_a, computed, loss_of = tmp_path / "seed-0/cell/m_A", [], training._Trainer.compute_loss
    (m_a / "base.json").unlink()
    alone = dataclasses.replace(settings, methods=("m_A",))

    def killed(self, *args, **kwargs):
        computed.append(self.state.global_step)
        if computed[-1] == killed_in:
            raise KeyboardInterrupt
        return loss_of(self, *args, **kwargs)

    monkeypatch.setattr(training._Trainer, "compute_loss", killed)
    monkeypatch.setattr(training, "SAVE_STEPS", 2)
    killed_in = 3
    with pytest.raises(KeyboardInterrupt):
        run_cell(data, alone, 0, tmp_path, Console(file=io.StringIO()))
    later = time.time() + 1000  # as if the two steps had taken that long
    os.utime(m_a / "training/checkpoint-2", (later, later))
    computed.clear()
    killed_in = None
    run_cell(data, alone, 0, tmp_path, Console(file=io.StringIO()))
    assert computed[0] == 2 and computed[-1] == settings.specialist.steps - 1
    assert 1000 <= json.loads((m_a / "base.json").read_text())["result"]["step_seconds"] < 1100
    assert not (m_a / "training").exists()
    expected = load_file(finished[0] / "seed-0/cell/m_A/model.safetensors")
    for name, weight in load_file(m_a / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def test_another_seed_does_not_ask_the_anchor_alone_again(finished, data, settings, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    alone = ("m_B", "m_B_zero_shot")
    some = dataclasses.replace(settings, methods=("m_A", *alone))
    shown = io.StringIO()
    outcomes = run_cell(data, some, 1, tmp_path, Console(file=shown, width=200))
    assert {method: outcomes[method] for method in alone} == {method: finished[1][method] for method in alone}
    assert "m_A.json" in shown.getvalue() and "m_B" not in shown.getvalue()
    assert parameters_of(tmp_path, 1, "cell").keys() == {"anchor", "augmenting"}
    both = seconds_of(tmp_path, [0, 1], ["cell"])
    asked = [json.loads((tmp_path / f"any-seed/cell/{method}.json").read_text()) for method in alone]
    of_each = [seconds_of(tmp_path, [seed], ["cell"]) for seed in (0, 1)]
    assert both == pytest.approx(sum(of_each) - sum(step["result"]["step_seconds"] for step in asked))


def share(data, settings, seeds, folder, told, started):
    torch.set_num_threads(1)  # two of them on two cores
    started.wait()
    with told.open("w") as file:
        outcomes = run({"cell": data}, settings, seeds, folder, Console(file=file, width=200))
    told.with_suffix(".json").write_text(json.dumps(outcomes))


def by_two_processes(data, settings, seeds, folder, tmp_path):
    """What each of them told, and the outcomes that it returned."""
    told = [tmp_path / f"told-{process}" for process in range(2)]
    spawn = multiprocessing.get_context("spawn")
    started = spawn.Barrier(2)
    processes = [spawn.Process(target=share, args=(data, settings, seeds, folder, path, started)) for path in told]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [path.read_text() for path in told], [json.loads(path.with_suffix(".json").read_text()) for path in told]


def test_two_processes_share_a_run_and_both_return_what_one_would(finished, data, settings, tmp_path):
    some = dataclasses.replace(settings, methods=("m_A", "m_B", "composed", "vanilla_m_A", "lora", "mixed_logits"))
    told, (first, second) = by_two_processes(data, some, (0, 1), tmp_path / "run", tmp_path)
    steps = [re.findall(r"^(\S+\.json): \d+ s", text, re.MULTILINE) for text in told]
    assert all(steps), "one of them did nothing"
    taken = collections.Counter(steps[0] + steps[1])
    assert set(taken.values()) == {1}, "something was done twice"
    assert {"seed-0/vanilla/base.json", "seed-1/cell/lora.json", "any-seed/cell/m_B.json"} <= taken.keys()

    assert first == second
    first = first["cell"]
    assert list(first) == ["0", "1"]
    for method, outcome in first["0"].items():
        alone = finished[1][method]
        assert outcome["answers"] == alone["answers"], method
        # another number of threads adds in another order
        np.testing.assert_allclose(outcome["nll"]["Arithmetic"], alone["nll"]["Arithmetic"], rtol=1e-4, err_msg=method)
        if "learning_rate" in alone["training"]:
            rates = [outcomes[method]["training"]["learning_rate"] for outcomes in (finished[1], *first.values())]
            assert len(set(rates)) == 1, "the second seed has what the first one found"
            assert first["1"][method]["training"]["searched"] == {}


def test_two_processes_make_a_missing_base_once(finished, data, settings, tmp_path):
    """Both want m_A's weights at the same time, within methods of their own."""
    folder, outcomes, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/seed-0/cell/m_A" / WEIGHTS_OF).unlink()
    for method in ("m_A", "mixed_logits"):
        (tmp_path / f"run/seed-0/cell/{method}.json").unlink()
    two = dataclasses.replace(settings, methods=("m_A", "mixed_logits"))
    told, (first, second) = by_two_processes(data, two, (0,), tmp_path / "run", tmp_path)
    assert "".join(told).count("m_A, whose weights are not here, is made again") == 1
    # on a busy machine one may be done before the other has started, which then finds everything made
    assert first == second
    for method in two.methods:
        assert first["cell"]["0"][method]["answers"] == outcomes[method]["answers"]


def test_weights_of_an_earlier_run_are_not_taken_for_those_that_a_brought_step_tells_of(
    finished, data, settings, tmp_path
):
    """As when the steps of another machine are unpacked over a folder in which something else was run."""
    m_a = dataclasses.replace(settings, methods=("m_A",))
    other = dataclasses.replace(m_a, specialist=dataclasses.replace(settings.specialist, steps=1))
    run_cell(data, other, 0, tmp_path, Console(file=io.StringIO()))
    stale = load_file(tmp_path / "seed-0/cell/m_A/model.safetensors")
    shutil.copy(finished[0] / "seed-0/cell/m_A/base.json", tmp_path / "seed-0/cell/m_A/base.json")
    told = io.StringIO()
    found = run_cell(data, m_a, 0, tmp_path, Console(file=told, width=200))["m_A"]
    assert "m_A, whose weights are not here, is made again" in told.getvalue()
    assert found["answers"] == finished[1]["m_A"]["answers"]
    made = load_file(tmp_path / "seed-0/cell/m_A/model.safetensors")
    assert any(not torch.equal(made[name], stale[name]) for name in made)


def test_of_mixtures_that_answer_as_well_the_likelier_is_taken(data, settings, monkeypatch, tmp_path):
    mixed, asked = (
        dataclasses.replace(settings, methods=("mixed_logits",)),
        dataclasses.replace(data, development=data.tests),
    )
    nats = {}
    for weight in WEIGHTS:
        known = {"mixed_logits": weight}
        outcome = run_cell(asked, mixed, 0, tmp_path, Console(file=io.StringIO()), known)["mixed_logits"]
        found = [pair for pairs in outcome["references"].values() for pair in pairs]
        nats[weight] = sum(n for n, _ in found) / sum(tokens for _, tokens in found)
    likeliest, second, *_ = sorted(WEIGHTS, key=lambda weight: nats[weight])
    worth = dict.fromkeys(WEIGHTS, 7.0) | {likeliest: 6.0}  # which answers worse
    monkeypatch.setattr(_Run, "_worth", lambda self, *_, mix, **__: worth[mix[1]])
    found = run_cell(asked, mixed, 0, tmp_path, Console(file=io.StringIO()))["mixed_logits"]["training"]
    assert found["learning_rate"] == second and found["searched"] == {str(w): worth[w] for w in WEIGHTS}


def test_notes_say_what_m_a_took_and_which_seed_has_a_rate_of_its_own(finished, settings):
    folder, outcomes, _ = finished
    searched = {**outcomes["lora"]["training"], "learning_rate": 0.5, "diverged_at": 0.7}
    own = {**outcomes, "lora": {**outcomes["lora"], "training": searched}}
    took, diverged = notes_of(folder, settings, {"cell": {0: outcomes, 3: own}})
    assert re.fullmatch(r"With seed 0 the training of m_A of cell took \d+ minutes\.", took)
    assert diverged == "LoRA on m_B, D_C of cell diverged with seed 3 at 0.7 and has 0.5."
    assert notes_of(folder, settings, {"cell": {0: own, 3: outcomes}})[1:] == [diverged.replace("seed 3", "seed 0")]
    assert notes_of(folder, settings, {"cell": {0: outcomes, 3: outcomes}}) == [took]
    public = dataclasses.replace(settings, specialist="a/model")
    assert notes_of(folder, public, {"cell": {0: outcomes}}) == []


def test_a_data_set_whose_rates_are_known_is_not_searched_and_another_one_is(data, settings, tmp_path):
    mixed = dataclasses.replace(settings, methods=("mixed_logits",))
    cells, known = {"one": data, "other": data}, {"one": {"mixed_logits": 0.35}}
    outcomes = run(cells, mixed, (0, 1), tmp_path, Console(file=io.StringIO()), known)
    trained = {name: [outcomes[name][seed]["mixed_logits"]["training"] for seed in (0, 1)] for name in cells}
    assert [one["learning_rate"] for one in trained["one"]] == [0.35, 0.35]
    assert [len(one["searched"]) for one in (*trained["one"], *trained["other"])] == [0, 0, len(WEIGHTS), 0]


def test_known_rates_take_what_a_search_left(finished, data, settings, tmp_path):
    """Also where only the steps were brought from another machine, without the models."""
    folder, outcomes, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    some = dataclasses.replace(settings, methods=("composed", "mixed_logits"))
    rates = {method: outcomes[method]["training"]["learning_rate"] for method in some.methods}
    shutil.rmtree(tmp_path / f"seed-0/cell/composed/{rates['composed']:g}")
    shown = io.StringIO()
    assert run_cell(data, some, 0, tmp_path, Console(file=shown), rates) == {m: outcomes[m] for m in some.methods}
    assert shown.getvalue() == ""


def test_lora_needs_no_m_a_where_m_a_is_trained_here(data, settings, tmp_path):
    """Of m_A it takes the number of a composition's parameters, which the vanilla one has as well."""
    alone = dataclasses.replace(settings, methods=("lora",))
    jobs = {job.path: job for job in _Run(data, alone, 0, tmp_path, Console(), None, None, "cell").jobs()}
    needs = {
        path.relative_to(tmp_path / "seed-0").as_posix() for path in jobs[tmp_path / "seed-0/cell/lora.json"].needs
    }
    assert needs == {"vanilla/base.json", "cell/rehearsal.json"}


def test_data_sets_that_share_a_vanilla_m_a_have_the_same_general_texts(data, settings, tmp_path):
    cells = {"one": data, "other": dataclasses.replace(data, general=data.general[:1])}
    with pytest.raises(CalmError, match="one, other: data sets that share a vanilla m_A, with other general texts"):
        run(cells, settings, (0,), tmp_path, Console(file=io.StringIO()))


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_rate_that_diverges_is_not_taken_and_ends_no_search(finished, data, settings, monkeypatch, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    trained, highest = training.train_composition, max(settings.learning_rates["composition"])
    limits = [highest]

    def diverging(*arguments, **options):
        if next(one for one in arguments if isinstance(one, Fit)).learning_rate >= limits[-1]:
            raise DivergedError("not a number")
        return trained(*arguments, **options)

    def search() -> dict:
        shutil.rmtree(tmp_path / "seed-0/cell/composed")
        return run_cell(data, alone, 0, tmp_path, Console(file=io.StringIO()))["composed"]["training"]

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
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    trained, given = training.train_composition, 0.5

    def diverging(*arguments, **options):
        if next(one for one in arguments if isinstance(one, Fit)).learning_rate == given:
            raise DivergedError("not a number")
        return trained(*arguments, **options)

    monkeypatch.setattr(training, "train_composition", diverging)
    alone = dataclasses.replace(settings, methods=("composed",), steps=3)
    told = io.StringIO()
    outcome = run_cell(data, alone, 0, tmp_path, Console(file=told, width=200), {"composed": given})["composed"]
    assert f"{outcome['training']['learning_rate']:g}" in outcome["training"]["searched"]
    assert outcome["training"]["diverged_at"] == given
    assert "composed searches for a learning rate of its own with seed 0" in told.getvalue()


def test_seconds_of_one_data_set_are_its_own_and_those_of_the_shared_vanilla_m_a(finished, tmp_path):
    shutil.copytree(finished[0] / "seed-0/cell", tmp_path / "seed-0/cy")
    shutil.copytree(finished[0] / "seed-0/cell", tmp_path / "seed-0/xh")
    shutil.copytree(finished[0] / "seed-0/vanilla", tmp_path / "seed-0/vanilla")
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
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
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
        run_cell(data, longer, 0, tmp_path, Console(file=io.StringIO()), {method: 1e-4})
    assert len(learned) == 3 * 20 + 15
    assert all(count % 3 == 0 for _, count in collections.Counter(learned).most_common(18))


@pytest.mark.parametrize("method", ["lora", "full_on_DC", "full_on_all"])
def test_every_method_that_is_trained_on_dc_has_them(finished, data, settings, monkeypatch, tmp_path, method):
    """All but the compositions, whose file of examples is read above."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    examples = len(data.specialist if method == "full_on_all" else data.composition)  # which it is a part of
    learned = []
    monkeypatch.setattr(training, "fine_tune", lambda model, tokenizer, rows, *_: learned.append(rows) or 0)
    for rehearsal_share, texts in ((0.2, 5), (0.0, 0)):
        shutil.rmtree(tmp_path / f"seed-0/cell/{method}", ignore_errors=True)
        alone = dataclasses.replace(settings, methods=(method,), rehearsal=rehearsal_share)
        run_cell(data, alone, 0, tmp_path, Console(file=io.StringIO()), {method: 1e-4})
        rows = learned.pop()
        assert not learned
        assert sum((row["labels"][1:] != -100).all() for row in rows) == texts
        assert len(rows) == texts + examples


def test_what_was_made_with_other_settings_or_data_is_made_anew(finished, data, settings, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)

    def redone(data, settings, rates=None) -> str:
        shown = io.StringIO()
        console = Console(file=shown, width=200)
        run_cell(data, settings, 0, tmp_path, console, rates)
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
    assert sum("prompt" in row for row in learned) == 2 * 10 and sum("text" in row for row in learned) == 5


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
        run_cell(data, given, 0, tmp_path, console, {m: 1e-4 for m in methods})
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
    minutes, vanilla, rehearsed, encoder, chosen, on_all = settings.notes()
    assert "took 2 steps of 4 general texts, and m_A after these 20 of 16 of its own data" in vanilla
    assert not any("vanilla" in note for note in dataclasses.replace(settings, general=None).notes())
    assert "without the search" in minutes
    assert "answers to the development examples are best" in chosen
    assert "texts that m_B wrote by itself" in rehearsed and "20% of all examples" in rehearsed
    assert "as an encoder" in encoder
    assert dataclasses.replace(settings, rehearsal=0.0).notes() == [minutes, vanilla, encoder, chosen, on_all]
    without = rehearsed.removesuffix(" With all of m_A's data they are the same texts.")
    assert without != rehearsed
    assert dataclasses.replace(settings, methods=("composed",)).notes() == [minutes, vanilla, without, chosen]
    assert on_all == (
        "m_B fine-tuned on all of m_A's data takes 6 steps of 4 examples, every other method 4; m_A took 20 of 16: "
        "fewer examples, so that it is less than an upper reference."
    )
    assert dataclasses.replace(settings, steps_on_all=80).notes()[-1].endswith("m_A took 20 of 16.")


def test_the_search_goes_on_beyond_an_end_that_is_the_best():
    assert _beyond({1e-4: (30.0, -1.0), 3e-4: (40.0, -2.0), 1e-3: (35.0, -1.0)}) is None
    assert _beyond({1e-4: (30.0, -3.0), 3e-4: (40.0, -2.0), 1e-3: (45.0, -2.5)}) == 3e-3
    assert _beyond({1e-4: (30.0, -3.0), 3e-4: (20.0, -2.0), 1e-3: (-math.inf, -math.inf)}) == 3e-5


def test_of_rates_whose_answers_are_worth_the_same_the_likelier_is_the_best():
    assert _best({1e-4: (0.0, -3.0), 3e-4: (0.0, -2.0), 1e-3: (0.0, -2.5)}) == 3e-4
    assert _best({1e-4: (1.0, -9.0), 3e-4: (0.0, -2.0)}) == 1e-4


def test_bases_of_which_only_the_steps_came_here_are_made_again(finished, data, settings, tmp_path):
    folder, outcomes, _ = finished
    for path in folder.rglob("*.json"):
        if "fingerprint" in json.loads(path.read_text()) and path.stem not in ("m_A", "random_m_A"):
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(folder))
    shown = io.StringIO()
    again = run_cell(data, settings, 0, tmp_path, Console(file=shown, width=200))
    for base in ("vanilla", "m_A", "random"):
        assert f"{base}, whose weights are not here, is made again" in shown.getvalue()
    for method in ("m_A", "random_m_A"):
        assert again[method]["answers"] == outcomes[method]["answers"]
        assert again[method]["nll"]["Arithmetic"] == outcomes[method]["nll"]["Arithmetic"]
