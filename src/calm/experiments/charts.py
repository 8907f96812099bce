"""Results as plots: the table, what composition adds to each method, gain against loss, and curves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.experiments.results import METHODS, Cell, Results, Row
from calm.experiments.tables import change, methods_of, number, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; shape and fill say the same again.
HIGHLIGHT, NEUTRAL, LINE, WORSE = "#D55E00", "#8DA0B3", "#3B4A5A", "#0072B2"
LINES = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def save_charts(results: Results, folder: Path) -> list[Path]:
    """Draw what the results hold, as PNGs named as the results, `-WHAT.png`.

    Args:
        results: of one run.
        folder: where the PNGs go.

    Returns:
        The files.
    """
    draw = {"table": _bars, "differences": _differences, "preservation": _gain_and_loss, "curves": _curves}
    paths = []
    for what in names_of(results):
        paths.append(folder / f"{results.stem}-{what}.png")
        partial = paths[-1].with_suffix(".partial")
        draw[what](results).savefig(partial, format="png", dpi=150, metadata={"Software": None})
        os.replace(partial, paths[-1])
    return paths


def names_of(results: Results) -> Mapping[str, str]:
    """What each chart shows, by the end of its file's name; only charts that have something to show."""
    shown = {
        "table": (_filled(results.table), "every method on every row"),
        "differences": (_compared(results), "composed minus each method, on the same examples"),
        "preservation": (
            _filled(results.preservation),
            "what is gained, on the row where composing adds most, beside what is lost of the anchor",
        ),
        "curves": (results.curves, "what was varied"),
    }
    return {what: caption for what, (there, caption) in shown.items() if there}


def _filled(rows: Mapping[str, Mapping[str, Cell]]) -> dict[str, Mapping[str, Cell]]:
    """Without the rows that no method has; a run without the composed model has empty differences."""
    return {name: cells for name, cells in rows.items() if cells}


def _compared(results: Results) -> dict[str, Mapping[str, Cell]]:
    """The differences of the table's rows, without those of more metrics of the same examples."""
    return {name: cells for name, cells in _filled(results.differences).items() if name in results.table}


def _bars(results: Results) -> Figure:
    """One panel a row, one bar a method, with intervals; bars begin at zero."""
    rows = _filled(results.table)
    figure, panels = _panels(len(rows), height=0.4 + 0.32 * max(map(len, rows.values())))
    for (axes,), (name, cells) in zip(panels, rows.items(), strict=True):
        row, methods = results.rows[name], _down(axes, cells)
        means = [cells[method].mean for method in methods]
        axes.barh(range(len(methods)), means, color=[_colour(method) for method in methods], height=0.7)
        _whiskers(axes, [cells[method] for method in methods])
        ends = [_reach(cells[method])[1] for method in methods]
        for place, (mean, end) in enumerate(zip(means, ends, strict=True)):
            axes.annotate(number(mean), (max(mean, end, 0), place), (5, 0), textcoords="offset points", va="center")
        axes.set_xlim(min(0, *means), 1.15 * max(*ends, 1e-9))
        _ticks_within(axes, row)
        axes.set_title(f"{row.title} ({row.examples} examples)", loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel(f"{row.metric}, {_better(row.higher_is_better)}; lines: 95% intervals")
    return figure


def _differences(results: Results) -> Figure:
    """What the composed model has more than each method, on the same examples; zero is no difference."""
    from matplotlib.lines import Line2D

    marks = {  # the shape, the colour of its edge and its filling
        None: ("o", HIGHLIGHT, HIGHLIGHT, "composed is better"),
        "the composed model is not clearly better": ("o", LINE, "white", "not clearly better: the interval holds zero"),
        "the composed model is not better": ("s", WORSE, "white", "not better (no interval)"),
        "the composed model is worse": ("s", WORSE, WORSE, "composed is worse"),
    }
    rows = _compared(results)
    figure, panels = _panels(len(rows), height=0.4 + 0.32 * max(map(len, rows.values())))
    used = set()
    for (axes,), (name, cells) in zip(panels, rows.items(), strict=True):
        row, methods = results.rows[name], _down(axes, cells)
        axes.axvline(0, color=LINE, linewidth=1)
        _whiskers(axes, [cells[method] for method in methods])
        for place, method in enumerate(methods):
            found = verdict(cells[method], row.higher_is_better)
            used.add(found)
            shape, edge, fill, _ = marks[found]
            axes.plot(cells[method].mean, place, shape, color=edge, markerfacecolor=fill, zorder=3)
            right = cells[method].mean >= 0  # the number stands away from zero
            axes.annotate(
                f"{cells[method].mean:+.1f}",
                (_reach(cells[method])[right], place),
                (6 if right else -6, 0),
                textcoords="offset points",
                va="center",
                ha="left" if right else "right",
                fontsize=8,
            )
        axes.margins(x=0.12)
        axes.set_title(f"{row.title}: composed minus ...", loc="left", fontweight="bold", fontsize=10)
        side = "right" if row.higher_is_better else "left"
        axes.set_xlabel(f"{row.metric}; {side} of zero composed is better")
    figure.legend(
        handles=[
            Line2D([], [], linestyle="", marker=shape, color=edge, markerfacecolor=fill, label=label)
            for found, (shape, edge, fill, label) in marks.items()
            if found in used
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return figure


def _gain_and_loss(results: Results) -> Figure:
    """Beside each other: what each method reaches on the new task, and what is left of the anchor's ability."""
    kept = _filled(results.preservation)
    figure, panels = _panels(len(kept), height=0.6 + 0.32 * max(map(len, kept.values())), columns=2)
    for (gain, loss), (name, cells) in zip(panels, kept.items(), strict=True):
        gained, methods = _gained(results, name), _down(gain, cells)
        if gained:
            _dots(gain, results, gained, results.table[gained], methods)
            gain.set_title(f"Gained:\n{results.rows[gained].title}", loc="left", fontweight="bold", fontsize=9)
        _dots(loss, results, name, cells, methods, changes=True)
        loss.set_title(f"Lost of the anchor:\n{name}", loc="left", fontweight="bold", fontsize=9)
        loss.set_yticks(range(len(methods)), [""] * len(methods))
    return figure


def _gained(results: Results, kept: str) -> str | None:
    """The row of the table that belongs to a row of preservation.

    Where that names a language, such as "English perplexity cy", it is one of that language's rows. Of several it is
    the one in which composition adds most to the better of its parts; never one that measures the same ability.
    """
    rows = [row for row in _filled(results.table) if results.rows[row].title != results.rows[kept].title]
    rows = [row for row in rows if row.split()[0] in kept.split()] or rows

    def added(row: str) -> float:
        found = results.table[row]
        parts = [found[part].mean for part in ("m_A", "m_B") if part in found]
        return found["composed"].mean - max(parts) if parts and "composed" in found else -math.inf

    return max(rows, key=added, default=None)


def _dots(
    axes: Any, results: Results, name: str, cells: Mapping[str, Cell], methods: list[str], changes: bool = False
) -> None:
    """One dot a method, dotted line at m_B; `changes` writes how far from it."""
    from matplotlib.ticker import LogLocator

    axes.set_ylim(-0.6, len(methods) - 0.4)
    row, anchor = results.rows[name], cells.get("m_B")
    if anchor is not None:
        axes.axvline(anchor.mean, color=LINE, linewidth=0.9, linestyle=":")
    for place, method in enumerate(methods):
        if method in cells:
            cell = cells[method]
            axes.plot(_reach(cell), [place, place], color=_colour(method), linewidth=1.6)
            axes.plot(cell.mean, place, "o", color=_colour(method))
            label = number(cell.mean)
            if changes and anchor is not None and method != "m_B":
                label += f" ({change(anchor.mean, cell.mean)})"
            axes.annotate(label, (_reach(cell)[1], place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    low, high = min(_reach(cell)[0] for cell in cells.values()), max(_reach(cell)[1] for cell in cells.values())
    if not row.higher_is_better and low > 0 and high > 3 * low:
        axes.set_xscale("log")  # perplexities lie apart by factors
        axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.9)  # room for the numbers
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 30 * low else (1,), numticks=5))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
    else:
        low = low if changes else 0
        span = (high - low) or 1
        axes.set_xlim(max(0, low - 0.05 * span), high + (0.9 if changes else 0.25) * span)
        _ticks_within(axes, row)
    axes.set_xlabel(f"{row.metric}, {_better(row.higher_is_better)}\ndotted: m_B, lines: 95%", fontsize=8)


def _curves(results: Results) -> Figure:
    """One panel a curve, its band the 95% interval; the vertical axis begins at zero."""
    figure, panels = _panels(len(results.curves), height=3.2)
    for (axes,), curve in zip(panels, results.curves.values(), strict=True):
        colours = iter(LINES * len(curve.points))
        for name, points in curve.points.items():
            colour = HIGHLIGHT if name == "composed" else next(colours)
            xs, means = [x for x, _ in points], [cell.mean for _, cell in points]
            axes.plot(xs, means, "o-", color=colour, label=METHODS.get(name, name))
            lows, highs = zip(*(_reach(cell) for _, cell in points), strict=True) if points else ((), ())
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(curve.title, loc="left", fontweight="bold", fontsize=10)
        axes.set_xlabel(curve.x)
        axes.set_ylabel(curve.y, fontsize=8)
        axes.set_ylim(bottom=min(0, axes.dataLim.ymin))
        measured = sorted({x for points in curve.points.values() for x, _ in points})
        if len(measured) <= 8 and all(x == int(x) for x in measured):
            axes.set_xticks(measured)
        if len(curve.points) > 1:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _panels(count: int, height: float, columns: int = 1) -> tuple[Figure, list[list[Any]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if columns == 1 else 10, (height + 0.9) * count + 0.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # type: ignore[union-attr,call-arg]
    panels = figure.subplots(count, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in panels]


def _down(axes: Any, cells: Mapping[str, Cell]) -> list[str]:
    """The methods from the lowest place up, so that the first of `METHODS` stands on top; labels the axis with them."""
    methods = methods_of({"": cells})[::-1]
    axes.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
    axes.set_ylim(-0.6, len(methods) - 0.4)
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if method == "composed" else "normal")
    return methods


def _colour(method: str) -> str:
    return HIGHLIGHT if method == "composed" else NEUTRAL


def _ticks_within(axes: Any, row: Row) -> None:
    """No numbers beside the axis that the metric cannot have: what is better when it is higher ends at 100 here."""
    low, high = axes.get_xlim()
    axes.set_xticks(
        [tick for tick in axes.get_xticks() if low <= tick <= (min(high, 100) if row.higher_is_better else high)]
    )


def _better(higher: bool) -> str:
    return f"{'higher' if higher else 'lower'} is better"


def _reach(cell: Cell) -> tuple[float, float]:
    """The interval, or the mean where there is none."""
    return cell.interval or (cell.mean, cell.mean)


def _whiskers(axes: Any, cells: list[Cell]) -> None:
    for place, cell in enumerate(cells):
        axes.plot(_reach(cell), [place, place], color=LINE, linewidth=1.4, solid_capstyle="butt")
