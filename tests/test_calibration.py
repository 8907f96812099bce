"""Calibrations: what is measured and predicted, the file, and what is refused. How well they predict: benchmarks/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import Mix, config, patched, tokens
from transformers import GPT2Config, LlamaConfig
from typer.testing import CliRunner

import calm
from calm import calibration
from calm.calibration import Calibration, calibrate, load_calibration
from calm.cli import app
from calm.planning import plan
from calm.tracing import Operation, Trace, connections_in_float32, loss_of, shapes_only, update


@pytest.fixture(scope="module")
def measured() -> Calibration:
    """Of this machine, on two tiny pairs."""

    def pairs(scale: int) -> list[calibration.Pair]:
        llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
        llama.num_attention_heads = llama.num_key_value_heads = 4
        llama.head_dim = 8
        return [(llama, gpt2, 2, 24), (gpt2, llama, 1, 40)]

    with patched(calibration, _pairs=pairs, TURNS=2):
        return calibrate("float32", "cpu")


def by_hand(**changes: Any) -> Calibration:
    """A machine of 1 GFLOP/s and 1 GB/s, which takes a microsecond for each operation."""
    values = {
        "device": "cpu",
        "hardware": "made up",
        "threads": 1,
        "dtype": "float32",
        "versions": {},
        "date": "2026-01-01",
        "operations": {"mm float32": (0, 1e-9, 0), "product float32": (0, 2e-9, 0), "other float32": (0, 0, 1e-9)},
        "between": (1e-6, 0),
    }
    return Calibration(**values | changes)


def test_a_step_takes_what_its_operations_take() -> None:
    mm, addmm = (Operation(name, "float32", 1000, 10, 10) for name in ("mm", "addmm"))
    add = Operation("add", "bfloat16", 0, 500, 100)
    machine = by_hand()
    assert machine.seconds([mm]) == pytest.approx(1e-6 + 1000e-9)
    assert machine.seconds([addmm, add]) == pytest.approx(2e-6 + 2000e-9 + 500e-9)  # neither was measured itself
    assert by_hand(between=(0, 1e-9)).seconds([add]) == pytest.approx(500e-9 + 100e-9)


def test_costs_are_found_in_what_was_measured() -> None:
    amounts = [(1, flops, size) for flops in (10, 1000, 100_000) for size in (20, 3000)]
    fitted = calibration._fit(amounts, [2 + 3 * flops + 0.5 * size for _, flops, size in amounts])
    assert fitted == pytest.approx((2, 3, 0.5))
    fitted = calibration._fit(amounts, [3 * flops - 1 for _, flops, _ in amounts])
    assert fitted == pytest.approx((0, 3, 0), abs=0.3) and min(fitted) >= 0  # nothing costs less than nothing


def test_the_plan_predicts_time_from_it(measured: Calibration) -> None:
    assert measured.hardware and measured.threads == torch.get_num_threads() and measured.device == "cpu"
    assert {"mm float32", "addmm float32", "_fused_adamw_ float32", "product float32"} <= measured.operations.keys()
    arguments = {"sequence_length": 48, "batch_size": 2, "dtype": "float32"}
    llama, gpt2 = config("llama"), config("gpt2")
    planned = plan(llama, gpt2, 2, calibration=measured, **arguments)
    assert planned.hardware == measured.hardware
    assert planned.training_step_seconds is not None and 1e-4 < planned.training_step_seconds < 10
    longer = plan(llama, gpt2, 2, calibration=measured, **arguments | {"batch_size": 64})
    assert longer.training_step_seconds > planned.training_step_seconds
    # the time is that of the step's own operations: twice as slow a machine takes twice as long
    costs = {name: tuple(2 * cost for cost in of) for name, of in measured.operations.items()}
    slow = measured.model_copy(update={"operations": costs, "between": tuple(2 * cost for cost in measured.between)})
    again = plan(llama, gpt2, 2, calibration=slow, **arguments)
    assert again.training_step_seconds == pytest.approx(2 * planned.training_step_seconds)
    assert plan(llama, gpt2, 2, **arguments).training_step_seconds is None


@pytest.mark.parametrize(("anchor", "augmenting"), [("llama", "gpt2"), ("gemma3_text", "mixtral")])
def test_shapes_alone_give_the_operations_of_the_real_step(anchor: str, augmenting: str) -> None:
    """Same names, dtypes, FLOPs and bytes, in the same order; negative control: another batch has other ones."""

    def operations(model: calm.CalmForCausalLM, ids: torch.Tensor) -> list[Operation]:
        optimizer = connections_in_float32(model)
        with Trace() as trace:
            update(loss_of(model, ids), optimizer)
        return [operation for operation in trace.operations if operation.flops]

    def by_shapes(batch_size: int) -> list[Operation]:
        model = mix.build().to("meta")
        with shapes_only():
            return operations(model.to_empty(device="cpu"), torch.empty(batch_size, 24, dtype=torch.long))

    mix = Mix(anchor, (augmenting,), 2)
    found = operations(mix.build(), tokens(2, 24))
    assert by_shapes(2) == found
    assert by_shapes(3) != found


def test_a_file_keeps_it_whole(measured: Calibration, tmp_path: Path) -> None:
    measured.save(tmp_path / "speed.json")
    assert load_calibration(tmp_path / "speed.json") == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format_version=2), "format_version = 2"),
        (lambda values: values.update(device="tpu"), "device = 'tpu'.*'cpu' or 'cuda'"),
        (lambda values: values.update(dtype="int8"), "dtype = 'int8'"),
        (lambda values: values.pop("operations"), "operations: Field required"),
        (lambda values: values["operations"].pop("other float32"), "operations lack 'other float32'"),
        (lambda values: values["operations"].clear(), "operations lack 'product float32' and 'other float32'"),
        (lambda values: values.update(speed=1), "speed = 1: Extra"),
        (lambda values: values.update(between=[1.0, None]), "between.1: Input should be a valid number"),
    ],
)
def test_other_files_are_refused(change: Callable[[dict], Any], message: str, tmp_path: Path) -> None:
    values = json.loads(by_hand().model_dump_json())
    change(values)
    (tmp_path / "speed.json").write_text(json.dumps(values))
    with pytest.raises(calm.CalmError, match=f"(?s){message}.*--calibrate FILE"):
        load_calibration(tmp_path / "speed.json")


def test_what_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(calm.CalmError, match=r"missing.json' cannot be read"):
        load_calibration(tmp_path / "missing.json")
    (tmp_path / "speed.json").write_text("not JSON")
    with pytest.raises(calm.CalmError, match=r"no calibration that this version.*: the file: Invalid JSON"):
        load_calibration(tmp_path / "speed.json")
    with pytest.raises(calm.CalmError, match="cannot be written"):
        by_hand().save(tmp_path / "no" / "folder.json")
    with pytest.raises(calm.CalmError, match="dtype='bfloat16': the calibration of made up was measured in float32"):
        plan(config("llama"), config("llama"), 2, sequence_length=16, calibration=by_hand())
    with pytest.raises(calm.CalmError, match="dtype='int8': expected one of"):
        calibrate("int8")
    with pytest.raises(calm.CalmError, match="device='tpu': expected 'cpu'"):
        calibrate("float32", "tpu")


def test_the_command_line_measures_and_predicts(
    measured: Calibration, tiny_bases: dict[str, str], tmp_path: Path
) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["plan", *arguments])
        assert result.exit_code == code, result.output
        return result.output

    file = str(tmp_path / "speed.json")
    with patched(calibration, calibrate=lambda dtype: measured):
        assert json.loads(run("--calibrate", file, "--dtype", "float32", "--json"))["operations"]
    assert load_calibration(file) == measured
    models = [tiny_bases["anchor"], tiny_bases["augmenting"], "--connections", "2", "--dtype", "float32"]
    models += ["--sequence-length", "16"]
    planned = json.loads(run(*models, "--calibration", file, "--processes", "2", "--json"))
    assert planned["training_step_seconds"] > 0 and planned["hardware"] == measured.hardware
    assert planned["processes"] == 2 and planned["data_parallel_bytes"] > planned["training_bytes"]
    assert planned["checkpoint_bytes"] > planned["gradient_bytes"] and planned["sharded_bytes"] > 0
    assert sum(planned["training_step_flops_by_dtype"].values()) == planned["training_step_flops"]
    text = " ".join(run(*models, "--calibration", file, "--processes", "2", "--activation-checkpointing").split())
    assert "each of 2" in text and "FSDP2" in text
    assert "activation checkpointing)" in text
    for wrong in (
        [],
        ["--calibrate", str(tmp_path / "no" / "folder.json")],
        [tiny_bases["anchor"]],
        [*models, "--calibrate", file, "--calibration", file],
    ):
        assert "Usage" in run(*wrong, code=2)
