"""Two processes (gloo, on the CPU) train what one process trains: data parallel, sharded, and resumed as the other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import factories
import psutil
import pytest
import torch
import yaml
from bases import byte_tokenizer, save_base, sums, write_jsonl
from safetensors.torch import load_file

import calm

pytestmark = pytest.mark.slow


def launch(processes: int, *command: str) -> str:
    """Run a command with torchrun; its output."""
    started = start(processes, *command)
    out, err = started.communicate(timeout=600)
    assert started.returncode == 0, out + err
    return out


def start(processes: int, *command: str) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*torchrun, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """12 steps of 4 examples, which do not fill the last batches; no dropout: random states are each process's own."""
    bases = {
        role: str(save_base(tmp_path / role, byte_tokenizer(), seed=seed, attention_dropout=0.0))
        for seed, role in enumerate(("anchor", "augmenting"))
    }
    data = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", sums(count, seed=count)))
        for name, count in (("train", 21), ("eval", 5))
    }
    training = {
        "max_steps": 12,
        "per_device_batch_size": 2,
        "log_steps": 1,
        "eval_steps": 4,
        "save_steps": 4,
        "learning_rate": 1e-2,
    }
    return {**bases, "connections": 2, "data": data, "training": training}


def calm_train(recipe: dict[str, Any], folder: Path, processes: int) -> list[str]:
    """The command `calm train`, for four examples a step in that many processes."""
    training = recipe["training"]
    accumulation = 4 // processes // training["per_device_batch_size"]
    recipe = recipe | {"training": training | {"output_dir": str(folder), "gradient_accumulation": accumulation}}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    return ["--no-python", str(Path(sys.executable).with_name("calm")), "train", str(file)]


def train(recipe: dict[str, Any], folder: Path, processes: int, *options: str) -> None:
    launch(processes, *calm_train(recipe, folder, processes), *options)


def history(folder: Path) -> dict[tuple[str, int], float]:
    logs = json.loads((folder / "training_log.json").read_text())["history"]
    return {(key, log["step"]): log[key] for log in logs for key in ("loss", "grad_norm", "eval_loss") if key in log}


def test_data_parallel_training_is_that_of_one_process(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Losses, gradients and weights; then either goes on from the other's checkpoint."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe, one, 1)
    train(recipe, two, 2)
    expected = history(one)
    assert len(expected) == 12 + 12 + 3
    assert history(two) == pytest.approx(expected, rel=1e-4)
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-4)
    assert not list(two.rglob("training_args.bin")), "a pickle"

    for folder, processes in ((one, 2), (two, 1)):
        shutil.rmtree(folder / "checkpoint-12")
        (folder / "training_log.json").unlink()
        train(recipe, folder, processes, "--resume")
        assert history(folder) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_has_all_save_and_stop(
    recipe: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    recipe["training"] |= {"max_steps": 20000}
    started = start(2, *calm_train(recipe, out, 2))
    agent = psutil.Process(started.pid)
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("checkpoint-*")):
            assert started.poll() is None, started.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        next(worker for worker in agent.children() if worker.environ()["RANK"] == "1").send_signal(number)
        _, err = started.communicate(timeout=120)
    finally:
        for process in (*agent.children(), agent) if agent.is_running() else ():
            process.kill()
    last = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    assert f"interrupted at step {last} of 20000" in err
    recipe["training"] |= {"max_steps": last + 1}
    train(recipe, out, 2, "--resume")
    assert history(out)["loss", last + 1] > 0


def test_one_example_on_two_processes(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"] = dict.fromkeys(("train", "eval"), str(write_jsonl(tmp_path / "single.jsonl", sums(1))))
    recipe["training"] = {"max_steps": 2, "per_device_batch_size": 1, "log_steps": 1, "eval_steps": 1}
    train(recipe, tmp_path / "one", 1)
    train(recipe, tmp_path / "two", 2)
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_keep_the_augmenting_outputs_together(
    recipe: dict[str, Any], tmp_path: Path, packing: bool
) -> None:
    """Rows that fill up batches have theirs, too."""
    recipe["data"] |= {"packing": packing, "max_length": 24}
    recipe["training"] |= {"max_steps": 8}
    train(recipe, tmp_path / "one", 1)
    recipe["data"] |= {"augmenting_outputs": "disk", "augmenting_outputs_dir": str(tmp_path / "kept")}
    for folder in (tmp_path / "two", tmp_path / "again"):  # which finds them
        train(recipe, folder, 2)
        assert history(folder) == pytest.approx(history(tmp_path / "one"), rel=1e-4)
    assert sorted(len(path.name) for path in (tmp_path / "kept").iterdir()) == [32, 32], "keys, and nothing unfinished"


def test_quantized_bases_on_two_processes(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Which torchao's weights, unlike others, cannot be sent from one process to another."""
    recipe["quantization"] = "int8"
    recipe["training"] |= {"max_steps": 4}
    train(recipe, tmp_path / "one", 1)
    train(recipe, tmp_path / "two", 2)
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)


def test_fully_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    """FSDP2 itself, since accelerate falls back to data parallel on a CPU; the checkpoint comes out whole."""
    mix = factories.Mix(anchor="llama", augmenting=("gemma3_text", "gpt2"))
    for name, base in {"anchor": mix.anchor_model(), **mix.augmenting_models()}.items():
        base.save_pretrained(tmp_path / name)
    names = {name: tmp_path / name for name in mix.augmenting_models()}
    model = factories.perturb(calm.compose(tmp_path / "anchor", names, 2)).train()
    model.save_pretrained(tmp_path / "composed")
    ids = factories.tokens(4, 9)
    model(ids, labels=ids, skip_logits=True).loss.backward()
    gradients = {name: weight.grad for name, weight in model.connections.named_parameters()}
    launch(2, str(Path(__file__).with_name("fsdp_worker.py")), str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        factories.assert_same(found[name], gradient)

    optimizer = torch.optim.AdamW(model.connections.parameters(), lr=1e-2)
    optimizer.step()
    sharded = calm.CalmForCausalLM.from_pretrained(tmp_path / "sharded")
    assert set(load_file(tmp_path / "sharded" / "model.safetensors")) == {f"connections.{name}" for name in gradients}
    for name, weight in sharded.connections.named_parameters():
        torch.testing.assert_close(weight, model.connections.get_parameter(name), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        factories.assert_same(sharded(ids).logits, model.eval()(ids).logits, 3e-3)
