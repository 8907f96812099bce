"""The example configurations: accelerate reads them, and what they start on two CPU processes trains as one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from bases import byte_tokenizer, save_base, sums, write_jsonl
from safetensors.torch import load_file

from calm.errors import CalmError
from calm.training import trainer
from calm.training.recipe import check_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGURATIONS = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
WORKER = Path(__file__).with_name("accelerate_worker.py")
CALM = Path(sys.executable).with_name("calm")


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_accelerate_reads_the_examples(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown keys are errors of accelerate's."""
    monkeypatch.chdir(EXAMPLES.parent)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "--no_python", "calm", "train", "x"])
    arguments, _, _ = _validate_launch_command(arguments)
    nodes = 2 if file.stem.endswith("nodes") else 1
    assert (arguments.num_machines, arguments.num_processes) == (nodes, 8 * nodes)
    assert f"--config_file examples/accelerate/{file.name} " in file.read_text(), "the command that it names"
    assert arguments.mixed_precision == "no", "the recipe decides"
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (file.stem.startswith("fsdp2"), file.stem == "zero3")
    if arguments.use_fsdp:
        for name, value in prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    if arguments.use_deepspeed:
        config = HfDeepSpeedConfig(arguments.deepspeed_config_file)
        assert config.is_zero3() and not config.is_offload()
        # the Trainer would fill these in by the width of the model, and a composition has several
        assert not any(key.endswith(("bucket_size", "threshold")) for key in config.config["zero_optimization"])


def test_the_documentation_names_every_example() -> None:
    text = (EXAMPLES.parent / "docs" / "training.md").read_text()
    assert [file.name for file in CONFIGURATIONS if f"examples/accelerate/{file.name}" not in text] == []


Launch = Callable[..., dict[tuple[str, int], float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    for seed, role in enumerate(("anchor", "augmenting")):
        save_base(folder / role, byte_tokenizer(), seed=seed, attention_dropout=0.0)
    for name, count in (("train", 22), ("eval", 5)):
        write_jsonl(folder / f"{name}.jsonl", sums(count, seed=count))
    return folder


def calm_train(folder: Path, out: str, *launcher: str, processes: int = 1, resume: bool = False, **top: Any) -> str:
    """`calm train`, eight steps of four examples; its output."""
    training = {
        "output_dir": str(folder / out),
        "max_steps": 8,
        "per_device_batch_size": 1,
        "gradient_accumulation": 4 // processes,
        "log_steps": 1,
        "eval_steps": 4,
        "learning_rate": 1e-2,
    }
    bases = {role: str(folder / role) for role in ("anchor", "augmenting")}
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")}
    recipe = folder / f"{out}.yaml"
    recipe.write_text(yaml.safe_dump({**bases, "connections": 2, "data": data, "training": training} | top))
    command = [*(launcher or (str(CALM),)), "train", str(recipe), *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env=environment, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launcher(file: Path, *program: str) -> list[str]:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*accelerate, "--num_processes", "2", "--main_process_port", "0", *program]


def history(folder: Path) -> dict[tuple[str, int], float]:
    logs = json.loads((folder / "training_log.json").read_text())["history"]
    return {(key, log["step"]): log[key] for log in logs for key in ("loss", "grad_norm", "eval_loss") if key in log}


def back_to_the_middle(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "training_log.json").unlink()
    assert (folder / "checkpoint-4").is_dir()


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[tuple[str, int], float]:
    """What one process logs."""
    calm_train(folder, "one")
    expected = history(folder / "one")
    assert len(expected) == 8 + 8 + 2
    return expected


def statistics(folder: Path) -> dict[tuple[str, int], float]:
    """What each connection was measured to do, on the first process's last batch of a step."""
    logs = json.loads((folder / "training_log.json").read_text())["history"]
    measured = [f"connection_{index}/{name}" for index in (0, 1) for name in ("gate", "injection", "entropy")]
    return {(key, log["step"]): log[key] for log in logs if "loss" in log for key in measured}


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[tuple[str, int], float]:
    """What two processes measure whose weights are whole."""
    said = calm_train(folder, "ddp", *launcher(EXAMPLES / "accelerate/ddp.yaml", "--no_python", str(CALM)), processes=2)
    assert said.count("done after 8 steps") == said.count("try it: calm chat") == 1, "the first process speaks"
    expected = statistics(folder / "ddp")
    assert len(expected) == 8 * 6
    assert min(expected[f"connection_{index}/{name}", 8] for index in (0, 1) for name in ("gate", "injection")) > 0.1
    return expected


def assert_same_as_one(folder: Path, out: str, one: dict[tuple[str, int], float]) -> None:
    assert history(folder / out) == pytest.approx(one, rel=1e-4)
    weights, expected = (load_file(folder / name / "model.safetensors") for name in (out, "one"))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_data_parallel(folder: Path, one: dict[tuple[str, int], float], two: dict[tuple[str, int], float]) -> None:
    assert_same_as_one(folder, "ddp", one)


@pytest.mark.slow
def test_fsdp2_and_its_checkpoints(
    folder: Path, one: dict[tuple[str, int], float], two: dict[tuple[str, int], float]
) -> None:
    """Its checkpoints are those of any run: one process goes on from them, and it goes on from one process'."""
    fsdp2 = launcher(EXAMPLES / "accelerate/fsdp2.yaml", str(WORKER))
    calm_train(folder, "fsdp2", *fsdp2, processes=2)
    assert_same_as_one(folder, "fsdp2", one)
    assert statistics(folder / "fsdp2") == pytest.approx(two, rel=1e-3, abs=1e-4)
    shutil.copytree(folder / "one", folder / "single")
    files, of_one = ({path.name for path in (folder / out / "checkpoint-8").iterdir()} for out in ("fsdp2", "single"))
    assert files - {"rng_state_0.pth", "rng_state_1.pth"} == of_one - {"rng_state.pth"}
    for out, launched, processes in (("fsdp2", (), 1), ("single", fsdp2, 2)):
        back_to_the_middle(folder / out)
        calm_train(folder, out, *launched, processes=processes, resume=True)
        assert_same_as_one(folder, out, one)


@pytest.mark.slow
def test_fsdp2_resumes_with_connections_in_float32(folder: Path) -> None:
    """Beside bases in bfloat16, to which loading a composition rounds the connections."""
    fsdp2 = launcher(EXAMPLES / "accelerate/fsdp2.yaml", str(WORKER))
    calm_train(folder, "rounded", *fsdp2, processes=2, dtype="bfloat16")
    before, expected = history(folder / "rounded"), load_file(folder / "rounded/checkpoint-8/model.safetensors")
    back_to_the_middle(folder / "rounded")
    calm_train(folder, "rounded", *fsdp2, processes=2, resume=True, dtype="bfloat16")
    assert history(folder / "rounded") == before
    found = load_file(folder / "rounded/checkpoint-8/model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.slow
def test_zero3_and_its_checkpoints(
    folder: Path,
    one: dict[tuple[str, int], float],
    two: dict[tuple[str, int], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With small weights sharded, too, which DeepSpeed would leave whole."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = json.loads((EXAMPLES / "deepspeed/zero3.json").read_text())
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    text = (EXAMPLES / "accelerate/zero3.yaml").read_text()
    (tmp_path / "zero3.yaml").write_text(text.replace("examples/deepspeed/zero3.json", str(tmp_path / "zero3.json")))
    zero3 = launcher(tmp_path / "zero3.yaml", "--no_python", str(CALM))
    calm_train(folder, "zero3", *zero3, processes=2)
    assert_same_as_one(folder, "zero3", one)
    assert statistics(folder / "zero3") == pytest.approx(two, rel=1e-3, abs=1e-4)
    bases = sum(path.stat().st_size for role in ("anchor", "augmenting") for path in (folder / role).glob("model*"))
    states = list((folder / "zero3/checkpoint-8").rglob("*model_states.pt"))
    assert len(states) == 2 and sum(path.stat().st_size for path in states) < bases / 2, "without the frozen models"
    back_to_the_middle(folder / "zero3")
    calm_train(folder, "zero3", *zero3, processes=2, resume=True)
    assert_same_as_one(folder, "zero3", one)


def test_launches_that_cannot_work_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {
        "anchor": str(folder / "anchor"),
        "augmenting": str(folder / "augmenting"),
        "data": {"train": str(folder / "train.jsonl")},
        "training": {"output_dir": str(tmp_path / "out")},
    }
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_fsdp_enabled", lambda: True)
        with pytest.raises(CalmError, match=r"fsdp_cpu_ram_efficient_loading = true: .*set it to false"):
            trainer.train(check_recipe(fields))
    for engine in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{engine}", "true")
            with pytest.raises(CalmError, match=r"quantization = 'int8': FSDP and DeepSpeed cannot shard.*nf4"):
                trainer._check_launch(check_recipe(fields | {"quantization": "int8"}))
