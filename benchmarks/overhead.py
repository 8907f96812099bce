"""What composition costs beyond its parts: time, memory and checkpoint size, composed against parts in one run.

The anchor is SmolLM2-135M; the specialist is a copy of its own first half (same tokenizer, weights of its own), joined
by connections at a uniform gap. Composed and parts take turns on one machine, so that what else the machine does hits
both, and a ratio is the median over turns. Targets are those of issue 2, section 5; see README.md beside this file.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from real_models import SMOLLM2_135M
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import calm
from calm import sources
from calm.backbones import layers_of, truncated
from calm.planning import plan

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("calm-lm", "torch", "transformers", "safetensors")
CHECKPOINT_ALLOWANCE = 16 * 1024  # bytes, issue 2

console = Console(stderr=True)


@dataclass
class Result:
    """One comparison.

    Attributes:
        name: What is compared.
        composed: Of the composed model: median seconds, or bytes.
        parts: Of its parts on their own: median seconds, or bytes.
        unit: "s" or "bytes".
        ratio: Median over turns of composed by parts.
        spread: Quartiles of that ratio over turns, `[0.25, 0.75]`; equal where nothing varies.
        target: The ratio is to be at most this.
        met: Whether it is.
        details: Whatever explains the numbers.
    """

    name: str
    composed: float
    parts: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    target: float
    met: bool = field(init=False)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.met = self.ratio <= self.target


class Bench:
    """The composed model, and its parts run on their own: the same modules, so that weights are the same.

    Args:
        specialist_layers: How many of SmolLM2's layers the specialist has.
        connections: How many connections.
        tokens: Length of the sequence of a forward pass or training step; decoding starts after as many.
    """

    def __init__(self, specialist_layers: int, connections: int, tokens: int):
        torch.manual_seed(0)
        anchor = sources.Source.parse(SMOLLM2_135M.fetch())
        anchor_model = sources.load_anchor(anchor, sources.load_config(anchor), dtype=torch.float32)
        specialist = copy.deepcopy(truncated(anchor_model, specialist_layers))
        self.model = calm.compose(anchor_model, specialist, connections)
        for connection in self.model.connections:  # as after training: nothing is multiplied by zeros
            torch.nn.init.normal_(connection.w_o.weight, std=1e-3)
        self.anchor, self.augmenting = self.model.anchor, self.model.augmenting["augmenting"]
        self.first_connected = layers_of(self.anchor)[min(pair.anchor_layer for pair in self.model.config.layer_pairs)]
        self.plan = plan(anchor_model, specialist, connections, sequence_length=tokens, dtype="float32")
        self.ids = torch.randint(0, self.anchor.config.vocab_size, (1, tokens))
        self.optimizer = torch.optim.AdamW(self.model.connections.parameters(), lr=1e-6)

    @torch.no_grad()
    def composed_forward(self) -> None:
        self.model.eval()(self.ids, use_cache=False)

    @torch.no_grad()
    def parts_forward(self) -> None:
        self.augmenting(self.ids, use_cache=False)
        self.anchor.eval()(self.ids, use_cache=False)

    def composed_step(self) -> None:
        self.optimizer.zero_grad()
        self.model.train()(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()

    def parts_step(self) -> None:
        """The augmenting model forward; the anchor forward, and backward to the output of the first connected layer."""
        with torch.no_grad():
            self.augmenting(self.ids, use_cache=False)
        with self.gradients_start_at_first_connected():
            self.anchor.train()(self.ids, labels=self.ids, use_cache=False).loss.backward()

    @contextmanager
    def gradients_start_at_first_connected(self) -> Any:
        hook = self.first_connected.register_forward_hook(lambda layer, args, out: out.detach().requires_grad_())
        try:
            yield
        finally:
            hook.remove()

    def decoders(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Two functions that decode one more token each, after the sequence, composed and in parts."""
        self.model.eval()
        token = self.ids[:, :1]
        with torch.no_grad():
            cache = self.model(self.ids, use_cache=True).past_key_values
            anchor_cache = DynamicCache(config=self.anchor.config)
            augmenting_cache = DynamicCache(config=self.augmenting.config)
            self.anchor(self.ids, past_key_values=anchor_cache)
            self.augmenting(self.ids, past_key_values=augmenting_cache)

        @torch.no_grad()
        def composed() -> None:
            self.model(token, past_key_values=cache, use_cache=True)

        @torch.no_grad()
        def parts() -> None:
            self.augmenting(token, past_key_values=augmenting_cache, use_cache=True)
            self.anchor(token, past_key_values=anchor_cache, use_cache=True)

        return composed, parts


def timed(
    name: str, composed: Callable[[], None], parts: Callable[[], None], turns: int, target: float, **details: Any
) -> Result:
    """Let two functions take turns, in alternating order, and compare their times turn by turn."""
    seconds: dict[Callable[[], None], list[float]] = {composed: [], parts: []}
    for run in (composed, parts):  # warm-up
        run()
    for turn in track(range(turns), name, console=console):
        for run in (composed, parts) if turn % 2 else (parts, composed):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds[composed], seconds[parts], strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Result(
        name,
        statistics.median(seconds[composed]),
        statistics.median(seconds[parts]),
        "s",
        median,
        (lower, upper),
        target,
        {
            "turns": turns,
            "ratio_of_fastest": min(seconds[composed]) / min(seconds[parts]),
            "ratio_min_max": (min(ratios), max(ratios)),
            **details,
        },
    )


def memory(bench: Bench) -> Result:
    """Compare what composing adds to the peak of a training step with what connections cannot do without."""
    bench.composed_step()  # the optimizer's states exist from here on
    bench.optimizer.zero_grad()
    trained = sum(weight.nbytes for weight in bench.model.connections.parameters())
    states = sum(t.nbytes for s in bench.optimizer.state.values() for t in s.values() if t.dim())
    composed = peak_bytes(bench.composed_step) + trained + states
    bench.optimizer.zero_grad()
    parts = peak_bytes(bench.parts_step)
    activations = connection_activations(bench)
    needed = trained + trained + states + activations
    ratio = (composed - parts) / needed
    return Result(
        "extra peak memory of a training step",
        composed - parts,
        needed,
        "bytes",
        ratio,
        (ratio, ratio),
        1.05,
        {
            "composed_peak": composed,
            "parts_peak": parts,
            "connection_weights": trained,
            "connection_gradients": trained,
            "optimizer_states": states,
            "connection_activations": activations,
        },
    )


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


def connection_activations(bench: Bench) -> int:
    """Bytes that the connections alone keep for the backward pass, run one by one outside of the composed model."""
    model, length = bench.model, bench.ids.shape[1]
    alignment = model._align(length, 0, None, None, None, None, None, bench.ids.device)
    weights = {weight.data_ptr() for weight in model.connections.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(1, length, bench.anchor.config.hidden_size, requires_grad=True)
    sum_of_all = hidden
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for connection in model.connections:
            context = torch.randn(1, length, bench.augmenting.config.hidden_size)
            sum_of_all = sum_of_all + connection(sum_of_all, context, alignment)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def checkpoint(bench: Bench) -> Result:
    """Compare a saved composition, with all files, with its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save_pretrained(folder)
        files = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    parameters = sum(weight.nbytes for weight in bench.model.connections.parameters())
    ratio = sum(files.values()) / parameters
    target = 1 + CHECKPOINT_ALLOWANCE / parameters
    return Result(
        "checkpoint", sum(files.values()), parameters, "bytes", ratio, (ratio, ratio), target, {"files": files}
    )


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


def show(report: dict[str, Any], results: list[Result]) -> None:
    """Print the results as a table."""
    machine, settings = report["hardware"], report["settings"]
    table = Table(
        title=f"{settings['anchor']} + its first {settings['specialist_layers']} layers, {settings['connections']} "
        f"connections, {settings['tokens']} tokens, {settings['dtype']}; {machine['cpu']}, {machine['threads']} threads"
    )
    for column in ("", "composed", "parts", "ratio", "quartiles", "target", "met"):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    for result in results:
        scale, unit = (1e3, "ms") if result.unit == "s" else (1e-6, "MB")
        table.add_row(
            result.name,
            f"{result.composed * scale:,.1f} {unit}",
            f"{result.parts * scale:,.1f} {unit}",
            f"{result.ratio:.4f}",
            f"{result.spread[0]:.4f}-{result.spread[1]:.4f}",
            f"{result.target:.4f}",
            "yes" if result.met else "[bold red]no[/]",
        )
    Console(width=max(120, console.width)).print(table)


def main(
    turns: Annotated[int, typer.Option(min=2, help="Turns of a forward pass and of a training step.")] = 48,
    decode_turns: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 200,
    tokens: Annotated[int, typer.Option(min=2, help="Length of a sequence.")] = 512,
    specialist_layers: Annotated[int, typer.Option(min=1, max=30, help="Layers of the specialist.")] = 15,
    connections: Annotated[int, typer.Option(min=1, help="Connections, at a uniform gap.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Measure what composition costs beyond its parts; write DATE-overhead.json."""
    now, machine, start = datetime.now(timezone.utc), hardware(), time.perf_counter()
    bench = Bench(specialist_layers, connections, tokens)
    planned = bench.plan
    parts_flops = planned.anchor.forward_flops + sum(part.forward_flops for part in planned.augmenting.values())
    results = [
        timed(
            f"forward, {tokens} tokens",
            bench.composed_forward,
            bench.parts_forward,
            turns,
            1.05,
            # what the connections' own arithmetic comes to: no implementation of the formula can be below
            ratio_of_flops=1 + planned.connections.forward_flops / parts_flops,
        ),
        timed(
            f"cached decoding, a token after {tokens}",
            *bench.decoders(),
            decode_turns,
            1.10,
            ratio_of_weights_read=planned.weight_bytes / (planned.weight_bytes - planned.connections.weight_bytes),
        ),
        timed("training step", bench.composed_step, bench.parts_step, turns, 1.10),
        memory(bench),
        checkpoint(bench),
    ]
    report = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "hardware": machine,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "settings": {
            "anchor": "SmolLM2-135M",
            "specialist_layers": specialist_layers,
            "connections": connections,
            "layer_pairs": [(pair.augmenting_layer, pair.anchor_layer) for pair in planned.layer_pairs],
            "tokens": tokens,
            "batch_size": 1,
            "dtype": "float32",
            "composition_parameters": planned.connections.parameters,
        },
        "results": [asdict(result) for result in results],
        "seconds": round(time.perf_counter() - start),
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{now:%Y-%m-%d}-overhead.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    show(report, results)
    console.print(f"{path} ({report['seconds']} s)")


if __name__ == "__main__":
    typer.run(main)
