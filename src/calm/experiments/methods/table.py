"""From what the methods wrote to the results: the table, differences, preservation, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm.experiments.methods import intervals
from calm.experiments.methods.examples import Data, Metric, TaskSet
from calm.experiments.methods.metrics import Perplexity
from calm.experiments.methods.run import Outcome
from calm.experiments.results import Row, Training

Outcomes = Mapping[int, Mapping[str, Outcome]]
"""By seed and method."""

Statistics = Mapping[str, Sequence[np.ndarray]]
"""By method, for each seed float64 [examples, statistics]."""

SHOWN = 5
"""Examples with every method's answer that the results hold for each row."""


def fields(data: Data, outcomes: Outcomes) -> dict[str, Any]:
    """The fields of `Results` that come from one data set.

    Args:
        data: the same for all seeds.
        outcomes: every seed with the same methods.

    Returns:
        `rows`, `table`, `differences`, `other`, `preservation`, `preservation_changes`, `examples`, each by row;
        `training` by method.
    """
    by_row = ("rows", "table", "differences", "other", "preservation", "preservation_changes", "examples")
    found: dict[str, Any] = {name: {} for name in by_row}
    seeds = list(outcomes)
    methods = list(outcomes[seeds[0]])
    for row, task in data.tests.items():
        for metric in (task.metric, *task.others):
            statistics = _statistics(outcomes, row, task, metric)
            cells = {method: intervals.cell(of_seeds, metric.value) for method, of_seeds in statistics.items()}
            name = row if metric is task.metric else f"{row} {metric.name}"
            found["table" if metric is task.metric else "other"][name] = cells
            found["rows"][name] = _row(metric, len(task.examples), task.title)
            _compare(found, name, statistics, metric)
        likelihoods = {
            method: [np.asarray(outcomes[s][method]["references"][row]) for s in seeds] for method in methods
        }
        name = f"{row} perplexity of the reference"
        found["rows"][name] = _row(Perplexity(), len(task.examples), task.title)
        found["other"][name] = {
            method: intervals.cell(of_seeds, Perplexity().value, intervals.NOT_NEGATIVE)
            for method, of_seeds in likelihoods.items()
        }
        _compare(found, name, likelihoods, Perplexity())
        found["examples"][row] = [
            {
                "prompt": example.prompt,
                "reference": example.completion.strip(),
                **{method: outcomes[seeds[0]][method]["answers"][row][index].strip() for method in methods},
            }
            for index, example in enumerate(task.examples[:SHOWN])
        ]
    for name, texts in data.preserved.items():
        # m_A has no hint to give on a plain text, of which a pipeline is m_B alone
        read = [method for method in methods if method != "pipeline"]
        of_texts = {method: [np.asarray(outcomes[s][method]["nll"][name]) for s in seeds] for method in read}
        found["rows"][f"{name} perplexity"] = _row(Perplexity(), len(texts), name)
        _preserve(found, f"{name} perplexity", of_texts, Perplexity())
    for row, task in data.preserved_tests.items():
        found["rows"][row] = _row(task.metric, len(task.examples), task.title)
        _preserve(found, row, _statistics(outcomes, row, task, task.metric), task.metric)
    found["training"] = {
        method: Training(**outcomes[seeds[0]][method]["training"])
        for method in methods
        if "learning_rate" in outcomes[seeds[0]][method]["training"]
    }
    return found


def together(by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The `fields` of several data sets as one.

    Args:
        by_name: the fields by the name of their data set, a language's code say.

    Returns:
        The same fields. If there are several data sets, a row (in `training`, a method) that does not begin with the
        name of its data set gets it at its end.
    """
    joined: dict[str, Any] = {}
    for name, found in by_name.items():
        for field, rows in found.items():
            plain = len(by_name) == 1
            named = {
                row if plain or (field != "training" and row.split()[0] == name) else f"{row} {name}": value
                for row, value in rows.items()
            }
            joined[field] = {**joined.get(field, {}), **named}
    return joined


def _statistics(outcomes: Outcomes, row: str, task: TaskSet, metric: Metric) -> Statistics:
    """The seeds' statistics of each method's answers."""
    seeds = list(outcomes)
    return {
        method: [metric.statistics(outcomes[seed][method]["answers"][row], task.examples) for seed in seeds]
        for method in outcomes[seeds[0]]
    }


def _compare(found: dict[str, Any], row: str, statistics: Statistics, metric: Metric | Perplexity) -> None:
    """Composed minus each other method, where it was run."""
    if "composed" in statistics:
        found["differences"][row] = {
            method: intervals.difference(statistics["composed"], of_seeds, metric.value, _bounds(metric))
            for method, of_seeds in statistics.items()
            if method != "composed"
        }


def _preserve(found: dict[str, Any], row: str, statistics: Statistics, metric: Metric | Perplexity) -> None:
    """One row of preservation, and what each method changes of m_B's number there."""
    bounds = _bounds(metric)
    found["preservation"][row] = {
        method: intervals.cell(of_seeds, metric.value, bounds) for method, of_seeds in statistics.items()
    }
    found["preservation_changes"][row] = {
        method: intervals.difference(of_seeds, statistics["m_B"], metric.value, bounds)
        for method, of_seeds in statistics.items()
        if method != "m_B" and "m_B" in statistics
    }


def _bounds(metric: Metric | Perplexity) -> tuple[float, float]:
    return intervals.NOT_NEGATIVE if isinstance(metric, Perplexity) else intervals.PERCENT


def _row(metric: Metric | Perplexity, examples: int, title: str) -> Row:
    return Row(metric=metric.name, higher_is_better=metric.higher_is_better, examples=examples, title=title)
