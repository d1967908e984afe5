"""Intervals against ones that are known otherwise."""

import math

import numpy as np
import pytest

from jexit.evaluation import intervals
from jexit.evaluation.intervals import (
    bootstrap_lost_difference,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_difference,
    drawn_over_runs,
    lost_interval,
    paired_interval,
    percentile_interval,
    wilson_interval,
)


def test_formulas_of_the_literature():
    # Newcombe 1998, table I, method 3: 81 of 263.
    low, high = wilson_interval(81, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(0, 0) == (0.0, 1.0)
    # Agresti and Min in counts: b ours alone, c theirs alone, N = n + 2.
    ours, theirs = np.repeat([(1, 1), (1, 0), (0, 1), (0, 0)], (20, 9, 3, 8), axis=0).T
    b, c, total = 9.5, 3.5, 42
    middle = (b - c) / total
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / total) / total
    assert paired_interval(ours, theirs) == pytest.approx((middle - half, middle + half))
    assert paired_interval(theirs, ours) == pytest.approx((-middle - half, -middle + half))
    # A bootstrapped mean is the normal interval of many, and Jeffreys' of correct and wrong:
    # quantiles of Beta(k + ½, n − k + ½), k = 3 of n = 10, by numerical integration.
    values = np.random.default_rng(0).uniform(-1, 1, 2000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    found = bootstrap_mean(values, 1, (-1.0, 1.0))
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    grid = (np.arange(200_000) + 0.5) / 200_000
    mass = np.cumsum(grid**2.5 * (1 - grid) ** 6.5)
    truth = np.interp([0.025, 0.975], mass / mass[-1], grid)
    made = [bootstrap_mean([1.0] * 3 + [0.0] * 7, seed, (0.0, 1.0)) for seed in range(20)]
    assert np.mean(made, axis=0) == pytest.approx(truth, abs=0.006)


def of_shares(rng, size, share):
    return wilson_interval(rng.binomial(size, share), size)


def of_pairs(rng, size, ours, theirs):
    """Correct under one policy alone with these shares."""
    drawn = rng.random(size)
    return paired_interval(drawn < ours, (drawn >= ours) & (drawn < ours + theirs))


def of_losses(rng, size, kept, before, parts):
    """`kept` is one draw a problem, as after a changed step, or the mean of some prefixes."""
    left = (rng.random((size, parts)) < kept).mean(1)
    return lost_interval(left, rng.random(size) < before)


def of_means(rng):
    """Fifths that are mostly 0 or 1, as the shares of a few steps are."""
    fifths = rng.choice([0.0, 0.2, 0.8, 1.0], 12, p=[0.1, 0.05, 0.15, 0.7])
    return bootstrap_mean(fifths, 0, (0.0, 1.0))


def of_loss_differences(rng):
    arms = [(rng.random(40) < kept, rng.random(40) < 0.8) for kept in (0.2, 0.6)]
    return bootstrap_lost_difference(*arms)


def coverage(interval_of, truth, *settings):
    """How often the interval of what is drawn holds the truth."""
    rng = np.random.default_rng(5)
    made = [interval_of(rng, *settings) for _ in range(400)]
    assert all(high > low for low, high in made)
    return np.mean([low <= truth <= high for low, high in made])


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 600)
    for size, share in ((12, 0.1), (30, 0.03), (60, 0.98)):
        assert coverage(of_shares, share, size, share) >= 0.93, (size, share)
    for size, ours, theirs in ((60, 0.05, 0.0), (20, 0.5, 0.0), (10, 0.3, 0.1), (40, 0.25, 0.25)):
        assert coverage(of_pairs, ours - theirs, size, ours, theirs) >= 0.93, (size, ours, theirs)
    for size, kept, before, parts in (
        (20, 0.75, 0.75, 1), (60, 0.2, 0.75, 4), (20, 0.05, 0.75, 4), (60, 0.9, 0.95, 1),
    ):  # fmt: skip
        truth, settings = 1 - kept / before, (size, kept, before, parts)
        assert coverage(of_losses, truth, *settings) >= 0.93, settings
    assert coverage(of_means, 0.83) >= 0.93
    assert coverage(of_loss_differences, (0.6 - 0.2) / 0.8) >= 0.93


def test_problems_that_are_all_alike_leave_a_width():
    for count in (1, 5, 60):
        for value in (0.0, 1.0):
            same, ones = np.full(count, value), np.ones(count)
            made = [
                (value, bootstrap_mean(same, 0, (0.0, 1.0))),
                (value, wilson_interval(int(value) * count, count)),
                (0.0, paired_interval(same, same)),
                (value, paired_interval(same, np.zeros(count))),
                (1 - value, lost_interval(same, ones)),
                (0.0, bootstrap_lost_difference((same, ones), (same, ones))),
            ]
            for truth, (low, high) in made:
                assert low <= truth + 1e-9 and truth - 1e-9 <= high
                assert high - low > 0.5 / count
    # What cannot be told is the whole range.
    assert lost_interval([], []) == (-1.0, 1.0)
    for low, high in (lost_interval(np.zeros(20), np.zeros(20)), paired_interval([], [])):
        assert high - low >= 1


def test_a_problems_tokens_stay_together_and_pairing_takes_out_what_problems_share():
    """Where depth differs between problems alone, drawing tokens would be far too sure."""
    rng = np.random.default_rng(3)
    depths, lengths = rng.integers(2, 9, 80), rng.integers(5, 30, 80)
    low, high = bootstrap_ratio(depths * lengths, lengths)
    tokens = np.repeat(depths, lengths)
    means = [rng.choice(tokens, len(tokens)).mean() for _ in range(1000)]
    token_low, token_high = np.percentile(means, [2.5, 97.5])
    assert low < token_low < token_high < high
    # Tokens that are all alike count once: √(tokens of a problem) times as wide, and some more as
    # lengths differ.
    ratio = (high - low) / (token_high - token_low)
    assert 0.9 * np.sqrt(lengths.mean()) < ratio < 1.4 * np.sqrt(lengths.mean())
    rng = np.random.default_rng(4)
    shared, ones = rng.normal(0, 10, 200), np.ones(200)
    ours, theirs = shared + 1.0 + rng.normal(0, 0.1, 200), shared
    low, high = bootstrap_ratio_difference((ours, ones), (theirs, ones))
    assert 0.9 < low < 1.0 < high < 1.1
    spread = np.asarray(bootstrap_mean(ours - theirs, 0, (0.0, 2.0))) - (low, high)
    assert np.abs(spread).max() < 0.02


def test_draws_over_runs_have_the_variance_of_both_runs_and_problems(monkeypatch):
    """The variance of a mean over R runs is the unbiased variance between them, over R."""
    rng = np.random.default_rng(6)
    runs_R = rng.normal(0, 0.3, 4)
    drawn_I = drawn_over_runs(np.repeat(runs_R[:, None], 50, axis=1))
    assert drawn_I.std() == pytest.approx(runs_R.std(ddof=1) / 2, rel=0.05)
    problems_N = rng.normal(0, 1, 200)
    alike_I = drawn_over_runs(np.tile(problems_N, (4, 1)))
    assert alike_I.std() == pytest.approx(problems_N.std() / np.sqrt(200), rel=0.06)
    both_I = drawn_over_runs(runs_R[:, None] + problems_N)
    assert both_I.var() == pytest.approx(drawn_I.var() + alike_I.var(), rel=0.06)
    one_I = drawn_over_runs(np.ones((1, 9)), 0, 1)  # half problems leave a width
    assert percentile_interval(one_I)[0] < 0.95 < percentile_interval(one_I)[1] <= 1
    # Five seeds that differ as much as their problems, and answers that are correct or wrong.
    monkeypatch.setattr(intervals, "DRAWS", 600)

    def of_runs(rng):
        shares_R = 0.6 + rng.uniform(-0.05, 0.05, 5)
        answers_RN = rng.random((5, 200)) < shares_R[:, None]
        return percentile_interval(drawn_over_runs(answers_RN.astype(float), 0, 1))

    assert coverage(of_runs, 0.6) >= 0.93
