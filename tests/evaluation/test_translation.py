"""Tasks in several languages, by their benchmarks' names: with stand-ins for their data, which are on the hub."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import sacrebleu
from bases import byte_tokenizer

import calm
from calm.errors import CalmError
from calm.evaluation import evaluate, load_tasks

SENTENCES = {
    "eng_Latn": {"dev": [f"Number {i}." for i in range(6)], "devtest": ["A cat. ", "Two dogs."]},
    "cym_Latn": {"dev": [f"Rhif {i}." for i in range(6)], "devtest": ["Cath.", "Dau gi."]},
}


def short(tasks: dict) -> dict:
    """The tasks, with answers that the tiny model has room for."""
    for task in tasks["tasks"].values():
        task.config.generation_kwargs["max_gen_toks"] = 8
    return tasks


def test_flores_puts_each_sentence_beside_its_english(
    composed_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def read(name: str, language: str, split: str) -> datasets.Dataset:
        assert name == "openlanguagedata/flores_plus"
        return datasets.Dataset.from_dict({"text": SENTENCES.get(language, SENTENCES["cym_Latn"])[split]})

    monkeypatch.setattr(datasets, "load_dataset", read)
    tasks = load_tasks(["flores"])
    assert "--metadata" not in caplog.text, "an option that this command has not"
    assert sorted(tasks["tasks"]) == [f"flores_{language}" for language in ("cy", "ga", "gd", "oc", "rw", "xh")]
    task = tasks["tasks"]["flores_cy"]
    task.build_all_requests(rank=0, world_size=1)
    asked = [one.args[0] for one in task.instances]
    assert [prompt.rsplit("\n\n", 1)[1] for prompt in asked] == ["Welsh: Cath.\nEnglish:", "Welsh: Dau gi.\nEnglish:"]
    shown = [prompt.split("\n\n")[:-1] for prompt in asked]
    pairs = {f"Welsh: Rhif {i}.\nEnglish: Number {i}." for i in range(6)}
    assert all(len(set(examples)) == 5 and pairs.issuperset(examples) for examples in shown)

    model = calm.CalmForCausalLM.from_pretrained(composed_folder)
    answers = ["A cat.", "Dogs."]
    monkeypatch.setattr(
        "calm.evaluation.adapter.CalmLM.generate_until",
        lambda self, requests, **_: [answers[request.doc["english"] != "A cat."] for request in requests],
    )
    found = evaluate(model, byte_tokenizer(), short(load_tasks(["flores"])))
    chrf = sacrebleu.corpus_chrf(answers, [["A cat.", "Two dogs."]]).score
    assert found.tasks["flores_cy"].metrics["chrf,none"].value == pytest.approx(chrf)
    assert found.groups["flores"].metrics["chrf,none"].value == pytest.approx(chrf)


def test_flores_without_a_hub_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    def gated(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("is a gated dataset on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(CalmError, match=r"data of the task 'flores_xh' cannot be loaded: is a gated dataset"):
        load_tasks(["flores_xh"])


@pytest.mark.slow  # the index of lm-eval's own tasks is made of 14,000 files
def test_mgsm_is_all_of_its_languages(composed_folder: Path, monkeypatch: pytest.MonkeyPatch):
    row = {"question": "1+2?", "answer": None, "answer_number": 3, "equation_solution": None}
    rows = datasets.Dataset.from_list([row, {**row, "question": "2+2?", "answer_number": 4}])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict(train=rows, test=rows))
    monkeypatch.setattr(
        "calm.evaluation.adapter.CalmLM.generate_until",
        lambda self, requests, **_: ["3" if "1+2" in request.args[0] else "5" for request in requests],
    )
    model = calm.CalmForCausalLM.from_pretrained(composed_folder)
    found = evaluate(model, byte_tokenizer(), short(load_tasks(["mgsm"])))
    assert len(found.tasks) == 11 and all(name.startswith("mgsm_direct_") for name in found.tasks)
    assert found.groups["mgsm"].metrics["exact_match,remove_whitespace"].value == 0.5
