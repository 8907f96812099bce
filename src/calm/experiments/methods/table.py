"""From what the methods wrote to the results: the table, differences, preservation, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm.experiments.methods import intervals
from calm.experiments.methods.examples import Data, Metric
from calm.experiments.methods.metrics import Perplexity
from calm.experiments.methods.run import Outcome
from calm.experiments.results import Cell, Row, Training

Outcomes = Mapping[int, Mapping[str, Outcome]]
"""By seed and method."""

SHOWN = 5
"""Examples with every method's answer that the results hold for each row."""


def fields(data: Data, outcomes: Outcomes) -> dict[str, Any]:
    """The fields of `Results` that come from one data set.

    Args:
        data: the same for all seeds.
        outcomes: every seed with the same methods.

    Returns:
        `rows`, `table`, `differences`, `other`, `preservation`, `examples`, each by row; `training` by method.
    """
    found: dict[str, Any] = {name: {} for name in ("rows", "table", "differences", "other", "preservation", "examples")}
    seeds = list(outcomes)
    methods = list(outcomes[seeds[0]])
    for row, task in data.tests.items():
        for metric in (task.metric, *task.others):
            statistics = {
                method: [metric.statistics(outcomes[s][method]["answers"][row], task.examples) for s in seeds]
                for method in methods
            }
            cells = {method: intervals.cell(of_seeds, metric.value) for method, of_seeds in statistics.items()}
            name = row if metric is task.metric else f"{row} {metric.name}"
            found["table" if metric is task.metric else "other"][name] = cells
            found["rows"][name] = _row(metric, len(task.examples), task.title)
            if metric is task.metric:
                found["differences"][row] = _differences(statistics, metric)
        found["examples"][row] = [
            {
                "prompt": example.prompt,
                "reference": example.completion.strip(),
                **{method: outcomes[seeds[0]][method]["answers"][row][index].strip() for method in methods},
            }
            for index, example in enumerate(task.examples[:SHOWN])
        ]
    for name, texts in data.preserved.items():
        perplexity = Perplexity()
        row = f"{name} perplexity"
        found["rows"][row] = Row(metric=perplexity.name, higher_is_better=False, examples=len(texts), title=name)
        found["preservation"][row] = {
            method: intervals.cell([np.asarray(outcomes[s][method]["nll"][name]) for s in seeds], perplexity.value)
            for method in methods
        }
    found["training"] = {
        method: Training(**outcomes[seeds[0]][method]["training"])
        for method in methods
        if "learning_rate" in outcomes[seeds[0]][method]["training"]
    }
    return found


def _differences(statistics: Mapping[str, Sequence[np.ndarray]], metric: Metric) -> dict[str, Cell]:
    if "composed" not in statistics:
        return {}
    return {
        method: intervals.difference(statistics["composed"], of_seeds, metric.value)
        for method, of_seeds in statistics.items()
        if method != "composed"
    }


def _row(metric: Metric, examples: int, title: str) -> Row:
    return Row(metric=metric.name, higher_is_better=metric.higher_is_better, examples=examples, title=title)
