"""How the time of a training step grows: with the length of a row, batch, connections, and augmenting models."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import take_turns
from parts import Step, randomize_outputs
from random_models import llama

import calm

VOCABULARY = 4096


@dataclass(frozen=True)
class Sizes:
    """What is varied, and what stays meanwhile. All models are llamas with random weights.

    Attributes:
        lengths: Tokens in a row.
        batches: Rows in a batch.
        connections: Connections of one augmenting model; the last is one from each of its layers.
        augmenting_models: Augmenting models, each with two connections, from and to the same layers.
        tokens: Tokens in a row where another thing is varied.
        width: Width of the anchor; augmenting models are three quarters as wide.
        layers: Layers of each model.
        turns: Turns at each point.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    connections: tuple[int, ...] = (1, 2, 4, 8)
    augmenting_models: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 512
    width: int = 256
    layers: int = 8
    turns: int = 5


QUICK = Sizes((16, 32), (1, 2), (1, 2), (1, 2, 4), tokens=16, width=64, layers=2, turns=2)

AXES = {
    "sequence_length": "tokens in a row",
    "batch": "rows in a batch",
    "connections": "connections",
    "augmenting_models": "augmenting models",
}


def step(sizes: Sizes, tokens: int, rows: int = 1, connections: int = 2, augmenting_models: int = 1) -> Step:
    """A training step of a composition of random models."""

    def base(width: int) -> Any:
        context = max(sizes.lengths)
        return llama(width=width, layers=sizes.layers, heads=4, vocabulary=VOCABULARY, context=context)

    augmenting = {f"m{i}": base(3 * sizes.width // 4) for i in range(augmenting_models)}
    model = randomize_outputs(calm.compose(base(sizes.width), augmenting, connections))
    return Step(model, torch.randint(0, VOCABULARY, (rows, tokens)))


def measure(sizes: Sizes) -> dict[str, Any]:
    """Time steps, and their parts (augmenting models and anchor, without connections), along each axis.

    Returns:
        For each of `AXES`: `points`, median seconds of a `composed` step and of its `parts`; for augmenting models
        also a straight line through the former, against what one augmenting model costs by itself.
    """
    found = {
        "sequence_length": along("sequence_length", {n: step(sizes, n) for n in sizes.lengths}, sizes.turns),
        "batch": along("batch", {n: step(sizes, sizes.tokens, rows=n) for n in sizes.batches}, sizes.turns),
        "connections": along(
            "connections", {n: step(sizes, sizes.tokens, connections=n) for n in sizes.connections}, sizes.turns
        ),
    }
    steps = {n: step(sizes, sizes.tokens, augmenting_models=n) for n in sizes.augmenting_models}
    first = steps[min(steps)]
    found["augmenting_models"] = along("augmenting_models", steps, sizes.turns, first.augmenting, first.connections)
    return found


def along(axis: str, steps: dict[int, Step], turns: int, *one: Callable[[], None]) -> dict[str, Any]:
    """Let the points of an axis take turns; `one` is what one augmenting model costs, in pieces."""
    runs = {f"composed {n}": step.composed for n, step in steps.items()}
    runs |= {f"augmenting {n}": step.augmenting for n, step in steps.items()}
    runs |= {f"anchor {n}": step.anchor for n, step in steps.items()}
    runs |= {f"one {i}": piece for i, piece in enumerate(one)}
    seconds = take_turns(f"scaling: {AXES[axis]}", runs, turns)
    median = {key: statistics.median(times) for key, times in seconds.items()}
    found: dict[str, Any] = {
        "points": list(steps),
        "composed": [median[f"composed {n}"] for n in steps],
        "composed_quartiles": [statistics.quantiles(seconds[f"composed {n}"], n=4, method="inclusive") for n in steps],
        "parts": [median[f"augmenting {n}"] + median[f"anchor {n}"] for n in steps],
    }
    if one:
        found["line"] = straight_line(
            found["points"], found["composed"], sum(median[f"one {i}"] for i in range(len(one)))
        )
    return found


def straight_line(points: list[int], seconds: list[float], one: float) -> dict[str, float]:
    """Fit `seconds = intercept + slope * points`, by least squares.

    Returns:
        `slope` and `intercept` in seconds, `r_squared`, `one` as given, and `slope_by_one`, which would be 1.
    """
    slope, intercept = np.polyfit(points, seconds, 1)
    residuals = np.array(seconds) - (intercept + slope * np.array(points))
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r_squared": float(1 - residuals.var() / np.var(seconds)),
        "one": one,
        "slope_by_one": float(slope / one),
    }


def draw(found: dict[str, Any], stem: Path) -> None:
    """Draw what `measure` returned: one plot for each axis, `STEM-AXIS.png`."""
    for axis, label in AXES.items():
        measured = found[axis]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=label, ylabel="seconds a training step")
        points = measured["points"]
        if "line" in measured:
            line = measured["line"]
            fitted = [line["intercept"] + line["slope"] * n for n in points]
            of_one = f"{line['slope_by_one']:.2f} of one alone"
            label = f"{line['slope']:.3f} s for each, {of_one} (R² {line['r_squared']:.4f})"
            axes.plot(points, fitted, color="grey", linewidth=1, label=label)
        axes.plot(points, measured["composed"], marker="o", label="composed")
        axes.plot(points, measured["parts"], marker=".", linestyle="--", label="anchor and augmenting models alone")
        axes.set(xlim=(0, None), ylim=(0, None), xticks=points)
        axes.legend(fontsize="small")
        figure.savefig(f"{stem}-{axis.replace('_', '-')}.png", dpi=120)
