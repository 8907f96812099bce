"""The intervals of results cover what they say they do, for what is known."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from calm.experiments.methods import intervals


def test_an_interval_covers_what_it_says_and_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(1)

    def mean(sums: np.ndarray, examples: int) -> float:
        return float(sums[0] / sums[1])

    def of_two(drawn: np.ndarray) -> np.ndarray:
        return np.stack([drawn, np.ones_like(drawn)], axis=1)

    covered = 0
    for _ in range(40):
        low, high = intervals.cell([of_two(rng.normal(0.3, 1, size=60))], mean).interval
        covered += low <= 0.3 <= high
    assert 33 <= covered <= 40  # 38 expected

    drawn = rng.normal(0, 1, size=200)
    easy, better = of_two(drawn), of_two(drawn + 0.1 + rng.normal(0, 0.05, size=200))
    paired = intervals.difference([better], [easy], mean).interval
    apart = [intervals.cell([one], mean, (-math.inf, math.inf)).interval for one in (better, easy)]
    assert 0 < paired[0] < 0.1 < paired[1]
    assert apart[0][0] < apart[1][1]  # apart, the two cannot be told from one another


def test_a_difference_of_several_seeds_is_paired_within_each_of_them():
    """What the seeds share, as a better m_A, is no uncertainty of a difference."""
    rng = np.random.default_rng(2)

    def of_two(drawn: list[np.ndarray]) -> list[np.ndarray]:
        return [np.stack([one, np.ones_like(one)], axis=1) for one in drawn]

    def mean(sums: np.ndarray, examples: int) -> float:
        return float(sums[0] / sums[1])

    shared = [rng.normal(10 * seed, 3, size=200) for seed in range(3)]
    better, worse = of_two([one + 0.5 + rng.normal(0, 0.1, size=200) for one in shared]), of_two(shared)
    low, high = intervals.difference(better, worse, mean).interval
    assert 0.4 < low < 0.5 < high < 0.6
    low, high = intervals.difference(better, worse[::-1], mean).interval  # one seed mistaken for another
    assert low < -10 and high > 10


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


def test_the_interval_of_a_share_is_agresti_and_coulls():
    """Two right and two wrong answers are added."""
    for right, examples in ((0, 80), (1, 80), (2, 164), (40, 80), (80, 80)):
        answers = np.repeat([[1.0], [0.0]], [right, examples - right], axis=0)
        shrunk = (right + 2) / (examples + 4)
        away = 1.96 * math.sqrt(shrunk * (1 - shrunk) / (examples + 4))
        low, high = intervals.cell([answers], percent).interval
        assert (low, high) == pytest.approx((max(0, 100 * (shrunk - away)), min(100, 100 * (shrunk + away))))
        exact = binomtest(right, examples).proportion_ci(method="exact")
        assert low < 100 * exact.low + 1.5 and high > 100 * exact.high - 1.5
    hidden = [intervals.cell([np.eye(80)[:, :1] * right], percent).interval[1] for right in (0, 1)]
    assert hidden[0] < hidden[1]  # of a bootstrap with zero repaired it was the other way: 4.5 and 3.75


def test_a_few_answers_that_differ_are_no_difference_yet():
    """Four of 80 that only one method has right: a sign test gives p = 0.125, a bootstrap's interval excluded zero."""
    none, four, nine = (np.repeat([[1.0], [0.0]], [right, 80 - right], axis=0) for right in (0, 4, 9))
    low, high = intervals.difference([four], [none], percent).interval
    away = 1.96 * math.sqrt((5 / 82 - (4 / 82) ** 2) / 82)
    assert (low, high) == pytest.approx((100 * (4 / 82 - away), 100 * (4 / 82 + away)))
    assert low < 0
    assert intervals.difference([nine], [none], percent).interval[0] > 0
    assert intervals.difference([none], [nine], percent).interval[1] < 0


@pytest.mark.parametrize(("share", "seeds"), [(0.01, 1), (0.03, 1), (0.5, 1), (0.02, 3)])
def test_an_interval_of_a_share_covers_it_however_small(share, seeds):
    rng, covered, trials = np.random.default_rng(7), 0, 400
    for _ in range(trials):
        hard = rng.random(100) < share  # all seeds have the same right, which is the worst case
        low, high = intervals.cell([hard[:, None].astype(float)] * seeds, percent).interval
        covered += low <= 100 * share <= high
    assert covered > 0.93 * trials  # a bootstrap alone: 0.59 of 1%


def test_where_nothing_varied_an_interval_says_what_could_still_be_hidden():
    right, wrong = np.ones((80, 1)), np.zeros((80, 1))
    assert 0 < intervals.cell([right], percent).interval[0] < 100
    low, high = intervals.difference([right], [right], percent).interval
    assert low == pytest.approx(-high) and high > 0
    low, high = intervals.cell([right, right, wrong], percent).interval
    assert low == 0 and high == 100  # three seeds that say so different things
    two = intervals.cell([right, wrong], percent)
    assert (two.values, two.mean) == ((100, 0), 50)


def percent(sums: np.ndarray, examples: int) -> float:
    return float(100 * sums[0] / examples)
