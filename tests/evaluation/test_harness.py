"""Evaluating with local task files: tasks, parts, intervals, and errors that come before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from bases import byte_tokenizer, save_base, write_jsonl
from lm_eval.tasks import TaskManager
from scipy.stats import norm

import calm
from calm.cli.loading import load_model
from calm.errors import CalmError, CheckpointError
from calm.evaluation import Evaluation, Metric, TaskResult, evaluate, load_tasks
from calm.evaluation.code import limited_code_eval
from calm.evaluation.results import interval, read
from calm.evaluation.tasks import SHIPPED, _load, _match, _named

TASKS = Path(__file__).parent / "tasks"
LOCAL = ["sums", "sums_choice"]


def run(model: str | Path, part: str | None = None, **options: object) -> Evaluation:
    loaded, tokenizer = load_model(str(model), part, None, None, "auto", "cpu")
    return evaluate(loaded, tokenizer, load_tasks(LOCAL, TASKS), **options)


def test_accuracy_is_that_of_the_logits(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()

    def score(prompt: str, answer: str) -> float:
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(scores[i - 1, ids[i]]) for i in range(len(prompt_ids), len(ids)))

    rows = [json.loads(line) for line in (TASKS / "sums.jsonl").read_text().splitlines()]
    right = sum(score(row["prompt"], row["completion"]) > score(row["prompt"], row["wrong"]) for row in rows)
    found = run(composed_folder).tasks["sums_choice"]
    assert found.metrics["acc,none"].value == pytest.approx(right / len(rows))
    assert (found.samples, found.num_fewshot, found.metrics["acc,none"].higher_is_better) == (12, 0, True)


def test_exact_match_is_that_of_generate(tmp_path: Path, composed_folder: Path):
    """Asked for what it generates anyway a model is right, and for something else it is not: 4 of 6 here."""
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    rows = []
    for i, prompt in enumerate(["1+2=", "3+4 =", "x", "a longer prompt: ", "5", "6+1="]):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append({"prompt": prompt, "completion": answer if i % 3 else "something else"})
    write_jsonl(tmp_path / "sums.jsonl", rows)
    shutil.copy(TASKS / "sums.yaml", tmp_path)
    tasks = load_tasks(["sums"], tmp_path)
    found = evaluate(model, tokenizer, tasks, num_fewshot=0).tasks["sums"]
    assert found.num_fewshot == 0
    assert found.metrics["exact_match,none"].value == pytest.approx(4 / 6)


def test_each_part_is_the_model_on_its_own(composed_folder: Path, tiny_bases: dict[str, str]):
    composed = run(composed_folder)
    for name, folder in tiny_bases.items():
        part, alone = run(composed_folder, name), run(folder)
        assert part.tasks == alone.tasks
    anchor, _ = load_model(str(composed_folder), "anchor", None, None, "auto", "cpu")
    bare, _ = load_model(tiny_bases["anchor"], None, None, None, "auto", "cpu")
    ids = torch.arange(6, 30)[None]
    assert torch.equal(anchor(ids).logits, bare(ids).logits), "to the last bit"
    assert composed.to_dict().keys() == {"tasks", "groups", "settings", "versions", "seconds"}


def test_a_part_that_has_moved_or_changed(tmp_path: Path, tiny_bases: dict[str, str]):
    base = shutil.copytree(tiny_bases["augmenting"], tmp_path / "base")
    calm.compose(tiny_bases["anchor"], str(base), connections=1).save_pretrained(tmp_path / "out")
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is not there: pass augmenting="):
        load_model(str(tmp_path / "out"), "augmenting", None, None, "auto", "cpu")
    load_model(str(tmp_path / "out"), "augmenting", None, [str(tmp_path / "moved")], "auto", "cpu")
    other = save_base(tmp_path / "other", byte_tokenizer(), seed=9, width=24)
    with pytest.raises(CheckpointError, match="not those that this composition was trained against"):
        load_model(str(tmp_path / "out"), "augmenting", None, [str(other)], "auto", "cpu")


def test_the_same_tasks_serve_several_models_and_runs(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    tasks = load_tasks(LOCAL, TASKS)
    first = evaluate(model, tokenizer, tasks)
    evaluate(model.anchor, tokenizer, tasks, limit=2)
    again = evaluate(model, tokenizer, tasks)
    assert first.tasks == again.tasks
    assert first.tasks["sums"].samples == 12


def test_the_number_of_examples_is_that_of_the_call_and_else_the_tasks_own(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    tasks = load_tasks(["sums"], TASKS)
    asked = (5, None, 0, 3)
    found = [evaluate(model, tokenizer, tasks, num_fewshot=number, limit=1) for number in asked]
    assert [one.tasks["sums"].num_fewshot for one in found] == [5, 2, 0, 3]


@pytest.mark.parametrize("split", ["test", "train"])
def test_no_more_examples_than_a_task_has(split: str, tmp_path: Path, composed_folder: Path):
    """Of the split that is asked, one is left for the question."""
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    lines = (TASKS / "sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sums.jsonl").write_text("".join(lines[:4]))
    task = (TASKS / "sums.yaml").read_text().replace("{test: sums.jsonl}", "{test: sums.jsonl, train: sums.jsonl}")
    task = task.replace("fewshot_split: test", f"training_split: train\nfewshot_split: {split}")
    (tmp_path / "sums.yaml").write_text(task)
    tasks = load_tasks(["sums"], tmp_path)
    most = {"test": 3, "train": 4}[split]
    assert evaluate(model, tokenizer, tasks, num_fewshot=most).tasks["sums"].num_fewshot == most
    with pytest.raises(CalmError, match=rf"num_fewshot = {most + 1}: the task 'sums' has {most} examples"):
        evaluate(model, tokenizer, tasks, num_fewshot=most + 1)


def test_first_examples_of_a_tasks_own(tmp_path: Path, composed_folder: Path):
    """None of them is asked, so all of them may be shown."""
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    lines = (TASKS / "sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sums.jsonl").write_text("".join(lines[:4]))
    task = yaml.safe_load((TASKS / "sums.yaml").read_text())
    shown = [json.loads(line) for line in lines[4:7]]
    task |= {
        "fewshot_config": {"sampler": "first_n", "samples": shown},
        "dataset_kwargs": {"data_files": {"validation": "sums.jsonl"}},
    }
    task |= {"validation_split": "validation"}
    del task["fewshot_split"], task["test_split"]
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    tasks = load_tasks(["sums"], tmp_path)
    assert evaluate(model, tokenizer, tasks, num_fewshot=3).tasks["sums"].num_fewshot == 3
    with pytest.raises(CalmError, match=r"num_fewshot = 4: the task 'sums' has 3 examples to put into a prompt\."):
        evaluate(model, tokenizer, tasks, num_fewshot=4)


def test_what_the_model_generates_with_is_in_the_results(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    model.generation_config.repetition_penalty = 1.3
    found = evaluate(model, tokenizer, load_tasks(["sums"], TASKS), limit=1)
    assert found.settings["generation_config"]["repetition_penalty"] == 1.3
    json.dumps(found.to_dict())


def test_the_seed_chooses_the_examples(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    tasks = load_tasks(["sums"], TASKS)

    def prompts(seed: int) -> list[str]:
        evaluate(model, tokenizer, tasks, seed=seed)
        return [instance.args[0] for instance in tasks["tasks"]["sums"].instances]

    first = prompts(1)
    assert first != prompts(2)
    assert first == prompts(1)
    for seed in range(1, 9):
        for prompt in prompts(seed):
            shown, _, question = prompt.rpartition("\n")
            assert question not in [line[: len(question)] for line in shown.split("\n")], "its own answer is not shown"


def test_chat_templates_change_the_prompt(composed_folder: Path):
    model = calm.CalmForCausalLM.from_pretrained(composed_folder)
    tasks = load_tasks(["sums_choice"], TASKS)
    with pytest.raises(CalmError, match="no chat template"):
        evaluate(model, byte_tokenizer(), tasks, apply_chat_template=True)
    evaluate(model, byte_tokenizer(chat=True), tasks, apply_chat_template=True)
    prompt = tasks["tasks"]["sums_choice"].instances[0].args[0]
    assert prompt.startswith("<|user|>")
    assert prompt.endswith("<|assistant|>")


def test_intervals_against_scipy():
    low, high = interval(5.0, 2.0, [1.0, 3.0, 11.0])
    assert (low, high) == pytest.approx(norm.interval(0.95, 5.0, 2.0), abs=1e-4)
    assert interval(5.0, None, []) is None
    # Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    z, n, p = 1.959964, 50, 0.1
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    assert interval(p, 0.04, [1] * 5 + [0] * 45) == pytest.approx(expected, abs=1e-6)
    low, high = interval(0.0, 0.0, [0.0] * 100)
    assert low == 0
    assert 0.03 < high < 0.04, "none of a hundred is not known to be none"


def test_results_are_written_whole_or_not_at_all(tmp_path: Path):
    results = Evaluation(
        {"t": TaskResult(2, 0, 1.0, {"acc,none": Metric(1.0, 0.0, (0.3, 1.0), True)})}, {}, {}, {}, 0.1
    )
    results.save(tmp_path / "new" / "out.json")
    assert json.loads((tmp_path / "new" / "out.json").read_text())["tasks"]["t"]["metrics"]["acc,none"]["value"] == 1
    broken = Evaluation({}, {}, {"not": object()}, {}, 0.1)
    with pytest.raises(TypeError):
        broken.save(tmp_path / "new" / "out.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.json"]
    (tmp_path / "file").touch()
    with pytest.raises(CalmError, match="Cannot write the results"):
        results.save(tmp_path / "file" / "out.json")


def test_unknown_tasks_name_those_near():
    manager = TaskManager(include_path=[TASKS], include_defaults=False)
    with pytest.raises(CalmError, match=r"no task 'sum_choice'; near it are .*sums_choice"):
        _match(manager, "sum_choice")
    with pytest.raises(CalmError, match=r"no task 'nothing like it'\. `lm-eval ls tasks`"):
        _match(manager, "nothing like it")
    with pytest.raises(CalmError, match="No tasks are given"):
        load_tasks([])


@pytest.mark.slow  # the index of lm-eval's own tasks is made of 14,000 files
def test_standard_tasks_need_the_hub_for_their_data_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    manager = TaskManager(include_path=SHIPPED)
    for name in ("humaneval", "mbpp", "gsm8k", "mgsm", "code2text", "flores"):
        expected = rf"data of the task '{name}' cannot be loaded: Couldn't reach '.*' on the Hub"
        with limited_code_eval(), pytest.raises(CalmError, match=expected):
            _load(manager, name)
    with pytest.raises(CalmError, match=r"no task 'gms8k'; near it are .*gsm8k"):
        load_tasks(["gms8k"])
    with pytest.raises(CalmError, match="data of the task 'humaneval' cannot be loaded"):
        load_tasks(["humaneva*"], allow_code_execution=True)  # and not the shipped humaneval_offline alone
    assert set(load_tasks(["sums_c*", "sums"], TASKS)["tasks"]) == set(LOCAL)


def test_groups_have_aggregates(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    found = evaluate(model, tokenizer, load_tasks(["sums_both"], TASKS))
    assert found.tasks == run(composed_folder).tasks
    [(name, group)] = found.groups.items()
    assert (name, group.samples, list(group.metrics)) == ("sums_both", 24, ["acc,none"])
    metric, of_task = group.metrics["acc,none"], found.tasks["sums_choice"].metrics["acc,none"]
    assert (metric.value, metric.stderr) == (of_task.value, pytest.approx(of_task.stderr))
    assert metric.interval == of_task.interval, "Wilson's, of all that the mean is of"


def test_a_groups_interval_is_of_the_examples_of_all_its_tasks():
    def samples(right: int, number: int) -> list[dict[str, object]]:
        return [{"filter": "none", "acc": float(i < right)} for i in range(number)]

    found = {
        "groups": {"both": {"acc,none": 0.0, "acc_stderr,none": 0.0, "sample_len": 50}},
        "samples": {"one": samples(0, 20), "two": samples(0, 20), "three": samples(0, 10)},
        "group_subtasks": {"both": ["inner", "three"], "inner": ["one", "two"]},
        "n-shot": {},
        "versions": {},
    }
    metric = read(found, ["both"], "groups")["both"].metrics["acc,none"]
    assert metric.interval == interval(0.0, 0.0, [0.0] * 50)


def test_names_of_a_groups_members():
    assert _named(["a", {"task": "b"}, {"group": "c"}, {"group": "d", "task": ["e", {"task": "f"}]}]) == [
        *("a", "b", "c", "e", "f")
    ]


def test_folders_and_files_that_are_no_tasks(tmp_path: Path):
    with pytest.raises(CalmError, match="expected a folder with lm-eval task files"):
        load_tasks(["sums"], tmp_path)
    (tmp_path / "a.yaml").write_text("task: [unclosed")
    with pytest.raises(CalmError, match=r"a\.yaml is not a task file"):
        load_tasks(["sums"], tmp_path)
    (tmp_path / "a.yaml").write_text((TASKS / "sums.yaml").read_text())
    with pytest.raises(CalmError, match=r"data of the task 'sums' cannot be loaded: .*sums\.jsonl"):
        load_tasks(["sums"], tmp_path)
    (tmp_path / "a.yaml").write_text("task: sums\noutput_type: guess\n")
    with pytest.raises(CalmError, match="The task 'sums' cannot be loaded"):
        load_tasks(["sums"], tmp_path)


def test_a_hub_that_is_not_reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "a.yaml").write_text(
        (TASKS / "sums.yaml").read_text().replace("dataset_path: json", "dataset_path: a/b")
    )
    with pytest.raises(CalmError, match=r"data of the task 'sums' cannot be loaded: .*the Hub.*--include-path"):
        load_tasks(["sums"], tmp_path)


def test_too_little_context_to_generate(composed_folder: Path):
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(composed_folder), byte_tokenizer()
    tasks = load_tasks(["humaneval_offline"], allow_code_execution=True)
    with pytest.raises(CalmError, match=r"generates up to 512 tokens, and the model's context is 64"):
        evaluate(model, tokenizer, tasks, allow_code_execution=True)


def test_parts_that_there_are_not(composed_folder: Path, tiny_bases: dict[str, str]):
    with pytest.raises(CheckpointError, match=r"no part 'ancor': expected 'anchor' or .*'augmenting'"):
        load_model(str(composed_folder), "ancor", None, None, "auto", "cpu")
    with pytest.raises(CalmError, match="is not a composition, but a 'llama'"):
        load_model(tiny_bases["anchor"], "anchor", None, None, "auto", "cpu")
