"""95% intervals over test examples and trainings, of one method and of the difference of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t as student

from calm.experiments.results import Cell

SAMPLES = 1000
Z = 1.96
PERCENT = (0.0, 100.0)
NOT_NEGATIVE = (0.0, math.inf)

Value = Callable[[np.ndarray, int], float]
"""A metric of so many examples from the sums of their statistics."""


def cell(statistics: Sequence[np.ndarray], value: Value, bounds: tuple[float, float] = PERCENT) -> Cell:
    """One method's number: the mean over seeds.

    The interval joins, as independent errors, what other test examples would change of the mean over these seeds,
    which answer the same examples, and what other seeds would (Student's t of the seeds' values: resampling two or
    three of them would promise far too much). Of one seed it is the first alone. For a share of right answers, and
    for any mean of numbers from 0 to 1, the first is Agresti and Coull's (1998), for the difference of two Agresti
    and Min's (2005), which a bootstrap of answers that are nearly all alike is not good for. For other metrics it is
    a percentile bootstrap.

    Args:
        statistics: for each seed float64 [examples, statistics]. One statistic alone is a number from 0 to 1, whose
            mean is the metric in parts of its greatest value.
        value: the metric.
        bounds: its least and its greatest value.
    """
    values = tuple(value(one.sum(axis=0), len(one)) for one in statistics)
    if statistics[0].shape[1] == 1:
        ends = _share(_of_examples(statistics), bounds[1], added=4, total=2, squares=2)
    else:
        ends = _percentiles(_samples(statistics, value))
    return _cell(values, ends, bounds)


def difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], value: Value, bounds: tuple[float, float] = PERCENT
) -> Cell:
    """First minus second, on the same examples and seeds (paired), with an interval as `cell` has it.

    Args:
        first: for each seed float64 [examples, statistics].
        second: the same of the other method.
        value: the metric.
        bounds: its least and its greatest value.
    """
    values = tuple(
        value(one.sum(axis=0), len(one)) - value(two.sum(axis=0), len(two))
        for one, two in zip(first, second, strict=True)
    )
    width = bounds[1] - bounds[0]
    if first[0].shape[1] == 1:
        ends = _share(_of_examples(first) - _of_examples(second), bounds[1], added=2, total=0, squares=1)
    else:  # drawn alike, since the generator starts alike
        ends = _percentiles(_samples(first, value) - _samples(second, value))
    return _cell(values, ends, (-width, width))


def _of_examples(statistics: Sequence[np.ndarray]) -> np.ndarray:
    """Each example's mean over seeds, which have one statistic: [examples]."""
    return np.mean(statistics, axis=0)[:, 0]


def _share(of_examples: np.ndarray, whole: float, *, added: int, total: float, squares: float) -> tuple[float, float]:
    """A normal interval of the mean, as if there were some examples more.

    Args:
        of_examples: numbers from 0 to 1, or differences of two such, from -1 to 1.
        whole: what 1 stands for.
        added: how many more: 4 of which 2 are ones, or 2 of which one half is 1 and one half -1.
        total: their sum.
        squares: the sum of their squares.
    """
    examples = len(of_examples) + added
    mean = (of_examples.sum() + total) / examples
    square = (np.square(of_examples).sum() + squares) / examples
    away = Z * math.sqrt((square - mean**2) / examples)
    return whole * (mean - away), whole * (mean + away)


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def _samples(statistics: Sequence[np.ndarray], value: Value) -> np.ndarray:
    rng = np.random.default_rng(0)
    examples = len(statistics[0])
    means = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        counts = rng.multinomial(examples, np.full(examples, 1 / examples)).astype(np.float64)
        means[sample] = np.mean([value(counts @ one, examples) for one in statistics])
    return means


def _cell(values: tuple[float, ...], ends: tuple[float, float], bounds: tuple[float, float]) -> Cell:
    mean, seeds = float(np.mean(values)), len(values)
    low, high = ends
    among_seeds = float(student.ppf(0.975, seeds - 1)) * np.std(values, ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0
    below, above = math.hypot(max(0.0, mean - low), among_seeds), math.hypot(max(0.0, high - mean), among_seeds)
    return Cell(mean=mean, interval=(max(bounds[0], mean - below), min(bounds[1], mean + above)), values=values)
