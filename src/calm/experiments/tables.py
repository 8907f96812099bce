"""Results as tables, on the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from calm.experiments.results import METHODS, Cell, Results, Row

TRAINING = ("trained parameters", "learning rate (mixed: m_A's weight)", "steps", "minutes")


def print_results(console: Console, results: Results) -> None:
    """Print the table, what composition gains over each method, what is preserved, and what training took."""
    for heading, rows in sections(results).items():
        if rows:
            console.print(_table(heading, rows, results))
    if results.training:
        shown = Table("", *TRAINING, title="Training")
        for name, training in results.training.items():
            rate = "" if training.learning_rate is None else f"{training.learning_rate:g}"
            minutes = f"{training.seconds / 60:.1f}"
            shown.add_row(label(name), f"{training.trainable_parameters:,}", rate, str(training.steps), minutes)
        console.print(shown)
    for note in results.notes:
        console.print(note, style="dim", markup=False, emoji=False)


def sections(results: Results) -> dict[str, Mapping[str, Mapping[str, Cell]]]:
    """The tables that results hold, by heading."""
    return {
        "Results": {**results.table, **results.other},
        "Composed minus": results.differences,
        "Preservation": results.preservation,
        "Preservation, minus m_B alone": results.preservation_changes,
    }


def markdown(rows: Mapping[str, Mapping[str, Cell]], results: Results) -> str:
    """One table, methods down and rows across; the last line ends without a newline."""
    names = list(rows)
    lines = [["", *(head(results, name) for name in names)]]
    for method in methods_of(rows):
        cells = [shown(rows[name][method]) if method in rows[name] else "" for name in names]
        label = METHODS[method]
        lines.append([f"**{label}**" if method == "composed" else label, *cells])
    return pipes(lines)


def head(results: Results, name: str) -> str:
    """A row's name, metric and direction, for the head of a Markdown column."""
    return escape(f"{name}, {measured(results.rows[name])}")


def pipes(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table from its header and its rows; all columns but the first are numbers."""
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def escape(text: str) -> str:
    """Text in one cell of a Markdown table, shown as it is: what a model wrote must not become a link or an image."""
    line = " ⏎ ".join(text.splitlines()).replace("&", "&amp;").replace("<", "&lt;")
    # an underscore between letters or digits, as in m_A, is none of Markdown's
    return re.sub(r"[\\|*`~\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def shown(cell: Cell) -> str:
    """A number with its interval: 33.1 [31.2, 35.0]; of thousands without decimals, 2,358 [1,875, 2,845]."""
    ends = [number(end, like=cell.mean) for end in cell.interval or ()]
    return f"{number(cell.mean)} [{', '.join(ends)}]" if ends else number(cell.mean)


def number(value: float, like: float | None = None) -> str:
    """Three digits or so: 33.1, 4.06, 2,358; with as many decimals as `like`, where that is given, would have."""
    size = abs(value if like is None else like)
    digits = 0 if size >= 1000 else 2 if 0 < size < 10 else 1
    return f"{round(value, digits) + 0.0:,.{digits}f}"


def change(before: float, after: float) -> str:
    """How far something moved, in percent of what it was: +1.7%; what grew more than tenfold, as that: x 35."""
    if not before:
        return "from 0"
    if after > 10 * before > 0:
        return f"x {after / before:,.0f}"
    return f"{round(100 * (after - before) / abs(before), 1) + 0.0:+.1f}%"


def verdict(difference: Cell, higher_is_better: bool) -> str | None:
    """What a difference, composed minus another, says against the composed model; None if that is better."""
    sign = 1 if higher_is_better else -1
    if difference.interval is None:
        return "the composed model is not better" if sign * difference.mean <= 0 else None
    low, high = sorted(sign * end for end in difference.interval)
    if high < 0:
        return "the composed model is worse"
    return "the composed model is not clearly better" if low <= 0 else None


def methods_of(rows: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """The methods that occur, in the order of `METHODS`."""
    return [method for method in METHODS if any(method in cells for cells in rows.values())]


def _table(heading: str, rows: Mapping[str, Mapping[str, Cell]], results: Results) -> Table:
    table = Table(title=f"{heading} ({results.domain}, preset {results.name}, 95% intervals)")
    table.add_column("")
    for name in rows:
        table.add_column(f"{name}\n{measured(results.rows[name])}", justify="right")
    for method in methods_of(rows):
        cells = [shown(rows[name][method]) if method in rows[name] else "" for name in rows]
        table.add_row(METHODS[method], *cells, style="bold" if method == "composed" else None)
    return table


def measured(row: Row) -> str:
    """A row's metric and which way is better: chrF ↑."""
    return f"{row.metric} {'↑' if row.higher_is_better else '↓'}"


def label(name: str) -> str:
    """What people call a method, or "METHOD ROW", or anything else, which stays as it is."""
    method, _, rest = name.partition(" ")
    return f"{METHODS.get(method, method)} {rest}".strip()
