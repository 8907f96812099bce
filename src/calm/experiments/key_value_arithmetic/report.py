"""The paper's table and a bar chart of it, and one example that only the composition solves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calm.experiments.key_value_arithmetic.data import TASKS
from calm.experiments.key_value_arithmetic.stages import StageResult

Accuracies = Mapping[str, Mapping[str, float]]

ROWS = {
    "m_A": "m_A (augmenting): knows the keys",
    "m_B": "m_B (anchor): knows arithmetic",
    "composed": "m_A ⊕ m_B composed",
    "random_m_A": "composed with a random m_A",
    "vanilla_m_A": "composed with a vanilla m_A",
    "encoder_m_A": "composed, m_A as an encoder",
}
NOTE = (
    "Accuracy in percent: greedy generation, exact match of the full answer, on keys that no connection was trained "
    "on. The answer to KV-MATH restates the values and then solves (10 + 12 - 4 = 22 - 4 = 18); the paper asks for "
    "the result directly, as calm reproduce key_value_arithmetic does. KV-SUBS is the restated part of the answer. "
    "Vanilla: trained like m_A, on other values. Encoder: m_A sees the prompt only. All compositions train equally "
    "long."
)


def print_table(console: Console, table: Accuracies) -> None:
    """Print methods by tasks, with what to know beside it."""
    shown = Table(title="Key-value arithmetic, held-out keys")
    shown.add_column("")
    for task in TASKS:
        shown.add_column(task, justify="right")
    for name, description in ROWS.items():
        cells = [f"{table[name][task]:.1f}" for task in TASKS]
        shown.add_row(description, *cells, style="bold" if name == "composed" else None, end_section=name == "composed")
    console.print(shown)
    console.print(Text(NOTE, style="dim"))


def example(results: Mapping[str, StageResult]) -> tuple[str, dict[str, str]] | None:
    """A KV-MATH expression that the composition solves and neither part does.

    Args:
        results: by row of the table.

    Returns:
        The prompt and what each of the three wrote, or None if there is no such expression.
    """
    names = ("m_A", "m_B", "composed")
    for answers in zip(*(results[name].answers for name in names), strict=True):
        right = [given == expected for _, expected, given in answers]
        if right == [False, False, True]:
            return answers[0][0], {name: answer[2] for name, answer in zip(names, answers, strict=True)}
    return None


def save_plot(path: Path, table: Accuracies) -> None:
    """Draw the table as grouped bars.

    Args:
        path: where the PNG goes.
        table: percent by row and task.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(ROWS)
    shades = ("#9aa5b1", "#616e7c", "#d9480f", "#ffd8a8", "#ffc078", "#ffa94d")
    for row, ((name, description), shade) in enumerate(zip(ROWS.items(), shades, strict=True)):
        places = [index + (row - (len(ROWS) - 1) / 2) * width for index in range(len(TASKS))]
        bars = axes.bar(places, [table[name][task] for task in TASKS], 0.92 * width, label=description, color=shade)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(TASKS)), TASKS)
    axes.set_ylim(0, 108)
    axes.set_ylabel("exact match on held-out keys, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
