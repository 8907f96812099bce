"""Bootstrap intervals over test examples and seeds, of one method and of the difference of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from calm.experiments.results import Cell

SAMPLES = 1000

Value = Callable[[np.ndarray, int], float]
"""A metric of so many examples from the sums of their statistics."""


def cell(statistics: Sequence[np.ndarray], value: Value) -> Cell:
    """One method's number: the mean over seeds, with its percentile bootstrap interval (95%).

    Each of 1,000 samples draws test examples, the same ones for every seed, and, where there are several, seeds.

    Args:
        statistics: for each seed float64 [examples, statistics].
        value: the metric.
    """
    values = tuple(value(one.sum(axis=0), len(one)) for one in statistics)
    return Cell(mean=float(np.mean(values)), interval=_percentiles(_samples(statistics, value)), values=values)


def difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray], value: Value) -> Cell:
    """First minus second, on the same examples and seeds (paired bootstrap).

    Args:
        first: for each seed float64 [examples, statistics].
        second: the same of the other method.
        value: the metric.
    """
    values = tuple(
        value(one.sum(axis=0), len(one)) - value(two.sum(axis=0), len(two))
        for one, two in zip(first, second, strict=True)
    )
    samples = _samples(first, value) - _samples(second, value)  # drawn alike, since the generator starts alike
    return Cell(mean=float(np.mean(values)), interval=_percentiles(samples), values=values)


def _samples(statistics: Sequence[np.ndarray], value: Value) -> np.ndarray:
    rng = np.random.default_rng(0)
    examples, seeds = len(statistics[0]), len(statistics)
    means = np.empty(SAMPLES)
    for sample in range(SAMPLES):
        counts = rng.multinomial(examples, np.full(examples, 1 / examples)).astype(np.float64)
        drawn = rng.integers(seeds, size=seeds) if seeds > 1 else [0]
        means[sample] = np.mean([value(counts @ statistics[seed], examples) for seed in drawn])
    return means


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
