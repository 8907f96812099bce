"""The key-value experiment run at toy sizes: stages are kept, failures are clear, every preset starts."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import calm
from calm.attention import Connection
from calm.experiments.key_value_arithmetic import (
    baselines,
    bases,
    evaluate,
    recipe,
    reproduce,
    run,
    stages,
    training,
    workers,
)
from calm.experiments.key_value_arithmetic.ablations import Variant, VariantConnection, markdown
from calm.experiments.key_value_arithmetic.data import TASKS, DataSettings, Task, build_tokenizer
from calm.experiments.key_value_arithmetic.lines import Line, encode
from calm.experiments.key_value_arithmetic.stages import STAGES
from calm.experiments.key_value_arithmetic.training import exact_match
from calm.experiments.results import Asked

SETTINGS = DataSettings()


@pytest.fixture(scope="module")
def task():
    return Task.draw(SETTINGS, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(SETTINGS)


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_exact_match_agrees_with_generation(task, tokenizer):
    """Progress looks at teacher-forced argmax; it must say what greedy generation says."""
    torch.manual_seed(0)
    model = bases.new_augmenting(recipe.preset("tiny").augmenting_model, tokenizer, 0)
    prompts = [prompt for prompt, _ in task.examples("KV-SUBS", task.held_out_keys, 8, 0)]
    written = evaluate.generate(model, tokenizer, prompts, 4)
    lines = [
        Line().add(tokenizer.tokenize(prompt), False).add(tokenizer.tokenize(text), True)
        for prompt, text in zip(prompts, written, strict=True)
    ]
    # special tokens are left out of the text; rows without them are what the model wrote
    whole = [line for line in lines if sum(line.learned) == 4]
    assert len(whole) >= 4
    assert exact_match(model, encode(whole, tokenizer.get_vocab())) == 100
    whole[0].words[-1] = "1" if whole[0].words[-1] != "1" else "2"
    assert exact_match(model, encode(whole, tokenizer.get_vocab())) == pytest.approx(100 - 100 / len(whole))


class Scripted:
    """Stands in for `generate`: answers right, except where told."""

    def __init__(self, task, wrong):
        self.right = {
            prompt: answer for name in TASKS for prompt, answer in task.examples(name, task.held_out_keys, 20, 0)
        }
        self.wrong = wrong

    def __call__(self, model, tokenizer, prompts, max_new_tokens):
        return [self.right[prompt] + (" 1" if index < self.wrong else "") for index, prompt in enumerate(prompts)]


def test_exact_match_is_of_the_full_answer(task, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", Scripted(task, wrong=5))
    answers = evaluate.evaluate(None, tokenizer, task, 20, 0)
    assert evaluate.percent_right(evaluate.flags_of(answers["KV-MATH"])) == 75.0
    assert evaluate.percent_right(evaluate.flags_of(answers["NUM-MATH"])) == 75.0


def test_of_the_restated_values_only_the_first_part_of_an_answer_counts(task, tokenizer, monkeypatch):
    """KV-MATH has the same prompt where answers restate: what solves on is no wrong KV-SUBS, other values are."""
    right = dict(task.examples("KV-SUBS", task.held_out_keys, 4, 0))
    written = [f"{answer} = 7" for answer in right.values()]
    written[-1] = f"0 + {written[-1]}"
    monkeypatch.setattr(evaluate, "generate", lambda model, tokenizer, prompts, length: written)
    answers = evaluate.evaluate(None, tokenizer, task, 4, 0, ("KV-SUBS",))
    assert evaluate.flags_of(answers["KV-SUBS"]) == "1110"


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    return out, run.main("tiny", 0, out)


def test_results_file(finished):
    out, returned = finished
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert list(results["table"]) == ["m_A", "m_B", "composed", "random_m_A", "vanilla_m_A", "encoder_m_A"]
    assert all(list(row) == list(TASKS) and max(row.values()) <= 100 for row in results["table"].values())
    assert results["held_out_keys"] == 64 and results["seed"] == 0 and results["seconds"] > 0
    assert (out / "table.png").stat().st_size > 10_000


def test_what_is_left_can_be_used(finished, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = finished
    composed = calm.CalmForCausalLM.from_pretrained(out / "composed")
    assert len(composed.connections) == 2
    typed = AutoTokenizer.from_pretrained(out / "composed")("ba + du =", return_tensors="pt")
    assert composed(**typed).logits.shape == (1, 4, len(AutoTokenizer.from_pretrained(out / "anchor")))
    anchor = AutoModelForCausalLM.from_pretrained(out / "anchor")
    with composed.composition_disabled():
        assert torch.equal(composed(**typed).logits, anchor(**typed).logits)
    assert not torch.equal(composed(**typed).logits, anchor(**typed).logits)
    encoder = calm.CalmForCausalLM.from_pretrained(out / "ablations/encoder")
    assert encoder.config.attend == "prompt"


def test_ablations_differ_from_the_composition_in_one_thing(finished):
    out, _ = finished
    vanilla = calm.CalmConfig.from_pretrained(out / "ablations/vanilla")
    random_ = calm.CalmConfig.from_pretrained(out / "ablations/random")
    composed = calm.CalmConfig.from_pretrained(out / "composed")
    references = [c.augmenting_references["augmenting"] for c in (vanilla, random_, composed)]
    assert len({str(reference["fingerprint"]) for reference in references}) == 3
    assert len({str(c.anchor_reference["fingerprint"]) for c in (vanilla, random_, composed)}) == 1
    assert len({c.attend for c in (vanilla, random_, composed)}) == 1


def test_finished_stages_are_kept(finished, monkeypatch):
    out, first = finished
    monkeypatch.setattr(workers, "run_stage", lambda *_: pytest.fail("trained again"))
    again = run.main("tiny", 0, out)
    assert again["table"] == first["table"] and again["seconds"] == pytest.approx(first["seconds"], abs=2)
    assert again["kept_stages"] == [stage.name for stage in STAGES]


def test_the_demo_ends_by_saying_how_to_try_it(finished, monkeypatch, capsys):
    out, _ = finished
    answers = {"m_A": "1", "m_B": "2", "composed": "3"}
    monkeypatch.setattr(run.report, "example", lambda results: ("ba + du =", answers))
    run.main("tiny", 0, out)
    *_, chat, prompt, page = capsys.readouterr().out.strip().split("\n")
    assert chat == f"Try it: calm chat {out / 'composed'}" and prompt == "and type, for example: ba + du ="
    assert f"calm playground {out / 'composed'}" in page


def test_without_matplotlib_there_is_no_plot_and_everything_else(finished, monkeypatch, capsys):
    out, first = finished
    for file in ("results.json", "table.png"):
        (out / file).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run.main("tiny", 0, out)["table"] == first["table"]
    assert json.loads((out / "results.json").read_text())["table"] == first["table"]
    assert not (out / "table.png").exists()
    assert "pip install 'calm-lm[train]'" in " ".join(capsys.readouterr().out.split())


def test_the_demo_runs_without_peft():
    """`pip install calm-lm[train]` does not bring it; only the baseline LoRA needs it."""
    script = "import sys; sys.modules['peft'] = None; import calm.experiments.key_value_arithmetic.run"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_only_what_is_missing_is_trained(finished, monkeypatch):
    out, _ = finished
    file = out / "composed" / stages.RESULT_FILE
    before = json.loads(file.read_text())
    file.unlink()
    trained = []
    real = workers.run_stage
    monkeypatch.setattr(workers, "run_stage", lambda stage, *rest: trained.append(stage.name) or real(stage, *rest))
    run.main("tiny", 0, out)
    assert trained == ["composed"]
    again = json.loads(file.read_text())
    for what in ("fingerprint", "right", "perplexity", "answers"):  # under one seed it comes out the same
        assert again[what] == before[what]


def test_a_step_is_one_batch_however_many_gpus_there_are(monkeypatch):
    """The Trainer would draw an item for each, of which the collator knows but one."""
    taken = []

    def trainer(args, **_):
        taken.append(args._n_gpu)
        raise InterruptedError

    monkeypatch.setattr(training.TrainingArguments, "n_gpu", property(lambda self: 4))
    monkeypatch.setattr(training, "Trainer", trainer)
    tiny = recipe.preset("tiny")
    with pytest.raises(InterruptedError):
        training.fit(None, [{}], tiny.anchor_training, 0, lambda *_: None)
    assert taken == [1]
    with pytest.raises(ValueError, match="too many values"):
        training._only_item([{}, {}])


def test_other_settings_are_not_kept(finished):
    out, _ = finished
    tiny = recipe.preset("tiny")
    longer = dataclasses.replace(
        tiny, composition_training=dataclasses.replace(tiny.composition_training, steps=11), workers=2
    )
    still = [stage.name for stage in STAGES if stages.kept(stage, longer, 0, out)]
    assert still == ["m_B", "m_A", "vanilla_base"]
    assert not any(stages.kept(stage, tiny, 1, out) for stage in STAGES)


def test_unknown_preset_and_unwritable_folder(tmp_path):
    with pytest.raises(calm.CalmError, match="preset='huge': expected one of demo, cpu"):
        run.main("huge", 0, tmp_path)
    with pytest.raises(calm.CalmError, match="preset='cpu' asks for direct answers; expected 'demo' or 'tiny'"):
        run.main("cpu", 0, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(calm.CalmError, match="cannot be written to"):
        run.main("tiny", 0, tmp_path / "file")


def test_failure_in_a_worker_is_a_clear_error(tmp_path):
    """A real process: the anchor's folder is a file, so that its stage fails."""
    tiny = dataclasses.replace(recipe.preset("tiny"), workers=2)
    (tmp_path / "anchor").write_text("")
    with (
        workers.new_progress() as progress,
        pytest.raises(workers.StageFailed, match="Training m_B failed: FileExistsError"),
    ):
        workers.run_stages(STAGES[:1], tiny, 0, tmp_path, progress, lambda stage, result: pytest.fail("finished"))


# -- attention variants ------------------------------------------------------------------------------------------------


WAITING = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from calm.experiments.key_value_arithmetic import workers

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, initializer=workers._start_worker, initargs=(context.Queue(),))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 100).result()
"""


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    """Another process may have begun its stage anew, in the same folder."""
    (tmp_path / "waiting.py").write_text(WAITING)
    with subprocess.Popen([sys.executable, tmp_path / "waiting.py"], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_default_variant_is_the_librarys_connection(finished):
    out, _ = finished
    torch.manual_seed(0)
    reference = calm.compose(str(out / "anchor"), str(out / "augmenting"), 2)
    variant = calm.compose(str(out / "anchor"), str(out / "augmenting"), 2, attention="paper")
    for index, connection in enumerate(reference.connections):
        torch.nn.init.normal_(connection.w_o.weight, std=0.2)
        torch.nn.init.constant_(connection.gate.bias, 0.2)
        torch.nn.init.normal_(connection.gate.weight, std=0.1)
        variant.connections[index] = VariantConnection(16, 24, 4, Variant())
        variant.connections[index].load_state_dict(connection.state_dict())
    ids = torch.randint(3, 20, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for arguments in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(
            variant(ids, **arguments).logits[mask.bool()], reference(ids, **arguments).logits[mask.bool()]
        )
    for changed in (
        Variant("none"),
        Variant(position="none"),
        Variant(position="rotary"),
        Variant(normalize=False),
    ):
        variant.connections[0] = VariantConnection(16, 24, 4, changed)
        variant.connections[0].load_state_dict(reference.connections[0].state_dict(), strict=changed.gate != "none")
        assert not torch.allclose(variant(ids).logits, reference(ids).logits), changed


def test_where_variants_start():
    """The default as the library's connection; the others differ in what they name."""

    def start(make, *args):
        torch.manual_seed(0)
        return make(24, 24, 4, *args)

    def same(one, other):
        return all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())

    assert same(start(VariantConnection, Variant()), start(Connection))
    assert same(start(VariantConnection, Variant("none")), start(Connection, "normalized"))
    unopened, opened = start(Connection), start(VariantConnection, Variant("open"))
    assert opened.gate.bias.item() == pytest.approx(8 / 24)
    torch.nn.init.zeros_(opened.gate.bias)
    assert same(opened, unopened)
    random_ones = start(VariantConnection, Variant(identities=False))
    assert all(weight.eq(0).all() for weight in random_ones.gate.parameters())
    for name in ("f_proj", "w_v", "w_o"):
        weight, identity = (getattr(connection, name).weight for connection in (random_ones, unopened))
        assert torch.equal(identity, torch.eye(24))
        assert weight.std().item() == pytest.approx(24**-0.5, rel=0.1) and weight.mean().abs() < 0.05


@pytest.mark.parametrize("position", ["steep", "alibi", "rotary", "none"])
def test_variants_decode_with_a_cache_as_without(finished, position):
    out, _ = finished
    torch.manual_seed(0)
    model = calm.compose(str(out / "anchor"), str(out / "augmenting"), 2, attention="paper")
    for index in range(2):
        model.connections[index] = VariantConnection(16, 24, 4, Variant("open", position=position))
    ids = torch.randint(3, 20, (2, 8))
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-5, rtol=1e-4)


def test_every_point_of_a_curve_is_asked_for_the_same_keys_that_none_was_trained_on(tmp_path, monkeypatch):
    trained_on, asked_for = set(), []

    def compose(anchor, augmenting, task, *_):
        trained_on.update(task.composition_keys)
        return SimpleNamespace(model=SimpleNamespace(save_pretrained=lambda folder: None))

    monkeypatch.setattr(stages, "compose_and_train", compose)
    monkeypatch.setattr(stages, "end", lambda folder, identity, trained, clock, task, *_, **__: asked_for.append(task))
    for stage in stages.CURVES:
        if stage.varied and stage.varied[0] != "augmenting_steps":  # these train an m_A first
            stages.run_stage(stage, recipe.PRESETS["tiny"], 0, tmp_path, lambda *_: None)
    keys = {task.held_out_keys for task in asked_for}
    assert len(asked_for) > 4 and len(keys) == 1
    assert not trained_on & set(*keys) and len(*keys) == 16


def test_the_table_of_variants_has_the_seeds_that_were_asked_for():
    rows = [
        {"variant": name, "seed": seed, "accuracy": {"KV-MATH": percent}}
        for name, seed, percent in (("open", 0, 10.0), ("open", 3, 90.0), ("closed", 0, 30.0))
    ]
    assert markdown(rows, [3]).splitlines()[2:] == ["| open | 90.0 | 90.0 |"]
    assert markdown(rows, [0, 3]).splitlines()[2:] == ["| open | 50.0 | 10.0 | 90.0 |", "| closed | 30.0 | 30.0 |  |"]


# -- the presets that need a GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"), [("gpu", (1, 999)), pytest.param("paper", (1, 80), marks=pytest.mark.slow)]
)
def test_the_presets_of_a_gpu_at_toy_size(name, values, tmp_path, monkeypatch):
    """Everything of them but their size, their device, most baselines and the curves, which `tiny` has."""
    whole, tiny = recipe.PRESETS[name], recipe.PRESETS["tiny"]
    toy = dataclasses.replace(
        tiny,
        data=dataclasses.replace(whole.data, keys=80, values=values, syllables=20),
        with_unknowns=whole.with_unknowns,
        hardware=dataclasses.replace(whole.hardware, device="cpu", loaders=1),
    )
    monkeypatch.setitem(recipe.PRESETS, name, toy)
    monkeypatch.setattr(reproduce, "BASELINES", reproduce.BASELINES[-1:])
    monkeypatch.setattr(reproduce, "CURVES", ())
    monkeypatch.setattr(reproduce, "_curves", lambda finished, recipe: {})
    results = reproduce.reproduce(name, Asked((0,)), tmp_path, Console(quiet=True))
    assert set(results.table) == set(TASKS) and {"composed", "mixed_logits"} <= set(results.table["KV-MATH"])
    asked = results.examples["KV-MATH"][0]
    assert asked["reference"].lstrip("-").isdigit()
    anchor = AutoModelForCausalLM.from_pretrained(tmp_path / "seed-0/anchor")
    assert anchor.dtype == torch.float32 and anchor.config.vocab_size == len(build_tokenizer(toy.data))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_no_gpu_is_said_before_work_starts(name, tmp_path):
    with pytest.raises(calm.CalmError, match=f"preset='{name}' trains on a GPU"):
        reproduce.reproduce(name, Asked((0,)), tmp_path, Console(quiet=True))
    assert not list(tmp_path.iterdir())


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_the_length_of_the_upper_reference_is_of_no_matter_to_other_stages():
    tiny = recipe.PRESETS["tiny"]
    longer = dataclasses.replace(tiny, steps_on_all=21)
    all_stages = (*stages.STAGES, *stages.BASELINES, *stages.CURVES)
    changed = [s.name for s in all_stages if len({stages.stage_fingerprint(s, r, 0) for r in (tiny, longer)}) == 2]
    assert changed == ["full_on_all"]


def test_fine_tuning_on_all_data_is_not_taught_to_stop_after_restating(finished, monkeypatch):
    """KV-SUBS and KV-MATH have the same prompt when answers are restated: an end learned there forbids the solution."""
    out, _ = finished
    tiny = recipe.PRESETS["tiny"]
    drawn, lengths = [], []

    def fit(model, batches, *_, **__):
        drawn.append(batches[0])
        lengths.append(len(batches))

    monkeypatch.setattr(baselines, "fit", fit)
    task, tokenizer = Task.draw(tiny.data, 0), build_tokenizer(tiny.data)
    baselines.train_baseline(
        "full_on_all", out / "anchor", out / "augmenting", task, tiny, tokenizer, 0, lambda *_: None
    )
    assert lengths == [5, 5, 5, tiny.steps_on_all] and tiny.steps_on_all != tiny.composition_training.steps
    ends = drawn[-1]["labels"] == tokenizer.eos_token_id
    ends_written = drawn[-1]["input_ids"] == tokenizer.eos_token_id
    assert ends_written.any() and ends.any()
    for row in (ends_written & ~ends).any(1).nonzero().flatten():
        assert (drawn[-1]["input_ids"][row] == tokenizer.get_vocab()["="]).sum() == 1
    for row in ends.any(1).nonzero().flatten():
        assert (drawn[-1]["input_ids"][row] == tokenizer.get_vocab()["="]).sum() > 1
