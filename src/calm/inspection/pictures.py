"""An inspection as PNGs: each connection's attention, and what is used and changed position by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm.errors import CalmError
from calm.inspection.measure import Inspection
from calm.inspection.page import WINDOW, name_of, visible

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise CalmError("Pictures need matplotlib, which is not installed: pip install 'calm-lm[train]'") from error

DPI = 120


def save_pictures(inspection: Inspection, folder: Path, name: str) -> list[Path]:
    """Draw an inspection; of a long one the last `WINDOW` positions, and the tokens among them.

    Args:
        inspection: Of one prompt.
        folder: Where the PNGs go.
        name: What their names begin with.

    Returns:
        `NAME-used.png`, `NAME-off.png`, and `NAME-attention-INDEX.png` for each connection.
    """
    figures = {"used": _used(inspection), "off": _off(inspection)}
    for index, use in enumerate(inspection.connections):
        figures[f"attention-{index}"] = _attention(inspection, use.attention.mean(0), name_of(use.pair))
    paths = []
    for what, figure in figures.items():
        paths.append(folder / f"{name}-{what}.png")
        figure.savefig(paths[-1], dpi=DPI, metadata={"Software": None})
    return paths


def _used(inspection: Inspection) -> Figure:
    names = [name_of(use.pair) for use in inspection.connections]
    return _strips(
        inspection,
        names,
        {
            "What is added, relative to the anchor's state": [use.injection for use in inspection.connections],
            "Entropy of the attention (nats, mean over heads)": [use.entropy.mean(0) for use in inspection.connections],
        },
    )


def _off(inspection: Inspection) -> Figure:
    names = [f"without {name_of(use.pair)}" for use in inspection.connections]
    removed = [*(use.without for use in inspection.connections), inspection.anchor]
    return _strips(
        inspection,
        [*names, "bare anchor"],
        {
            "Share of the next token's probability that moves": [without.total_variation for without in removed],
            "Kullback-Leibler divergence from the composed model (nats)": [without.kl for without in removed],
        },
    )


def _strips(inspection: Inspection, names: list[str], panels: dict[str, list[Tensor]]) -> Figure:
    """One panel above another, one row a connection, one column a position."""
    columns = min(WINDOW, len(inspection.tokens) - 1)
    size = (2.5 + 0.32 * columns, len(panels) * (1.3 + 0.32 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        image = axes.imshow(torch.stack(rows)[:, -WINDOW:].numpy(), cmap="Blues", vmin=0, aspect="auto")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        _label(axes.xaxis, inspection, rotation=90)
        figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def _attention(inspection: Inspection, weights: Tensor, name: str) -> Figure:
    weights = weights[-WINDOW:, -WINDOW:]
    side = 2.2 + 0.24 * len(weights)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    image = axes.imshow(weights.masked_fill(future, float("nan")).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_title(name, loc="left", fontsize=10, parse_math=False)
    axes.set_xlabel("token that the augmenting model has read")
    axes.set_ylabel("token that the anchor has read")
    for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
        _label(axis, inspection, rotation)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.6, label="weight, mean over heads")
    return figure


def _label(axis: Any, inspection: Inspection, rotation: int) -> None:
    """Name the positions by what was read; those whose next token was produced stand out."""
    first = max(0, len(inspection.tokens) - 1 - WINDOW)
    tokens = [visible(token)[:12] for token in inspection.tokens[first:-1]]
    axis.set_ticks(range(len(tokens)), tokens, fontsize=8, rotation=rotation, parse_math=False)
    for position, label in enumerate(axis.get_ticklabels(), start=first):
        if position >= inspection.produced.start:
            label.set_color("#b4530a")
