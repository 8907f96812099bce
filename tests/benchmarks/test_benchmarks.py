"""The benchmarks of training and of GPUs run, on tiny models, and write what their readers look for."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import torch
import training
import typer
from training import Comparison

RATIOS = {
    Comparison.floor: {
        *("floor", "floor_with_connections", "floor_kept", "floor_kept_with_connections", "lora", "lora_kept")
    },
    Comparison.full: {"full_time", "full_memory"},
    Comparison.calm_pytorch: {"calm_pytorch_time", "calm_pytorch_memory"},
}


def report_of(folder: Path, name: str) -> dict:
    (path,) = folder.glob(f"*-{name}.json")
    return json.loads(path.read_text())


def test_training(tmp_path: Path) -> None:
    chosen = [Comparison.floor, Comparison.full, Comparison.scaling]
    training.main(chosen, quick=True, output=tmp_path)
    report = report_of(tmp_path, "training-floor-full-scaling-quick")
    assert set(report["ratios"]) == RATIOS[Comparison.floor] | RATIOS[Comparison.full]
    details = {result["name"]: result["details"] for result in report["results"]}
    lora = details["lora"]
    half_a_rank = lora["lora_parameters"] / lora["rank"] / 2
    assert abs(lora["lora_parameters"] - details["floor"]["composition_parameters"]) <= half_a_rank
    assert 1 < details["floor"]["ratio_of_flops"] < details["floor_kept"]["ratio_of_flops"] < 1.5
    assert 0.2 < report["ratios"]["full_memory"] < 0.9  # exact, so that no machine changes it
    plots = {"augmenting-models", "batch", "connections", "sequence-length"}
    assert {path.stem.partition("-quick-")[2] for path in tmp_path.glob("*.png")} == plots
    assert set(report["scaling"]["augmenting_models"]["line"]) >= {"slope", "r_squared", "slope_by_one"}
    assert not list(tmp_path.glob("*unfinished*"))


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(sizes: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(training.COMPARISONS, Comparison.floor, interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.main([Comparison.full, Comparison.floor], quick=True, output=tmp_path)
    assert set(report_of(tmp_path, "training-full-floor-quick.unfinished")["ratios"]) == RATIOS[Comparison.full]


def test_calm_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("CALM_pytorch", reason="of benchmarks/requirements.txt, which `make bench-training` installs")
    training.main([Comparison.calm_pytorch], quick=True, output=tmp_path)
    report = report_of(tmp_path, "training-calm-pytorch-quick")
    assert set(report["ratios"]) == RATIOS[Comparison.calm_pytorch]
    details = report["results"][0]["details"]
    for theirs, ours in (
        ("calm_pytorch_parameters", "parameters"),
        ("calm_pytorch_composition_parameters", "composition_parameters"),
    ):
        assert details[theirs] == pytest.approx(details[ours], rel=0.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        gpu.main(output=tmp_path)
    assert "There is no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path: Path) -> None:
    gpu.main([gpu.Pair.tiny], 64, 2, 4, device="cpu", tflops=1.0, gb_per_second=10.0, output=tmp_path)
    utilisation, memory, decoding = report_of(tmp_path, "gpu")["results"]
    assert utilisation["value"] == pytest.approx(
        utilisation["details"]["flops"] / utilisation["details"]["seconds"] / 1e12
    )
    assert 0.7 < memory["value"] < 1.3
    # in bfloat16: 256 x 64 embeddings, which are the anchor's head; 2 + 2 layers (4 x 64 x 64 and 3 x 64 x 256), norms;
    # 2 connections (5 x 64 x 64 and a gate, 64 + 1); keys and values of 64 tokens in 2 + 2 layers and 2 connections
    layers = 4 * (4 * 64 * 64 + 3 * 64 * 256 + 2 * 64) + 2 * 64
    read = 256 * 64 + layers + 2 * (5 * 64 * 64 + 64 + 1) + 6 * 2 * 64 * 64
    assert decoding["details"]["bytes_a_token"] == 2 * read
