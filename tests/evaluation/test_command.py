"""`calm evaluate`: JSON, table, file, and its errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import byte_tokenizer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from calm.cli import app
from calm.cli.evaluate import table
from calm.cli.loading import load_model
from calm.evaluation import Evaluation, Metric, TaskResult

TASKS = Path(__file__).parent / "tasks"


def run(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_json_table_and_file_say_the_same(tmp_path: Path, composed_folder: Path):
    common = (composed_folder, "--tasks", "sums, sums_choice", "--include-path", TASKS, "--limit", 10)
    printed = json.loads(run(*common, "--json", "--output", tmp_path / "out.json", "--batch-size", 3).stdout)
    assert printed == json.loads((tmp_path / "out.json").read_text())
    assert printed["settings"]["model"] == str(composed_folder)
    assert printed["settings"] | {"limit": 10, "batch_size": 3, "seed": 1234, "part": None} == printed["settings"]
    shown = run(*common).stdout
    for name, task in printed["tasks"].items():
        assert task["samples"] == 10
        [(key, metric)] = task["metrics"].items()
        low, high = metric["interval"]
        row = next(line for line in shown.splitlines() if line.split()[:1] == [name])
        assert row.split() == [
            *(name, "10", str(task["num_fewshot"]), key.partition(",")[0], "↑", f"{metric['value']:.4f}"),
            *(f"{low:.4f}", "-", f"{high:.4f}"),
        ]


def test_parts_and_plain_models(composed_folder: Path, tiny_bases: dict[str, str]):
    common = ("--tasks", "sums_choice", "--include-path", TASKS, "--num-fewshot", 0, "--json")
    composed = json.loads(run(composed_folder, *common).stdout)
    part = json.loads(run(composed_folder, *common, "--part", "anchor").stdout)
    plain = json.loads(run(tiny_bases["anchor"], *common).stdout)
    assert part["tasks"] == plain["tasks"]
    settings = [(row["settings"]["model_type"], row["settings"]["part"]) for row in (composed, part, plain)]
    assert settings == [("calm", None), ("llama", "anchor"), ("llama", None)]


def test_a_lora_adapter_is_evaluated_on_the_model_that_it_was_trained_on(
    tmp_path: Path, tiny_bases: dict[str, str], composed_folder: Path
):
    anchor = AutoModelForCausalLM.from_pretrained(tiny_bases["anchor"])
    adapted = get_peft_model(anchor, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load_model(str(tmp_path / "adapter"), None, None, None, "auto", "cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 0.1
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()  # the adapted model's
    common = ("--tasks", "sums_choice", "--include-path", TASKS, "--json")
    found = json.loads(run(tmp_path / "adapter", *common).stdout)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    assert found["tasks"] == json.loads(run(tmp_path / "merged", *common).stdout)["tasks"]

    config = tmp_path / "adapter/adapter_config.json"
    for base, said in ((None, "names no base_model_name_or_path"), (composed_folder, "is an adapter on a composition")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base and str(base)}))
        assert said in run(tmp_path / "adapter", *common, code=1).stderr


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path):
    (tmp_path / "file").touch()
    for output, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "out.json", "cannot be made")):
        result = run("no-such-model", "--tasks", "sums", "--output", output, code=2)
        assert reason in " ".join(result.output.replace("│", " ").split())


def test_long_names_are_whole():
    names = [f"afrobench_flores_kon_Latn-eng_Latn_prompt_{number}_of_a_long_name" for number in range(2)]
    result = TaskResult(12, 0, 1.0, {"exact_match,none": Metric(0.5, 0.1, (0.3, 0.7), True)})
    console = Console(file=io.StringIO(), width=80)
    console.print(table(Evaluation(dict.fromkeys(names, result), {}, {}, {}, 0.0)))
    shown = console.file.getvalue()
    first_column = "".join(line[: line.find("  ")].strip() for line in shown.splitlines()[1:])
    assert first_column == "".join(names)
    assert shown.count("0.3000 - 0.7000") == 2


def test_errors_are_a_message_and_an_exit_code(monkeypatch: pytest.MonkeyPatch, composed_folder: Path):
    common = (composed_folder, "--include-path", TASKS, "--tasks")
    assert "--allow-code-execution" in run(*common, "humaneval_offline", code=1).stderr
    assert "no part 'x'" in run(*common, "sums", "--part", "x", code=1).stderr
    assert "No such option" in run(*common, "sums", "--nonsense", code=2).output
    assert "--device nowhere" in run(*common, "sums", "--part", "anchor", "--device", "nowhere", code=1).stderr
    run(composed_folder, code=2)
    run(*common, "sums", "--limit", 0, code=2)
    for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or "calm.evaluation" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert "pip install 'calm-lm[eval]'" in run(*common, "sums", code=1).stderr
