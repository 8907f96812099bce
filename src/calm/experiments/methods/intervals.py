"""95% intervals over test examples and trainings, of one method and of the difference of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t as student

from calm.experiments.results import Cell

SAMPLES = 1000
PERCENT = (0.0, 100.0)
NOT_NEGATIVE = (0.0, math.inf)

Value = Callable[[np.ndarray, int], float]
"""A metric of so many examples from the sums of their statistics."""


def cell(statistics: Sequence[np.ndarray], value: Value, bounds: tuple[float, float] = PERCENT) -> Cell:
    """One method's number: the mean over seeds.

    The interval joins, as independent errors, what other test examples would change (a percentile bootstrap of the mean
    over these seeds, which answer the same examples) and what other seeds would (Student's t of the seeds' values:
    resampling two or three of them would promise far too much). Of one seed it is the first alone.

    Args:
        statistics: for each seed float64 [examples, statistics].
        value: the metric.
        bounds: its least and its greatest value.
    """
    values = tuple(value(one.sum(axis=0), len(one)) for one in statistics)
    return _cell(values, _samples(statistics, value), statistics[0].shape, bounds)


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
    samples = _samples(first, value) - _samples(second, value)  # drawn alike, since the generator starts alike
    width = bounds[1] - bounds[0]
    return _cell(values, samples, first[0].shape, (-width, width))


def _samples(statistics: Sequence[np.ndarray], value: Value) -> np.ndarray:
    rng = np.random.default_rng(0)
    examples = len(statistics[0])
    means = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        counts = rng.multinomial(examples, np.full(examples, 1 / examples)).astype(np.float64)
        means[sample] = np.mean([value(counts @ one, examples) for one in statistics])
    return means


def _cell(values: tuple[float, ...], samples: np.ndarray, shape: tuple[int, ...], bounds: tuple[float, float]) -> Cell:
    mean, seeds = float(np.mean(values)), len(values)
    low, high = (float(end) for end in np.percentile(samples, [2.5, 97.5]))
    if low == high and shape[1] == 1:
        # all right or all wrong, of which a bootstrap knows nothing: how many others could still be hidden
        # (Clopper-Pearson for 0 of n)
        hidden = bounds[1] * (1 - 0.025 ** (1 / shape[0]))
        low, high = low - hidden, high + hidden
    among_seeds = float(student.ppf(0.975, seeds - 1)) * np.std(values, ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0
    below, above = math.hypot(max(0.0, mean - low), among_seeds), math.hypot(max(0.0, high - mean), among_seeds)
    return Cell(mean=mean, interval=(max(bounds[0], mean - below), min(bounds[1], mean + above)), values=values)
