"""`calm plan` against the real thing: what it predicts for six pairs, and what training them takes.

Parameters and checkpoint size are to be exact, FLOPs within 5%, peak memory within 15%, and the step's time, from a
calibration of this machine on other pairs, within 20% (issue 3). SmolLM2-135M with its own first half is real, the
others have random weights; memory is measured in bfloat16 too. A step is that of `calm.training`.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, console, hardware, held_bytes, peak_bytes, versions, write
from overhead import PACKAGES
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import calm
from calm import sources
from calm.backbones import truncate_config, truncated
from calm.calibration import DTYPES, Calibration, calibrate, load_calibration
from calm.experiments.checkpoints import SMOLLM2_135M
from calm.planning import Plan, plan
from calm.tracing import connections_in_float32, loss_of, update

TARGETS = {"parameters": 0.0, "checkpoint_bytes": 0.0, "step_flops": 0.05, "peak_bytes": 0.15, "step_seconds": 0.20}


@dataclass(frozen=True)
class Pair:
    """A composition to predict and to measure.

    Attributes:
        name: Anchor + augmenting model.
        anchor: Configuration of the anchor, or its GGUF file.
        augmenting: Configuration of the augmenting model; of a file, that of the anchor's first layers.
        connections: How many.
        batch_size: Sequences of a step.
        length: Tokens of each.
        dtypes: To measure memory in; time is measured in the first.
    """

    name: str
    anchor: PreTrainedConfig | Path
    augmenting: PreTrainedConfig
    connections: int
    batch_size: int
    length: int
    dtypes: tuple[str, ...] = ("float32",)


@dataclass(frozen=True)
class Result:
    """One number of one pair.

    Attributes:
        pair: Name of the pair.
        batch: Sequences x tokens.
        dtype: Of the bases.
        what: A key of `TARGETS`.
        predicted: By `calm plan`.
        measured: On the real composition.
        error: predicted / measured - 1.
        met: Whether its size is within the target.
    """

    pair: str
    batch: str
    dtype: str
    what: str
    predicted: float
    measured: float
    error: float
    met: bool


def pairs() -> Iterator[Pair]:
    """Six pairs that are none of the calibration's, two cores' worth of them."""

    def sizes(width: int, layers: int, heads: int, vocab_size: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads if heads % 2 else heads // 2,
            "head_dim": width // heads,
            "intermediate_size": width * 8 // 3 // 64 * 64,
            "vocab_size": vocab_size,
            "max_position_embeddings": 1024,
        }

    gpt2 = GPT2Config(n_embd=640, n_layer=8, n_head=10, vocab_size=16_384)
    windows = {"sliding_window": 64}
    half = sources.load_config(sources.Source.parse(SMOLLM2_135M.fetch()))
    truncate_config(half, 15)
    both = ("float32", "bfloat16")
    yield Pair(
        "llama + llama",
        LlamaConfig(**sizes(448, 6, 7, 20_000)),
        LlamaConfig(**sizes(256, 4, 4, 20_000)),
        *(3, 2, 256, both),
    )
    yield Pair("gpt2 + llama", gpt2, LlamaConfig(**sizes(320, 4, 5, 16_384)), 2, 8, 96)
    yield Pair(
        "gemma3 + gemma2",
        Gemma3TextConfig(**sizes(512, 6, 4, 32_000), **windows),
        Gemma2Config(**sizes(320, 4, 4, 32_000), **windows),
        *(2, 2, 320, both),
    )
    yield Pair(
        "qwen3 + mistral",
        Qwen3Config(**sizes(768, 8, 12, 12_000)),
        MistralConfig(**sizes(384, 6, 6, 12_000), sliding_window=None),
        *(4, 1, 448),
    )
    yield Pair(
        "mixtral + llama",
        MixtralConfig(**sizes(320, 4, 5, 16_384), num_local_experts=4),
        LlamaConfig(**sizes(256, 4, 4, 16_384)),
        *(2, 2, 192),
    )
    yield Pair("SmolLM2-135M + its first half", SMOLLM2_135M.fetch(), half, 4, 1, 512)


class Measured:
    """A pair's real composition, about to train."""

    def __init__(self, pair: Pair, dtype: str, device: str):
        torch.manual_seed(0)
        if isinstance(pair.anchor, Path):
            source = sources.Source.parse(pair.anchor)
            anchor = sources.load_anchor(source, sources.load_config(source), dtype=DTYPES[dtype])
            augmenting = copy.deepcopy(truncated(anchor, pair.augmenting.num_hidden_layers))
        else:
            anchor = AutoModelForCausalLM.from_config(pair.anchor, dtype=DTYPES[dtype])
            augmenting = AutoModel.from_config(pair.augmenting, dtype=DTYPES[dtype])
        self.model = calm.compose(anchor.to(device), augmenting.to(device), pair.connections)
        self.ids = torch.randint(pair.augmenting.vocab_size, (pair.batch_size, pair.length), device=device)
        self.optimizer = connections_in_float32(self.model)
        self.device = device

    def step(self) -> None:
        update(loss_of(self.model, self.ids), self.optimizer)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step_seconds(self, turns: int) -> list[float]:
        self.step()
        seconds = []
        for _ in range(turns):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def peak_bytes(self) -> int:
        """The most that training takes, weights and optimizer states included."""
        self.step()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        return held_bytes(self.model, self.optimizer) + peak_bytes(self.step)

    def step_flops(self) -> int:
        """Attention and experts spelled out as matrix products, which PyTorch's own counter knows."""
        for module in self.model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
                module.config._experts_implementation = "eager"
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def checkpoint_bytes(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def compare(pair: Pair, calibration: Calibration, device: str, turns: int) -> tuple[list[Result], dict[str, Any]]:
    """Predict and measure a pair."""
    results: list[Result] = []
    details: dict[str, Any] = {"pair": pair.name, "connections": pair.connections}
    for dtype in pair.dtypes:
        timed = dtype == calibration.dtype
        start = time.perf_counter()
        planned: Plan = plan(
            pair.anchor,
            pair.augmenting,
            pair.connections,
            sequence_length=pair.length,
            batch_size=pair.batch_size,
            dtype=dtype,
            calibration=calibration if timed else None,
        )
        details.setdefault("planning_seconds", time.perf_counter() - start)
        real = Measured(pair, dtype, device)
        numbers: dict[str, tuple[float, float]] = {"peak_bytes": (planned.training_bytes, real.peak_bytes())}
        if timed:
            seconds = real.step_seconds(turns)
            details["step_seconds"] = seconds
            assert planned.training_step_seconds is not None
            numbers["step_seconds"] = (planned.training_step_seconds, min(seconds))
            numbers["step_flops"] = (planned.training_step_flops, real.step_flops())
            numbers["parameters"] = (planned.total_parameters, real.model.get_nb_trainable_parameters()[1])
            numbers["checkpoint_bytes"] = (planned.checkpoint_bytes, real.checkpoint_bytes())
        for what, (predicted, measured) in numbers.items():
            error = predicted / measured - 1
            met = abs(error) <= TARGETS[what]
            batch = f"{pair.batch_size} x {pair.length}"
            results.append(Result(pair.name, batch, dtype, what, predicted, measured, error, met))
    return results, details


def show(results: list[Result], machine: dict[str, Any]) -> None:
    """Print the results as a table."""
    table = Table(title=f"calm plan: predicted and measured; {machine['cpu']}, {machine['threads']} threads")
    for column in ("pair", "batch", "dtype", "", "predicted", "measured", "error", "target", "met"):
        table.add_column(column, justify="left" if column in ("pair", "") else "right")
    for result in results:
        target, digits = TARGETS[result.what], 3 if result.what == "step_seconds" else 0
        table.add_row(
            *(result.pair, result.batch, result.dtype, result.what),
            f"{result.predicted:,.{digits}f}",
            f"{result.measured:,.{digits}f}",
            f"{result.error:+.2%}",
            f"{target:.0%}" if target else "exact",
            "yes" if result.met else "[bold red]no[/]",
        )
    Console(width=max(150, console.width)).print(table)


def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps to time; the shortest counts.")] = 7,
    calibration: Annotated[Path | None, typer.Option(help="One made before, instead of measuring now.")] = None,
    only: Annotated[str, typer.Option(help="Pairs whose name holds this.")] = "",
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Compare predictions with measurements; write DATE-planning.json."""
    now, machine, start = datetime.now(timezone.utc), hardware(), time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = load_calibration(calibration) if calibration else calibrate("float32", device)
    console.print(f"calibrated ({time.perf_counter() - start:.0f} s)")
    results: list[Result] = []
    details = []
    for pair in pairs():
        if only in pair.name:
            found, detail = compare(pair, speed, device, turns)
            results += found
            details.append(detail)
            console.print(pair.name, {f"{r.what} {r.dtype}": f"{r.error:+.2%}" for r in found})
    report = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/planning.py", *sys.argv[1:]]),
        "hardware": machine | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "versions": versions(PACKAGES),
        "settings": {"seed": 0, "turns": turns, "targets": TARGETS},
        "results": [asdict(result) for result in results],
        "details": details,
        "calibration": speed.model_dump(),
        "seconds": round(time.perf_counter() - start),
    }
    path = output / f"{now:%Y-%m-%d}-planning.json"
    write(path, report)
    show(results, machine)
    console.print(f"{path} ({report['seconds']} s)")


if __name__ == "__main__":
    typer.run(main)
