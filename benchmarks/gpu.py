"""What training and decoding reach of a GPU: FLOP utilisation, memory against `calm plan`, the memory-bandwidth bound.

Pairs of llamas with random weights in bfloat16, connections trained in float32 under autocast, as `calm.training` does
it with `bf16: true`. Targets are those of issue 3, "How it is measured"; see README.md beside this file.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, console, hardware, held_bytes, peak_bytes, take_turns, versions, write
from parts import Step, randomize_outputs
from random_models import llama_config
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM

import calm
from calm.cache import CalmCache
from calm.config import text_config
from calm.planning import Plan, plan

PACKAGES = ("calm-lm", "torch", "transformers")
CONNECTIONS = 4  # of pairs that have as many layers
WARM_UP = 3  # decoded tokens: compilation, and the recording of CUDA graphs

# Dense bfloat16 FLOP/s and bytes/s of memory, from NVIDIA's data sheets, by the name that the driver gives.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": (312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
}


class Pair(str, Enum):
    """Which models: anchor and augmenting model."""

    small = "1b"
    large = "7b"
    tiny = "tiny"


def configs(pair: Pair, tokens: int) -> tuple[Any, Any]:
    """Configurations of the anchor and of the augmenting model."""
    common = {"vocabulary": 32_000, "context": tokens}
    # few layers, which take long to compile on a CPU
    tiny = llama_config(width=64, layers=2, heads=4, vocabulary=256, context=tokens)
    billion = llama_config(width=2048, layers=16, heads=32, groups=8, inner=8192, **common)
    third = llama_config(width=1024, layers=16, heads=16, groups=8, inner=4096, **common)
    seven = llama_config(width=4096, layers=32, heads=32, inner=11_008, **common)
    return {Pair.tiny: (tiny, tiny), Pair.small: (billion, third), Pair.large: (seven, billion)}[pair]


@dataclass
class Reached:
    """What was reached.

    Attributes:
        name: Of what, and which pair.
        value: Share of what the hardware could do, or measured by planned bytes.
        at_least: What `value` is to be at least.
        at_most: What `value` is to be at most.
        met: Whether it is.
        details: Whatever explains the number.
    """

    name: str
    value: float
    at_least: float | None
    at_most: float | None
    met: bool = field(init=False)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = self.at_least or 0.0, self.at_most or float("inf")
        self.met = low <= self.value <= high


@dataclass(frozen=True)
class Machine:
    """What it runs on, with the FLOP/s and bytes/s that it has at most."""

    device: torch.device
    flops: float
    bandwidth: float

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, step: Step, run: Callable[[], None]) -> int:
        """Peak of the bytes of all tensors in a step."""
        step.optimizer.zero_grad()
        if self.device.type != "cuda":
            return held_bytes(step.model, step.optimizer) + peak_bytes(run)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)


def training(pair: Pair, model: calm.CalmForCausalLM, planned: Plan, machine: Machine, turns: int) -> list[Reached]:
    """FLOP utilisation of a training step on one row, and its peak memory against the plan."""
    vocabulary = model.config.anchor_config.vocab_size
    step = Step(model, torch.randint(0, vocabulary, (1, planned.sequence_length), device=machine.device))

    def run() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16):
            step.composed()
        machine.synchronize()

    seconds = statistics.median(take_turns(f"training {pair.value}", {"step": run}, turns)["step"])
    peak = machine.peak_bytes(step, run)
    reached = planned.training_step_flops / seconds
    return [
        Reached(
            f"{pair.value}: FLOP utilisation of a training step",
            reached / machine.flops,
            0.40,
            None,
            {"seconds": seconds, "flops": planned.training_step_flops, "flops_per_second": reached},
        ),
        Reached(
            f"{pair.value}: peak memory by the planned",
            peak / planned.training_bytes,
            0.85,
            1.15,
            {"peak_bytes": peak, "planned_bytes": planned.training_bytes},
        ),
    ]


@torch.no_grad()
def decoding(pair: Pair, model: calm.CalmForCausalLM, planned: Plan, machine: Machine, new_tokens: int) -> Reached:
    """Greedy decoding of one row to the end of a static cache, compiled, against reading what it has to read."""
    model.eval().to(torch.bfloat16)
    prompt = torch.randint(
        0,
        model.config.anchor_config.vocab_size,
        (1, planned.sequence_length - WARM_UP - new_tokens),
        device=machine.device,
    )
    cache = CalmCache.build(
        text_config(model.anchor.config),
        {name: text_config(base.config) for name, base in model.augmenting.items()},
        len(model.connections),
        max_length=planned.sequence_length,
    )
    token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def decode(count: int) -> float:
        nonlocal token
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        machine.synchronize()
        return (time.perf_counter() - start) / count

    console.print(f"decoding {pair.value}: compiling")
    decode(WARM_UP)
    seconds = decode(new_tokens)
    # of the anchor's embeddings all is read, since they are its head too; of an augmenting model's a row
    rows = sum(base.get_input_embeddings().weight.nbytes for base in model.augmenting.values())
    read = planned.weight_bytes - rows + planned.cache_bytes
    return Reached(
        f"{pair.value}: cached decoding, share of the memory bandwidth",
        read / seconds / machine.bandwidth,
        0.60,
        None,
        {"seconds_a_token": seconds, "bytes_a_token": read, "new_tokens": new_tokens},
    )


def measure(pair: Pair, machine: Machine, tokens: int, turns: int, new_tokens: int) -> list[Reached]:
    """Train and decode with one pair; says so if the GPU is too small for it."""
    anchor_config, augmenting_config = configs(pair, tokens)
    connections = min(CONNECTIONS, augmenting_config.num_hidden_layers)
    planned = plan(anchor_config, augmenting_config, connections, sequence_length=tokens, dtype="bfloat16")
    if machine.device.type == "cuda":
        memory = torch.cuda.get_device_properties(machine.device).total_memory
        if planned.training_bytes > memory:
            needs = f"needs {planned.training_bytes / 1e9:.1f} GB as planned"
            console.print(f"[bold red]{pair.value} is left out[/]: it {needs}, the GPU has {memory / 1e9:.1f} GB")
            return []
    torch.manual_seed(0)
    with machine.device:
        anchor = AutoModelForCausalLM.from_config(anchor_config, dtype=torch.bfloat16)
        augmenting = AutoModel.from_config(augmenting_config, dtype=torch.bfloat16)
    model = randomize_outputs(calm.compose(anchor, augmenting, connections))
    reached = training(pair, model, planned, machine, turns)
    model.zero_grad()
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return [*reached, decoding(pair, model, planned, machine, new_tokens)]


def show(title: str, reached: list[Reached]) -> None:
    table = Table("", "reached", "target", "met", title=title)
    for row in reached:
        bounds = [f"at least {row.at_least}" if row.at_least else "", f"at most {row.at_most}" if row.at_most else ""]
        table.add_row(
            row.name, f"{row.value:.3f}", ", ".join(filter(None, bounds)), "yes" if row.met else "[bold red]no[/]"
        )
    Console(width=max(120, console.width)).print(table)


def find_machine(device: str, tflops: float | None, gb_per_second: float | None) -> Machine:
    """The device and what it can do; ends the script, with the reason, if there is no such device or no such number."""
    if device == "cuda" and not torch.cuda.is_available():
        console.print(
            "[bold red]There is no GPU here[/]: torch sees no CUDA device, and nothing was measured. To see that the "
            "script runs: --pairs tiny --tokens 64 --new-tokens 8 --device cpu --tflops 1 --gb-per-second 10"
        )
        raise typer.Exit(1)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    known = PEAKS.get(name)
    if known is None and (tflops is None or gb_per_second is None):
        console.print(
            f"[bold red]{name!r} is not among the GPUs whose data sheet this script knows[/] ({', '.join(PEAKS)}): "
            "pass --tflops (dense, bfloat16) and --gb-per-second (memory bandwidth)."
        )
        raise typer.Exit(1)
    flops, bandwidth = known or (0.0, 0.0)
    return Machine(
        torch.device(device),
        flops if tflops is None else tflops * 1e12,
        bandwidth if gb_per_second is None else gb_per_second * 1e9,
    )


def main(
    pairs: Annotated[list[Pair], typer.Option(help="Which pairs.")] = [Pair.small, Pair.large],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=2, help="Length of a sequence, and of the static cache.")] = 4096,
    turns: Annotated[int, typer.Option(min=2, help="Training steps.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode, at the end of the cache.")] = 128,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    tflops: Annotated[float | None, typer.Option(help="Dense bfloat16 TFLOP/s at most.")] = None,
    gb_per_second: Annotated[float | None, typer.Option(help="Memory bandwidth in GB/s at most.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Measure what training and decoding reach of a GPU; write DATE-gpu.json."""
    if tokens <= WARM_UP + new_tokens:
        raise typer.BadParameter(f"{tokens} tokens leave no prompt: {WARM_UP} + {new_tokens} of them are decoded.")
    machine = find_machine(device, tflops, gb_per_second)
    now, start = datetime.now(timezone.utc), time.perf_counter()
    on_gpu = machine.device.type == "cuda"
    report: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "hardware": {
            **hardware(),
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "peak_flops": machine.flops,
            "peak_bandwidth": machine.bandwidth,
        },
        "versions": {**versions(PACKAGES), "cuda": torch.version.cuda},
        "settings": {
            "pairs": [pair.value for pair in pairs],
            "tokens": tokens,
            "batch_size": 1,
            "connections": CONNECTIONS,
            "dtype": "bfloat16",
        },
    }
    path = output / f"{now:%Y-%m-%d}-gpu.json"
    reached: list[Reached] = []
    for pair in pairs:
        reached += measure(pair, machine, tokens, turns, new_tokens)
        report["results"] = [asdict(row) for row in reached]
        report["seconds"] = round(time.perf_counter() - start)
        write(path, report)
    show(f"{report['hardware']['gpu'] or report['hardware']['cpu']}, {tokens} tokens, bfloat16", reached)
    console.print(f"{path} ({report['seconds']} s)")


if __name__ == "__main__":
    typer.run(main)
