"""95 % intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jexit.results import Interval

Values = Sequence[float] | np.ndarray  # one of each problem
DRAWS = 4000
Z = 1.959964
_LEVELS = (2.5, 97.5)
_CORNERS_CX = np.asarray([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
_CORNERS = len(_CORNERS_CX)
_PSEUDO = 0.5  # problems added at each corner or bound


def wilson_interval(correct: int, of: int) -> Interval:
    """Score interval of a share (Wilson 1927): sensible at 0, at 1 and for few problems."""
    if of == 0:
        return 0.0, 1.0
    share, square = correct / of, Z * Z / of
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(ours: Values, theirs: Values) -> Interval:
    """Of mean(ours) − mean(theirs), two numbers in 0 … 1 of each problem, such as correct or not.

    The normal interval after half a problem has been added for each of the four outcomes (both,
    ours alone, theirs alone, neither): d ± z·√(var / (n + 2)). It has a width where all problems
    are alike and keeps its coverage for few of them. (Agresti and Min 2005, Statistics in Medicine
    24, 729, section 3.)
    """
    rows_NX, weights_N = _with_corners(ours, theirs)
    differences_N = rows_NX[:, 0] - rows_NX[:, 1]
    total = weights_N.sum()
    middle = weights_N @ differences_N / total
    variance = weights_N @ (differences_N - middle) ** 2 / total**2
    half = Z * math.sqrt(variance)
    value = float(np.mean(ours) - np.mean(theirs)) if len(ours) else math.nan
    return _around(value, middle - half, middle + half, (-1.0, 1.0))


def lost_interval(kept: Values, before: Values) -> Interval:
    """Of 1 − Σ kept / Σ before, two numbers in 0 … 1 of each problem.

    The r for which mean(kept) − r·mean(before) is within z standard errors of 0 (Fieller 1954),
    after `paired_interval`'s half problems have been added; cut at −1, as r has no upper end when
    `before` may be 0.
    """
    rows_NX, weights_N = _with_corners(kept, before)
    total = weights_N.sum()
    means_X = weights_N @ rows_NX / total
    apart_NX = rows_NX - means_X
    errors_XX = (apart_NX * weights_N[:, None]).T @ apart_NX * (Z / total) ** 2
    square = means_X[1] ** 2 - errors_XX[1, 1]
    middle = means_X[0] * means_X[1] - errors_XX[0, 1]
    root = math.sqrt(max(middle**2 - square * (means_X[0] ** 2 - errors_XX[0, 0]), 0.0))
    low, high = -1.0, 1.0
    if square > 0:
        low, high = 1 - (middle + root) / square, 1 - (middle - root) / square
    whole = float(np.sum(before))
    value = 1 - float(np.sum(kept)) / whole if whole else math.nan
    return _around(value, low, high, (-1.0, 1.0))


def bootstrap_mean(values: Values, seed: int, bounds: Interval) -> Interval:
    """Of a mean over problems of values between `bounds`, by drawing the problems' weights.

    A Bayesian bootstrap (Rubin 1981) with half a problem at each bound, so that values that are all
    alike leave a width: of correct and wrong it is the interval of Jeffreys' prior (Brown, Cai and
    DasGupta 2001). Of differences between two policies on the same problems it is paired.
    """
    values_N = np.asarray(values, float)
    weights_DN = _drawn_weights(len(values_N), len(bounds), seed)
    means_D = weights_DN @ np.append(values_N, bounds) / weights_DN.sum(1)
    return _around(values_N.mean(), *_percentiles(means_D), bounds)


def bootstrap_lost_difference(
    ours: tuple[Values, Values], theirs: tuple[Values, Values], seed: int = 0
) -> Interval:
    """Of the difference of two `1 − Σ kept / Σ before` over the same problems, weighted together.

    The weights are `bootstrap_mean`'s, with half a problem for each outcome of ours, which meets
    the opposite one of theirs.
    """
    losses = []
    for (kept, before), corners_CX in ((ours, _CORNERS_CX), (theirs, 1 - _CORNERS_CX)):
        rows_NX = np.vstack([np.stack([kept, before], 1), corners_CX])
        sums_DX = _drawn_weights(len(kept), _CORNERS, seed) @ rows_NX
        losses.append(1 - sums_DX[:, 0] / sums_DX[:, 1])
    whole = np.sum(ours[1]), np.sum(theirs[1])
    value = math.nan
    if all(whole):
        value = np.sum(theirs[0]) / whole[1] - np.sum(ours[0]) / whole[0]
    return _around(float(value), *_percentiles(losses[0] - losses[1]), (-2.0, 2.0))


def bootstrap_ratio(parts: Values, wholes: Values, seed: int = 0) -> Interval:
    """Of Σ parts / Σ wholes, such as layers run over tokens; a problem's tokens stay together.

    Problems are drawn with replacement (Efron 1979, percentiles). A ratio that every problem has,
    such as the depth of a policy that stops all tokens alike, is no estimate and has no width.
    """
    return _percentiles(_resampled(parts, seed) / _resampled(wholes, seed))


def bootstrap_ratio_difference(
    ours: tuple[Values, Values], theirs: tuple[Values, Values], seed: int = 0
) -> Interval:
    """Of the difference of two such ratios over the same problems, drawn together."""
    first, second = (
        _resampled(parts, seed) / _resampled(wholes, seed) for parts, wholes in (ours, theirs)
    )
    return _percentiles(first - second)


def _resampled(values: Values, seed: int) -> np.ndarray:
    """Sums of the problems that each draw has: the same problems for the same seed."""
    values_N, rng, count = np.asarray(values, float), np.random.default_rng(seed), len(values)
    drawn = [values_N[rng.integers(0, count, count)].sum() for _ in range(DRAWS)]
    return np.asarray(drawn)


def _with_corners(first: Values, second: Values) -> tuple[np.ndarray, np.ndarray]:
    """[N + 4, 2] values and their weights: the problems, and half a one of each outcome."""
    pairs_NX = np.stack([np.asarray(first, float), np.asarray(second, float)], 1)
    weights_N = np.append(np.ones(len(pairs_NX)), np.full(_CORNERS, _PSEUDO))
    return np.vstack([pairs_NX, _CORNERS_CX]), weights_N


def _drawn_weights(problems: int, pseudo: int, seed: int) -> np.ndarray:
    """[DRAWS, problems + pseudo] weights: normalised, a row is a Dirichlet draw."""
    shapes_N = np.append(np.ones(problems), np.full(pseudo, _PSEUDO))
    return np.random.default_rng(seed).gamma(shapes_N, size=(DRAWS, len(shapes_N)))


def _around(value: float, low: float, high: float, limits: Interval) -> Interval:
    """The interval within the limits, and reaching to the value that was measured (not if NaN)."""
    ends = np.clip([low, high], *limits)
    return float(np.fmin(ends[0], value)), float(np.fmax(ends[1], value))


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, _LEVELS)
    return float(low), float(high)
