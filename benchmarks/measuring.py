"""What benchmarks share: runs that take turns, ratios with their spread, exact memory, hardware, and one table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"

console = Console(stderr=True)


@dataclass
class Result:
    """One comparison.

    Attributes:
        name: What is compared.
        composed: Of the composed model: median seconds, or bytes.
        reference: Of what it is compared with: median seconds, or bytes.
        unit: "s" or "bytes".
        ratio: Median over turns of composed by reference.
        spread: Quartiles of that ratio over turns, `[0.25, 0.75]`; equal where nothing varies.
        target: The ratio is to be at most this; `None` where it is only told.
        met: Whether it is.
        details: Whatever explains the numbers.
    """

    name: str
    composed: float
    reference: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    target: float | None
    met: bool | None = field(init=False)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.met = None if self.target is None else self.ratio <= self.target


def take_turns(name: str, runs: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Let functions take turns, in alternating order, so that whatever else the machine does hits all of them.

    Args:
        name: What the progress bar says.
        runs: The functions; each runs once before, to warm up.
        turns: How many turns.

    Returns:
        The seconds of each function, turn by turn.
    """
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for turn in track(range(turns), name, console=console):
        for key in list(runs) if turn % 2 else reversed(runs):
            start = time.perf_counter()
            runs[key]()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def compare_times(
    name: str, composed: list[float], reference: list[float], target: float | None, **details: Any
) -> Result:
    """Compare two lists of seconds turn by turn."""
    ratios = [a / b for a, b in zip(composed, reference, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Result(
        name,
        statistics.median(composed),
        statistics.median(reference),
        "s",
        median,
        (lower, upper),
        target,
        {
            "turns": len(ratios),
            "ratio_of_fastest": min(composed) / min(reference),
            "ratio_min_max": (min(ratios), max(ratios)),
            **details,
        },
    )


def compare_bytes(name: str, composed: int, reference: int, target: float, **details: Any) -> Result:
    """Compare two numbers of bytes, which do not vary."""
    ratio = composed / reference
    return Result(name, composed, reference, "bytes", ratio, (ratio, ratio), target, details)


def peak_bytes(run: Callable[[], None]) -> int:
    """Peak of the bytes that PyTorch's CPU allocator holds during a call, beyond what it held before.

    Not the peak of resident memory, which also counts what the C allocator keeps after it was freed: these are the
    tensors' own bytes, exact and the same each time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a model and its optimizer hold between two steps: weights, buffers and states, each once."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    # not model.parameters(), which a class may have overridden
    tensors = [*nn.Module.parameters(model), *nn.Module.buffers(model), *states]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def hardware() -> dict[str, Any]:
    """What it ran on. The load counts what else runs: above about 0.5 before the run, times are not to be trusted."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of installed packages."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}")
    staging.write_text(json.dumps(report, indent=2) + "\n")
    staging.replace(path)


def show(title: str, reference: str, results: list[Result]) -> None:
    """Print results as a table; `reference` heads the column of what the composed model is compared with."""
    table = Table(title=title)
    for column in ("", "composed", reference, "ratio", "quartiles", "target", "met"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for result in results:
        scale, unit = (1e3, "ms") if result.unit == "s" else (1e-6, "MB")
        table.add_row(
            result.name,
            f"{result.composed * scale:,.1f} {unit}",
            f"{result.reference * scale:,.1f} {unit}",
            f"{result.ratio:.4f}",
            f"{result.spread[0]:.4f}-{result.spread[1]:.4f}",
            "" if result.target is None else f"{result.target:.4f}",
            {True: "yes", False: "[bold red]no[/]", None: ""}[result.met],
        )
    Console(width=max(120, console.width)).print(table)
