"""Intervals against ones that are known otherwise."""

import numpy as np
import pytest

from jexit.eval.intervals import (
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    wilson_interval,
)


def test_the_interval_is_wilsons():
    # Newcombe 1998, table I, method 3: 81 of 263.
    low, high = wilson_interval(81, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_of_many_values_it_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = bootstrap_mean(values, seed=1)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    samples = [rng.exponential(1.0, 60) for _ in range(120)]
    hits = [low <= 1.0 <= high for low, high in map(bootstrap_mean, samples)]
    assert (
        0.88 <= np.mean(hits) <= 0.99
    )  # percentiles of a skewed law cover a little less than 95 %


def test_a_problems_tokens_stay_together():
    """Twice the tokens that are all alike within a problem: no narrower."""
    rng = np.random.default_rng(3)
    depth, tokens = rng.integers(2, 9, 80), rng.integers(5, 30, 80)
    once = bootstrap_ratio(depth * tokens, tokens)
    twice = bootstrap_ratio(2 * depth * tokens, 2 * tokens)
    assert once == pytest.approx(twice)
    mean = (depth * tokens).sum() / tokens.sum()
    assert once[0] < mean < once[1]


def test_pairing_takes_out_what_problems_share():
    rng = np.random.default_rng(4)
    shared, ones = rng.normal(0, 10, 200), np.ones(200)
    ours, theirs = shared + 1.0 + rng.normal(0, 0.1, 200), shared
    low, high = bootstrap_ratio_difference((ours, ones), (theirs, ones))
    assert 0.9 < low < 1.0 < high < 1.1
    assert bootstrap_mean(ours - theirs) == pytest.approx((low, high), abs=1e-9)


def test_refuses_nothing():
    with pytest.raises(ValueError, match="got 0 and 0"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="got 2 and 1"):
        bootstrap_ratio([1, 2], [1])
