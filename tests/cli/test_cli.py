"""The command line: what it prints, its exit codes, JSON for programs, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from bases import byte_tokenizer, cache_as, sums, write_jsonl
from factories import open_gates
from typer.testing import CliRunner, Result

import calm
from calm import sources
from calm.cli import app, loading
from calm.cli.arguments import parse_augmenting, parse_connections
from calm.data import load_examples, load_tokenizer


def run(*arguments: str, stdin: str | None = None, code: int = 0) -> Result:
    """Runs a command in this process and checks its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result


def command(*arguments: Any, **options: Any) -> subprocess.Popen:
    """Starts a command as a process of its own."""
    line = [str(Path(sys.executable).with_name("calm")), *map(str, arguments)]

    def take_ctrl_c() -> None:  # which a shell keeps from what it runs in the background, these tests perhaps
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, text=True, preexec_fn=take_ctrl_c, **pipes, **options)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory, tiny_bases: dict[str, str]) -> Path:
    """A composition whose connections say something, saved by `calm compose`."""
    folder = tmp_path_factory.mktemp("composed") / "out"
    run("compose", tiny_bases["anchor"], tiny_bases["augmenting"], "--connections", "0:0,1:1", "--out", folder)
    model = calm.CalmForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    for connection in model.connections:
        torch.nn.init.normal_(connection.w_o.weight)
    open_gates(model).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tiny_bases: dict[str, str]) -> Path:
    """A recipe of four steps."""
    file = tmp_path / "recipe.yaml"
    data = {"train": str(write_jsonl(tmp_path / "train.jsonl", sums(16)))}
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_batch_size": 4, "save_steps": 2}
    file.write_text(yaml.safe_dump({**tiny_bases, "connections": 2, "data": data, "training": training}))
    return file


def expected(folder: Path, prompt: str, tokens: int, **options: Any) -> str:
    """What the composition answers, by way of the library."""
    model, tokenizer = calm.CalmForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    with model.composition_disabled() if options.pop("off", False) else torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["", "demo", "plan", "compose", "train", "generate", "chat", "evaluate", "inspect"])
def test_help_and_wrong_usage(name: str):
    assert "Usage: " in run(*name.split(), "--help").output
    assert "No such option" in run(*name.split(), "--nonsense", code=2).output


def test_connections_and_augmenting_models_are_parsed():
    assert parse_connections("4") == 4
    assert parse_connections("7:11,15:23") == [(7, 11), (15, 23)]
    assert parse_augmenting(["a/b"]) == "a/b"
    assert parse_augmenting(["x=a", "y=b/c=d"]) == {"x": "a", "y": "b/c=d"}
    assert parse_augmenting(["x=a"]) == {"x": "a"}
    assert parse_augmenting(["runs/lr=1e-3/model"]) == "runs/lr=1e-3/model"  # no name has a slash
    assert "7:11,15:23" in run("compose", "a", "b", "--out", "x", "--connections", "7-11", code=2).output
    for models in (["a", "b"], ["x=a", "x=b"], ["x=", "y=b"]):
        run("compose", "a", *models, "--out", "x", code=2)


def test_compose_saves_what_the_library_composes(tmp_path: Path, tiny_bases: dict[str, str]):
    out = tmp_path / "out"
    names = (f"one={tiny_bases['augmenting']}", f"two={tiny_bases['augmenting']}")
    result = run(
        "compose", tiny_bases["anchor"], *names, "--connections", "2", "--out", out, "--num-heads", 2, "--json"
    )
    printed = json.loads(result.stdout)
    assert printed["connections"] == [["one", 0, 0], ["one", 1, 1], ["two", 0, 0], ["two", 1, 1]]
    model = calm.CalmForCausalLM.from_pretrained(out)
    assert model.config.num_heads == 2
    assert printed["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    assert load_tokenizer(out).get_vocab() == load_tokenizer(tiny_bases["anchor"]).get_vocab()
    again = run("compose", tiny_bases["anchor"], tiny_bases["augmenting"], "--out", out, code=1)
    assert "already holds a model" in again.stderr


def test_compose_leaves_nothing_behind_where_the_anchor_has_no_tokenizer(tmp_path: Path, tiny_bases: dict[str, str]):
    anchor = shutil.copytree(tiny_bases["anchor"], tmp_path / "anchor")
    for file in anchor.glob("*token*"):
        file.unlink()
    arguments = ("compose", anchor, tiny_bases["augmenting"], "--connections", "1", "--out", tmp_path / "out")
    assert "no tokenizer was found" in run(*arguments, code=1).stderr
    assert not (tmp_path / "out").exists()
    assert "No usable configuration" in run("compose", "no", *arguments[2:], code=1).stderr, "not: no tokenizer"


def test_library_errors_are_a_message_and_code_1(tmp_path: Path, tiny_bases: dict[str, str]):
    """Also in a process of its own: the message is on standard error, without a stack trace."""
    arguments = (
        "compose",
        tiny_bases["anchor"],
        tiny_bases["augmenting"],
        "--out",
        tmp_path / "x",
        "--connections",
        "9",
    )
    assert "error: connections=9" in run(*arguments, code=1).stderr
    process = command(*arguments)
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert "error: connections=9" in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_generate_streams_and_batches_what_the_library_generates(composed: Path):
    answer = expected(composed, "1+2=", 8)
    assert answer != expected(composed, "1+2=", 8, off=True), "the composition changes the answer"
    streamed = run("generate", composed, "1+2=", "--max-new-tokens", 8).stdout
    assert streamed.rstrip("\n") == answer.rstrip("\n")
    for piped in ("1+2=", "1+2=\n"):  # as printf and as echo write it
        assert run("generate", composed, "-", "--max-new-tokens", 8, stdin=piped).stdout == streamed
    assert expected(composed, "1+2=\n", 8) != answer, "a newline would change the answer"
    prompts = ("1+2=", "a much longer prompt")
    batch = json.loads(run("generate", composed, *prompts, "--max-new-tokens", 8, "--json").stdout)
    assert batch == [{"prompt": p, "completion": expected(composed, p, 8)} for p in prompts]
    printed = run("generate", composed, *prompts, "--max-new-tokens", 8).stdout
    assert printed == "\n---\n".join(row["completion"] for row in batch) + "\n"


def test_what_was_composed_in_half_precision_generates(tmp_path: Path, tiny_bases: dict[str, str]):
    """Over bases that are stored in float32."""
    run("compose", *tiny_bases.values(), "--connections", 2, "--dtype", "bfloat16", "--out", tmp_path / "out")
    run("generate", tmp_path / "out", "1+2=", "--max-new-tokens", 2)


def test_generate_options(composed: Path):
    def generate(*options: Any) -> str:
        return json.loads(run("generate", composed, "1+2=", "--max-new-tokens", 8, "--json", *options).stdout)[0][
            "completion"
        ]

    assert generate("--off") == expected(composed, "1+2=", 8, off=True)
    assert generate("--num-beams", 3) == expected(composed, "1+2=", 8, num_beams=3)
    first, again, other = (generate("--temperature", 2, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
    assert generate("--temperature", 2, "--top-k", 1, "--seed", 3) == expected(composed, "1+2=", 8)


def test_no_defaults_of_a_model_come_in_between(composed: Path, tmp_path: Path):
    folder = shutil.copytree(composed, tmp_path / "copy")
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"encoder_repetition_penalty": 5.0}))
    assert expected(folder, "1+2=", 8) != expected(composed, "1+2=", 8), "control: it would change the answer"
    completion = run("generate", folder, "1+2=", "--max-new-tokens", 8).stdout
    assert completion == run("generate", composed, "1+2=", "--max-new-tokens", 8).stdout


def test_generate_errors(tmp_path: Path, composed: Path, tiny_bases: dict[str, str]):
    assert "prompt is empty" in run("generate", composed, "", code=1).stderr
    assert "prompt is empty" in run("generate", composed, "-", stdin="\n", code=1).stderr
    assert "context" in run("generate", composed, "x" * 70, code=1).stderr
    assert "not a composition" in run("generate", tiny_bases["anchor"], "x", code=1).stderr
    assert "error" in run("generate", tmp_path / "nowhere", "x", code=1).stderr
    run("generate", composed, code=2)
    run("generate", composed, "x", "--top-p", 2, code=2)


@pytest.mark.parametrize("device", ["foo", "mps:7", "meta"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_device_that_is_not_there_is_refused_before_loading(command: str, device: str, tmp_path: Path):
    prompt = ["x"] if command == "generate" else []
    error = run(command, tmp_path / "nowhere", *prompt, "--device", device, code=1).stderr
    assert f"--device {device}: PyTorch cannot compute on it here; expected cpu" in error


@pytest.mark.parametrize("line", [["generate", "m", "x"], ["chat", "m"], ["compose", "a", "b", "--out", "c"]])
def test_an_unknown_dtype_is_wrong_usage(line: list[str]):
    error = run(*line, "--dtype", "float8", code=2).stderr
    assert all(word in error for word in ("float8", "auto", "float32", "bfloat16", "float16"))


def test_generate_with_a_base_that_has_moved(tmp_path: Path, tiny_bases: dict[str, str]):
    anchor = shutil.copytree(tiny_bases["anchor"], tmp_path / "anchor")
    run("compose", anchor, tiny_bases["augmenting"], "--out", tmp_path / "out", "--connections", 1)
    before = run("generate", tmp_path / "out", "1+2=", "--max-new-tokens", 4).stdout
    anchor.rename(tmp_path / "moved")
    run("generate", tmp_path / "out", "1+2=", code=1)
    moved = run("generate", tmp_path / "out", "1+2=", "--max-new-tokens", 4, "--anchor", tmp_path / "moved").stdout
    assert moved == before


def test_the_tokenizer_of_an_anchor_that_has_moved(
    tmp_path: Path, tiny_bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """A composition without a tokenizer of its own; looked for before any weights are loaded."""
    anchor = shutil.copytree(tiny_bases["anchor"], tmp_path / "anchor")
    calm.compose(anchor, tiny_bases["augmenting"], 1).save_pretrained(tmp_path / "out")
    before = expected(tmp_path / "out", "1+2=", 4)
    anchor.rename(tmp_path / "moved")
    moved = ("--anchor", tmp_path / "moved")
    printed = run("generate", tmp_path / "out", "1+2=", "--max-new-tokens", 4, *moved).stdout
    assert printed.strip() == before.strip()
    for part in ("anchor", "augmenting"):
        _, tokenizer = loading.load_model(str(tmp_path / "out"), part, str(moved[1]), None, "auto", "cpu")
        assert tokenizer.get_vocab() == load_tokenizer(tiny_bases["anchor"]).get_vocab()

    for file in (tmp_path / "moved").glob("*token*"):
        file.unlink()
    monkeypatch.setattr(sources, "load_bases", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    error = run("generate", tmp_path / "out", "1+2=", *moved, code=1).stderr
    assert f"no tokenizer was found in '{tmp_path / 'out'}' or '{tmp_path / 'moved'}'" in " ".join(error.split())
    assert "not a composition" in run("generate", tmp_path / "moved", "x", code=1).stderr, "not: no tokenizer"


def test_chat_completes_lines_and_switches_the_composition(composed: Path):
    lines = "1+2=\n\n/off\n1+2=\n/on\n1+2=\n/what\n/quit\nnever read\n"
    printed = run("chat", composed, "--max-new-tokens", 8, stdin=lines).stdout
    on, off = expected(composed, "1+2=", 8).strip(), expected(composed, "1+2=", 8, off=True).strip()
    assert printed.count(on) == 2
    assert printed.count(off) == 1
    assert printed.count("/quit ends") == 2, "at the start, and after a command that there is not"
    run("chat", composed, stdin="")  # the end of input ends it, too


def test_chat_remembers_the_conversation_with_a_chat_template(tmp_path: Path, composed: Path):
    folder = shutil.copytree(composed, tmp_path / "chatty")
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    model = calm.CalmForCausalLM.from_pretrained(folder)
    answers = []
    for line in ("hi", "you", "hi"):
        if len(answers) == 2:
            messages = []
        messages = [*messages[:2], {"role": "user", "content": line}] if answers else messages
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert answers[0] == answers[2] != answers[1]
    printed = run("chat", folder, "--max-new-tokens", 5, stdin="hi\nyou\n/reset\nhi\n").stdout
    assert printed.count(answers[0].strip()) == 2
    assert printed.count(answers[1].strip()) == 1


def test_train_prints_the_result_and_resumes(recipe: Path):
    printed = run("train", recipe).stdout
    out = yaml.safe_load(recipe.read_text())["training"]["output_dir"]
    assert f"calm chat {out}" in printed
    assert "already holds a run's checkpoints" in run("train", recipe, code=1).stderr
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: 6"))
    result = run("train", recipe, "--resume", "--json")
    assert json.loads(result.stdout)["resumed_from"] == 4, "nothing but JSON on standard output"
    assert json.loads(result.stdout) == json.loads(Path(out, "training_log.json").read_text())["result"]


def test_train_errors_name_file_and_field(recipe: Path):
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: four"))
    error = run("train", recipe, code=1).stderr
    assert f"{recipe}: 1 problem" in error
    assert "training.max_steps = 'four': expected a whole number" in error
    run("train", code=2)


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(recipe: Path):
    recipe.write_text(recipe.read_text().replace("max_steps: 4", "max_steps: 20000"))
    out = Path(yaml.safe_load(recipe.read_text())["training"]["output_dir"])
    process = command("train", recipe, env=os.environ | {"TQDM_DISABLE": "1"})
    deadline = time.monotonic() + 200
    while not list(out.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"go on with: calm train {recipe} --resume" in err
    assert "Traceback" not in err
    last = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    assert f"interrupted at step {last} of 20000" in err
    assert not (out / "training_log.json").exists()
    recipe.write_text(recipe.read_text().replace("max_steps: 20000", f"max_steps: {last + 2}"))
    assert json.loads(run("train", recipe, "--resume", "--json").stdout)["resumed_from"] == last


def test_inspect_reads_the_files_only(tmp_path: Path, tiny_bases: dict[str, str]):
    anchor = shutil.copytree(tiny_bases["anchor"], tmp_path / "anchor")
    run("compose", anchor, tiny_bases["augmenting"], "--out", tmp_path / "out", "--connections", "0:1")
    count = calm.CalmForCausalLM.from_pretrained(tmp_path / "out").get_nb_trainable_parameters()[0]
    shutil.rmtree(anchor)
    shown = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert shown["composition_parameters"] == count
    assert shown["connections"] == [{"augmenting": "augmenting", "augmenting_layer": 0, "anchor_layer": 1}]
    assert shown["training"] is None
    assert f"{count:,}" in run("inspect", tmp_path / "out").stdout
    os.truncate(tmp_path / "out" / "model.safetensors", 100)
    assert "corrupted" in run("inspect", tmp_path / "out", code=1).stderr
    assert "no composition" in run("inspect", tmp_path / "nowhere", code=1).stderr


def test_inspect_finds_the_weights_of_a_hub_name(composed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    count = json.loads(run("inspect", composed, "--json").stdout)["composition_parameters"]
    cache_as("me/composed", composed, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert json.loads(run("inspect", "me/composed", "--json").stdout)["composition_parameters"] == count > 0


def test_inspect_shows_the_training(recipe: Path):
    run("train", recipe)
    out = yaml.safe_load(recipe.read_text())["training"]["output_dir"]
    assert json.loads(run("inspect", out, "--json").stdout)["training"]["steps"] == 4
    Path(out, "training_log.json").write_text("[]")
    assert "training_log.json is no log of a training, or a damaged one" in run("inspect", out, code=1).stderr


def test_a_path_is_printed_as_it_is_written(recipe: Path, tmp_path: Path, tiny_bases: dict[str, str]):
    """Square brackets are markup to rich, and those of what it takes for a closing tag an error."""
    out = tmp_path / "runs[bold]" / "x[" / "a]"
    arguments = ("compose", tiny_bases["anchor"], tiny_bases["augmenting"], "--out", out, "--connections", "1")
    assert f"saved to {out}" in run(*arguments).stdout
    moved = shutil.copytree(tiny_bases["anchor"], tmp_path / "[dim]anchor")
    run("compose", moved, tiny_bases["augmenting"], "--out", tmp_path / "other", "--connections", "1")
    assert str(moved) in "".join(run("inspect", tmp_path / "other").stdout.split())  # however it is wrapped
    fields = yaml.safe_load(recipe.read_text())
    fields["training"]["output_dir"] = str(tmp_path / "[/trained]")
    recipe.write_text(yaml.safe_dump(fields))
    assert f"calm chat {tmp_path / '[/trained]'}" in run("train", recipe).stdout


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m", "prompt"),
        ("chat", "m"),
        ("rehearse", "m", "--number", "1"),
        ("compose", "a", "b", "--out", "c"),
        ("evaluate", "m", "--tasks", "t"),
        ("reproduce", "code"),
        ("demo",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_seed_that_is_none_is_refused_before_any_work(arguments: tuple[str, ...], seed: int):
    shown = run(*arguments, "--seed", seed, code=2).output
    assert "'--seed': Input should be" in shown and ("4294967295" if seed > 0 else "equal to 0") in shown


def test_inspect_with_prompts_writes_pages_and_pictures(composed: Path, tmp_path: Path):
    arguments = (
        "inspect",
        composed,
        "--prompt",
        "1+2=",
        "--prompt",
        "<b>",
        "--max-new-tokens",
        4,
        "--output",
        tmp_path,
    )
    reports = json.loads(run(*arguments, "--json").stdout)
    assert [report["prompt"] for report in reports] == ["1+2=", "<b>"]
    assert reports[0]["completion"] == load_tokenizer(composed).decode(produced(composed, "1+2=", 4))
    assert [row["name"] for row in reports[0]["connections"][:-1]] == ["augmenting 0 → 0", "augmenting 1 → 1"]
    assert all(row["moved"] > 0 for report in reports for row in report["connections"])
    written = [Path(file) for report in reports for file in (report["page"], *report["pictures"])]
    assert sorted(written) == sorted(tmp_path.iterdir()) and len(written) == 2 * (1 + 2 + 2)
    shown = run(*arguments).stdout
    assert "prompt-2.html" in shown and f"{reports[0]['connections'][0]['injection']:.2f}" in shown


def produced(folder: Path, prompt: str, tokens: int) -> list[int]:
    """What the composition continues with, special tokens included."""
    model, inputs = calm.CalmForCausalLM.from_pretrained(folder), load_tokenizer(folder)(prompt, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()


def test_inspect_refuses_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nowhere = ("inspect", tmp_path / "nowhere", "--prompt")
    assert "give a --prompt" in run("inspect", tmp_path, "--output", tmp_path, code=2).output
    assert "a prompt is empty" in run(*nowhere, "", "--output", tmp_path, code=1).stderr
    (tmp_path / "file").touch()
    assert "cannot be written to" in run(*nowhere, "x", "--output", tmp_path / "file", code=1).stderr
    for module in ("calm.inspection.report", "calm.inspection.pictures"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("calm.inspection.report", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "calm-lm[train]" in run(*nowhere, "x", "--output", tmp_path, code=1).stderr


def test_plan_reads_configurations_only(tmp_path: Path, tiny_bases: dict[str, str]):
    for name, folder in tiny_bases.items():
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(folder, file), tmp_path / name)
    arguments = (
        "plan",
        tmp_path / "anchor",
        tmp_path / "augmenting",
        "--connections",
        "0:0,1:1",
        "--sequence-length",
        32,
    )
    planned = run(*arguments, "--json").stdout
    out = tmp_path / "out"
    run("compose", *tiny_bases.values(), "--connections", "0:0,1:1", "--out", out)
    count = json.loads(run("inspect", out, "--json").stdout)["composition_parameters"]
    assert str(count) in json.dumps(json.loads(planned))
    assert f"{count:,}" in run(*arguments).stdout


def test_rehearse_writes_lines_for_a_training_file(composed: Path, tiny_bases: dict[str, str], tmp_path: Path):
    arguments = ("rehearse", tiny_bases["anchor"], "--number", 5, "--max-new-tokens", 12, "--batch-size", 4)
    written = run(*arguments).stdout
    assert written == run(*arguments).stdout != run(*arguments, "--seed", 1).stdout
    (tmp_path / "train.jsonl").write_text(written)
    rows = load_examples(tmp_path / "train.jsonl", load_tokenizer(tiny_bases["anchor"]), max_length=64)
    assert len(rows) == 5 and all(len(row["input_ids"]) > 2 for row in rows)
    assert "is a composition; name its anchor" in run("rehearse", composed, "--number", 1, code=1).stderr


def test_demo_runs_the_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls: list[dict[str, Any]] = []
    module = ModuleType("calm.experiments.key_value_arithmetic.run")
    module.main = lambda **arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run("demo", "--seed", 3, "--out", tmp_path)
    assert calls == [{"preset": "demo", "seed": 3, "output_dir": tmp_path}]
