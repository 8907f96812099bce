"""Results as plots: the table, what composition adds to each method, gain against loss, and curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.experiments.results import METHODS, Cell, Results
from calm.experiments.tables import methods_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart.
HIGHLIGHT, NEUTRAL, LINE = "#D55E00", "#8DA0B3", "#3B4A5A"
LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save_charts(results: Results, folder: Path) -> list[Path]:
    """Draw what the results hold, as PNGs named `DATE-PRESET-WHAT.png`.

    Args:
        results: of one run.
        folder: where the PNGs go.

    Returns:
        The files.
    """
    drawn = {
        "table": _bars(results) if results.table else None,
        "differences": _differences(results) if results.differences else None,
        "preservation": _gain_and_loss(results) if results.preservation else None,
        "curves": _curves(results) if results.curves else None,
    }
    paths = []
    for what, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{results.date}-{results.preset}-{what}.png")
            figure.savefig(paths[-1], dpi=150, metadata={"Software": None})
    return paths


def _bars(results: Results) -> Figure:
    """One panel a row, one bar a method, with intervals; bars begin at zero."""
    names = list(results.table)
    figure, panels = _panels(len(names), height=0.4 + 0.32 * max(len(cells) for cells in results.table.values()))
    for axes, name in zip(panels, names, strict=True):
        row, cells = results.rows[name], results.table[name]
        methods = methods_of({name: cells})[::-1]
        means = [cells[method].mean for method in methods]
        colours = [HIGHLIGHT if method == "composed" else NEUTRAL for method in methods]
        axes.barh(range(len(methods)), means, color=colours, height=0.7)
        _whiskers(axes, [cells[method] for method in methods])
        axes.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
        ends = [(cells[method].interval or (0, cells[method].mean))[1] for method in methods]
        for place, (mean, end) in enumerate(zip(means, ends, strict=True)):
            axes.annotate(f"{mean:.1f}", (max(mean, end), place), (5, 0), textcoords="offset points", va="center")
        axes.set_xlim(left=min(0, *means), right=1.15 * max(*ends, 1e-9))
        axes.set_title(f"{row.title} ({row.examples} examples)", loc="left", fontsize=10)
        axes.set_xlabel(f"{row.metric}, {'higher' if row.higher_is_better else 'lower'} is better")
    return figure


def _differences(results: Results) -> Figure:
    """What the composed model has more than each method, on the same examples; zero is no difference."""
    names = [name for name, cells in results.differences.items() if cells]
    figure, panels = _panels(len(names), height=0.4 + 0.3 * max(len(results.differences[name]) for name in names))
    for axes, name in zip(panels, names, strict=True):
        row, cells = results.rows[name], results.differences[name]
        methods = methods_of({name: cells})[::-1]
        axes.axvline(0, color=LINE, linewidth=1)
        better = [cells[method].mean > 0 if row.higher_is_better else cells[method].mean < 0 for method in methods]
        colours = [HIGHLIGHT if good else NEUTRAL for good in better]
        axes.scatter([cells[method].mean for method in methods], range(len(methods)), color=colours, zorder=3)
        _whiskers(axes, [cells[method] for method in methods])
        axes.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.set_title(f"{row.title}: composed minus ...", loc="left", fontsize=10)
        side = "right" if row.higher_is_better else "left"
        axes.set_xlabel(f"{row.metric}; {side} of the line the composed model is better")
    return figure


def _gain_and_loss(results: Results) -> Figure:
    """Each method's gain over m_B on the first row against its first preservation row."""
    figure, panels = _panels(len(results.preservation), height=4.0)
    for axes, (kept, cells) in zip(panels, results.preservation.items(), strict=True):
        gained = next((name for name in results.table if name in kept.split()), next(iter(results.table)))
        for method in methods_of({kept: cells, gained: results.table[gained]}):
            if method not in cells or method not in results.table[gained]:
                continue
            x, y = results.table[gained][method], cells[method]
            colour = HIGHLIGHT if method == "composed" else NEUTRAL
            axes.errorbar(x.mean, y.mean, xerr=_arms(x), yerr=_arms(y), fmt="o", color=colour, capsize=2)
            axes.annotate(METHODS[method], (x.mean, y.mean), (6, 4), textcoords="offset points", fontsize=7)
        if "m_B" in cells:
            axes.axhline(cells["m_B"].mean, color=LINE, linewidth=0.8, linestyle=":")
        row = results.rows[kept]
        axes.margins(x=0.25)
        axes.set_xlabel(f"{results.rows[gained].title}: {results.rows[gained].metric}")
        axes.set_ylabel(f"{row.title}: {row.metric}")
        if not row.higher_is_better and all(cell.mean > 0 for cell in cells.values()):
            axes.set_yscale("log")
        axes.set_title(f"What is learned against {kept} (dotted: m_B's)", loc="left", fontsize=10)
    return figure


def _curves(results: Results) -> Figure:
    figure, panels = _panels(len(results.curves), height=3.6)
    for axes, curve in zip(panels, results.curves.values(), strict=True):
        for (name, points), colour in zip(curve.points.items(), LINES * 4, strict=False):
            xs, means = [x for x, _ in points], [cell.mean for _, cell in points]
            axes.plot(xs, means, "o-", color=colour, label=METHODS.get(name, name))
            if all(cell.interval for _, cell in points):
                lows, highs = zip(*(cell.interval or (0, 0) for _, cell in points), strict=True)
                axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(curve.title, loc="left", fontsize=10)
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y)
        axes.set_ylim(bottom=0)
        if len(curve.points) > 1:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, (height + 0.9) * count), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def _whiskers(axes: Any, cells: list[Cell]) -> None:
    for place, cell in enumerate(cells):
        if cell.interval is not None:
            axes.plot(cell.interval, [place, place], color=LINE, linewidth=1.4, solid_capstyle="butt")


def _arms(cell: Cell) -> list[list[float]] | None:
    if cell.interval is None:
        return None
    low, high = cell.interval
    return [[max(0.0, cell.mean - low)], [max(0.0, high - cell.mean)]]


def names_of(results: Results) -> Mapping[str, str]:
    """What each chart shows, by the end of its file's name."""
    shown = {
        "table": (results.table, "every method on every row"),
        "differences": (results.differences, "composed minus each method, on the same examples"),
        "preservation": (results.preservation, "what is learned against what is kept of the anchor"),
        "curves": (results.curves, "what was varied"),
    }
    return {what: caption for what, (there, caption) in shown.items() if there}
