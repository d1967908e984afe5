"""Intervals against ones that are known otherwise."""

import math

import numpy as np
import pytest

from jexit.eval import intervals
from jexit.eval.intervals import (
    bootstrap_lost_difference,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    lost_interval,
    paired_interval,
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
    values = np.random.default_rng(0).uniform(-1, 1, 2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    low, high = bootstrap_mean(values, seed=1)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_of_right_and_wrong_it_is_jeffreys():
    # Quantiles of Beta(k + ½, n − k + ½), k = 3 of n = 10, by numerical integration.
    grid = (np.arange(200_000) + 0.5) / 200_000
    law = np.cumsum(grid**2.5 * (1 - grid) ** 6.5)
    truth = np.interp([0.025, 0.975], law / law[-1], grid)
    made = [bootstrap_mean([1.0] * 3 + [0.0] * 7, seed, (0.0, 1.0)) for seed in range(20)]
    assert np.mean(made, axis=0) == pytest.approx(truth, abs=0.006)


def test_agresti_and_min_add_half_a_problem_to_each_outcome():
    """Their formula in counts: b ours alone, c theirs alone, N = n + 2."""
    ours, theirs = np.repeat([(1, 1), (1, 0), (0, 1), (0, 0)], (20, 9, 3, 8), axis=0).T
    b, c, total = 9.5, 3.5, 42
    middle = (b - c) / total
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / total) / total
    assert paired_interval(ours, theirs) == pytest.approx((middle - half, middle + half))
    low, high = paired_interval(theirs, ours)
    assert (-high, -low) == pytest.approx((middle - half, middle + half))


def discordant(rng, size, ours, theirs):
    """Right or wrong under two policies: that share right under one alone."""
    drawn = rng.random(size)
    return (drawn < ours) * 1.0, ((drawn >= ours) & (drawn < ours + theirs)) * 1.0


@pytest.mark.parametrize(
    ("size", "ours", "theirs"),
    [
        (60, 0.05, 0.0), (60, 0.03, 0.01), (30, 0.1, 0.02), (20, 0.5, 0.0), (96, 0.98, 0.0),
        (10, 0.3, 0.1), (12, 0.7, 0.1), (40, 0.25, 0.25),
    ],
)  # fmt: skip
def test_paired_differences_are_covered(size, ours, theirs):
    rng, hits = np.random.default_rng(5), []
    for _ in range(1000):
        low, high = paired_interval(*discordant(rng, size, ours, theirs))
        hits.append(low <= ours - theirs <= high)
        assert high > low
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize(("size", "share"), [(12, 0.1), (30, 0.03), (60, 0.5), (60, 0.98)])
def test_shares_are_covered(size, share):
    counts = np.random.default_rng(6).binomial(size, share, 2000)
    hits = [low <= share <= high for low, high in (wilson_interval(k, size) for k in counts)]
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("size", [12, 40])
def test_means_within_bounds_are_covered(size, monkeypatch):
    """Fifths that are mostly 0 or 1, as the shares of a few steps are."""
    monkeypatch.setattr(intervals, "DRAWS", 800)
    rng, hits = np.random.default_rng(7), []
    for _ in range(400):
        values = rng.choice([0.0, 0.2, 0.8, 1.0], size, p=[0.1, 0.05, 0.15, 0.7])
        low, high = bootstrap_mean(values, bounds=(0.0, 1.0))
        hits.append(low <= 0.83 <= high)
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("size", [20, 60])
@pytest.mark.parametrize(("kept", "before"), [(0.75, 0.75), (0.2, 0.75), (0.05, 0.75), (0.9, 0.95)])
@pytest.mark.parametrize("parts", [1, 4])
def test_losses_are_covered(size, kept, before, parts):
    """`kept` is one draw a problem, as after a changed step, or the mean of four prefixes."""
    rng, hits = np.random.default_rng(8), []
    for _ in range(1000):
        whole = (rng.random(size) < before) * 1.0
        left = (rng.random((size, parts)) < kept).mean(1)
        low, high = lost_interval(left, whole)
        hits.append(low <= 1 - kept / before <= high)
    assert np.mean(hits) >= 0.93


def test_differences_of_losses_are_covered(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 600)
    rng, hits = np.random.default_rng(9), []
    for _ in range(400):
        arms = [
            ((rng.random(40) < kept) * 1.0, (rng.random(40) < 0.8) * 1.0) for kept in (0.2, 0.6)
        ]
        low, high = bootstrap_lost_difference(*arms)
        hits.append(low <= (0.6 - 0.2) / 0.8 <= high)
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_problems_that_are_all_alike_leave_a_width(count, value):
    same, ones = np.full(count, value), np.ones(count)
    made = [
        (value, bootstrap_mean(same, bounds=(0.0, 1.0))),
        (value, bootstrap_mean(same)),
        (value, wilson_interval(int(value) * count, count)),
        (0.0, paired_interval(same, same)),
        (value, paired_interval(same, np.zeros(count))),
        (1 - value, lost_interval(same, ones)),
        (0.0, bootstrap_lost_difference((same, ones), (same, ones))),
    ]
    for truth, (low, high) in made:
        assert low <= truth + 1e-9 and truth - 1e-9 <= high
        assert high - low > 0.5 / count


def test_what_cannot_be_told_is_the_whole_range():
    nothing = np.zeros(20)
    low, high = lost_interval(nothing, nothing)
    assert high - low >= 1
    assert lost_interval([], []) == (-1.0, 1.0)
    low, high = paired_interval([], [])
    assert high - low > 1.5


def by_tokens(values, depths, lengths, seed):
    """A bootstrap that draws tokens, each of which has its problem's depth."""
    rng = np.random.default_rng(seed)
    tokens = np.repeat(depths, lengths)
    means = [rng.choice(tokens, len(tokens)).mean() for _ in range(values)]
    return np.percentile(means, [2.5, 97.5])


def test_a_problems_tokens_stay_together():
    """Where depth differs between problems alone, drawing tokens would be far too sure."""
    rng = np.random.default_rng(3)
    depths, lengths = rng.integers(2, 9, 80), rng.integers(5, 30, 80)
    low, high = bootstrap_ratio(depths * lengths, lengths)
    token_low, token_high = by_tokens(1000, depths, lengths, 1)
    assert low < token_low < token_high < high
    # Tokens that are all alike count once: √(tokens of a problem) times as wide, and some more as
    # lengths differ.
    ratio = (high - low) / (token_high - token_low)
    assert 0.9 * np.sqrt(lengths.mean()) < ratio < 1.4 * np.sqrt(lengths.mean())


def test_pairing_takes_out_what_problems_share():
    rng = np.random.default_rng(4)
    shared, ones = rng.normal(0, 10, 200), np.ones(200)
    ours, theirs = shared + 1.0 + rng.normal(0, 0.1, 200), shared
    low, high = bootstrap_ratio_difference((ours, ones), (theirs, ones))
    assert 0.9 < low < 1.0 < high < 1.1
    spread = np.asarray(bootstrap_mean(ours - theirs, bounds=(0.0, 2.0))) - (low, high)
    assert np.abs(spread).max() < 0.02


def test_refuses_nothing():
    with pytest.raises(ValueError, match="at least one problem, got 0"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match=r"lie in 0 … 2 and the bounds are \(-1"):
        bootstrap_mean([0, 2])
    with pytest.raises(ValueError, match="got 2 and 1"):
        bootstrap_ratio([1, 2], [1])
