"""The intervals of results cover what they say they do, for what is known."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from calm.experiments.methods import intervals


def test_an_interval_covers_what_it_says_and_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(1)

    def mean(sums: np.ndarray, examples: int) -> float:
        return float(sums[0] / examples)

    covered = 0
    for _ in range(40):
        drawn = rng.normal(0.3, 1, size=(60, 1))
        low, high = intervals.cell([drawn], mean).interval
        covered += low <= 0.3 <= high
    assert 33 <= covered <= 40  # 38 expected

    easy = rng.normal(0, 1, size=(200, 1))
    better = easy + 0.1 + rng.normal(0, 0.05, size=(200, 1))
    paired = intervals.difference([better], [easy], mean).interval
    apart = [intervals.cell([one], mean, (-math.inf, math.inf)).interval for one in (better, easy)]
    assert 0 < paired[0] < 0.1 < paired[1]
    assert apart[0][0] < apart[1][1]  # apart, the two cannot be told from one another


@pytest.mark.parametrize(("seeds", "between"), [(2, 10), (3, 10), (3, 0), (5, 3)])
def test_an_interval_covers_what_other_seeds_and_other_examples_would_give(seeds, between):
    """Of trainings whose accuracies lie around 60% with that spread, on 100 examples that all of them answer."""
    rng, covered, trials = np.random.default_rng(seeds), 0, 150
    for _ in range(trials):
        difficulty = rng.uniform(0, 100, size=100)
        solved = [difficulty < 60 + rng.normal(0, between) + rng.normal(0, 20, size=100) for _ in range(seeds)]
        low, high = intervals.cell([one[:, None].astype(float) for one in solved], percent).interval
        covered += low <= 60 <= high
    assert covered > 0.93 * trials  # resampling the seeds: 0.67 of two, 0.79 of three that spread by 10


def test_where_nothing_varied_an_interval_says_what_could_still_be_hidden():
    right, wrong = np.ones((80, 1)), np.zeros((80, 1))
    hidden = 100 * binomtest(0, 80).proportion_ci(method="exact").high
    assert intervals.cell([right], percent).interval == (pytest.approx(100 - hidden), 100)
    assert intervals.cell([wrong], percent).interval == (0, pytest.approx(hidden))
    assert intervals.difference([right], [right], percent).interval == pytest.approx((-hidden, hidden))
    low, high = intervals.cell([right, right, wrong], percent).interval
    assert low == 0 and high == 100  # three seeds that say so different things
    two = intervals.cell([right, wrong], percent)
    assert (two.values, two.mean) == ((100, 0), 50)


def percent(sums: np.ndarray, examples: int) -> float:
    return float(100 * sums[0] / examples)
