"""Computes 95 % confidence intervals whose sampling unit is the problem."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from jexit.results import Interval

Values = Sequence[float] | np.ndarray  # one value per problem
DRAWS = 4000
Z = 1.959964
_LEVELS = (2.5, 97.5)
_CORNERS_42 = np.asarray([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
_CORNERS = len(_CORNERS_42)
_PSEUDO = 0.5  # problems added at each corner or bound


def wilson_interval(correct: int, of: int) -> Interval:
    """Returns the 95 % score interval of `correct` / `of` (Wilson 1927), or 0 to 1 if `of` is 0."""
    if of == 0:
        return 0.0, 1.0
    share, square = correct / of, Z * Z / of
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(ours: Values, theirs: Values) -> Interval:
    """Returns the 95 % interval of mean(ours) − mean(theirs), for values from 0 to 1.

    `ours` and `theirs` contain one value for each of the same problems. The interval is the normal
    interval d ± z·√(var / (n + 2)) after half a problem has been added for each of the four
    outcomes (both correct, ours only, theirs only, neither), so it has a width even if all problems
    have the same outcome. (Agresti and Min 2005, Statistics in Medicine 24, 729, section 3.)
    """
    rows_N2, weights_N = _with_corners(ours, theirs)
    differences_N = rows_N2[:, 0] - rows_N2[:, 1]
    total = weights_N.sum()
    middle = weights_N @ differences_N / total
    variance = weights_N @ (differences_N - middle) ** 2 / total**2
    half = Z * math.sqrt(variance)
    value = float(np.mean(ours) - np.mean(theirs)) if len(ours) else math.nan
    return _around(value, middle - half, middle + half, (-1.0, 1.0))


def lost_interval(kept: Values, before: Values) -> Interval:
    """Returns the 95 % interval of 1 − Σ kept / Σ before, for values from 0 to 1.

    `kept` and `before` contain one value for each of the same problems. Half a problem is first
    added for each outcome, as in `paired_interval`. The interval then contains 1 − r for each r
    such that mean(kept) − r·mean(before) is within z standard errors of 0 (Fieller 1954). The
    interval is limited to −1 … 1, because r has no upper end when mean(before) may be 0.
    """
    rows_N2, weights_N = _with_corners(kept, before)
    total = weights_N.sum()
    means_2 = weights_N @ rows_N2 / total
    apart_N2 = rows_N2 - means_2
    errors_22 = (apart_N2 * weights_N[:, None]).T @ apart_N2 * (Z / total) ** 2
    square = means_2[1] ** 2 - errors_22[1, 1]
    middle = means_2[0] * means_2[1] - errors_22[0, 1]
    root = math.sqrt(max(middle**2 - square * (means_2[0] ** 2 - errors_22[0, 0]), 0.0))
    low, high = -1.0, 1.0
    if square > 0:
        low, high = 1 - (middle + root) / square, 1 - (middle - root) / square
    whole = float(np.sum(before))
    value = 1 - float(np.sum(kept)) / whole if whole else math.nan
    return _around(value, low, high, (-1.0, 1.0))


def bootstrap_mean(values: Values, seed: int, bounds: Interval) -> Interval:
    """Returns the 95 % bootstrap interval of the mean of `values`, which lie between `bounds`.

    The Bayesian bootstrap (Rubin 1981) draws a weight for each problem. Half a problem is added at
    each bound, so the interval has a width even if all values are equal. For values of 0 and 1, the
    interval is that of Jeffreys' prior (Brown, Cai and DasGupta 2001).
    """
    values_N = np.asarray(values, float)
    weights_IN = _drawn_weights(len(values_N), len(bounds), seed)
    means_I = weights_IN @ np.append(values_N, bounds) / weights_IN.sum(1)
    return _around(values_N.mean(), *percentile_interval(means_I), bounds)


def bootstrap_lost_difference(
    ours: tuple[Values, Values], theirs: tuple[Values, Values], seed: int = 0
) -> Interval:
    """Returns the 95 % interval of ours − theirs, where each value is 1 − Σ kept / Σ before.

    `ours` and `theirs` are pairs (kept, before) with one value for each of the same problems. Each
    draw gives a problem the same weight in both pairs (see `bootstrap_mean`). Half a problem is
    added for each outcome of `ours`, together with the opposite outcome of `theirs`.
    """
    losses = []
    for (kept, before), corners_42 in ((ours, _CORNERS_42), (theirs, 1 - _CORNERS_42)):
        rows_N2 = np.vstack([np.stack([kept, before], 1), corners_42])
        sums_I2 = _drawn_weights(len(kept), _CORNERS, seed) @ rows_N2
        losses.append(1 - sums_I2[:, 0] / sums_I2[:, 1])
    whole = np.sum(ours[1]), np.sum(theirs[1])
    value = math.nan
    if all(whole):
        value = np.sum(theirs[0]) / whole[1] - np.sum(ours[0]) / whole[0]
    return _around(float(value), *percentile_interval(losses[0] - losses[1]), (-2.0, 2.0))


def bootstrap_ratio(parts: Values, wholes: Values) -> Interval:
    """Returns the 95 % interval of Σ parts / Σ wholes, such as layers run per token.

    Whole problems are drawn with replacement (Efron 1979, percentiles), so the tokens of one
    problem stay together. The width is 0 if every problem has the same ratio.
    """
    return percentile_interval(_resampled(parts, 0) / _resampled(wholes, 0))


def bootstrap_ratio_difference(
    ours: tuple[Values, Values], theirs: tuple[Values, Values], seed: int = 0
) -> Interval:
    """Returns the 95 % interval of the difference ours − theirs of two ratios Σ parts / Σ wholes.

    `ours` and `theirs` are pairs (parts, wholes). Each draw resamples the same problems for both.
    """
    first, second = (
        _resampled(parts, seed) / _resampled(wholes, seed) for parts, wholes in (ours, theirs)
    )
    return percentile_interval(first - second)


def drawn_over_runs(values_RN: np.ndarray, *pseudo: float) -> np.ndarray:
    """Draws means [DRAWS] of R runs' values on the same N problems, for intervals over both.

    Each draw takes R − 1 of the R runs with replacement and, independently, a weight for each
    problem (see `bootstrap_mean`). With R − 1 of them, the variance between runs is not
    underestimated (Rao and Wu 1988, Journal of the American Statistical Association 83, 231).
    `pseudo` are the values of additional half problems. Arrays of the same shape get the same
    draws.
    """
    runs, problems = np.shape(values_RN)
    taken = max(runs - 1, 1)
    share_IR = np.random.default_rng(0).multinomial(taken, [1 / runs] * runs, DRAWS) / taken
    weights_IN = _drawn_weights(problems, len(pseudo), 1)
    means_IN = np.pad(share_IR @ values_RN, ((0, 0), (0, len(pseudo))))
    means_IN[:, problems:] = pseudo
    return (means_IN * weights_IN).sum(1) / weights_IN.sum(1)


def _resampled(values: Values, seed: int) -> np.ndarray:
    """Returns `DRAWS` sums of `values`, each over len(values) problems drawn with replacement.

    One seed draws the same problems for all `values` of the same length.
    """
    return _drawn_counts(len(values), seed) @ np.asarray(values, float)


@functools.lru_cache(maxsize=1)
def _drawn_counts(problems: int, seed: int) -> np.ndarray:
    """Draws `problems` problems with replacement `DRAWS` times; returns how often each occurs."""
    rng, counts_IN = np.random.default_rng(seed), np.empty((DRAWS, problems))
    for counts_N in counts_IN:
        counts_N[:] = np.bincount(rng.integers(0, problems, problems), minlength=problems)
    return counts_IN


def _with_corners(first: Values, second: Values) -> tuple[np.ndarray, np.ndarray]:
    """Appends the outcomes (0, 0), (0, 1), (1, 0) and (1, 1) to N pairs, each with the weight ½.

    Returns the pairs [N + 4, 2] and their weights [N + 4], which are 1 for the given pairs.
    """
    pairs_N2 = np.stack([np.asarray(first, float), np.asarray(second, float)], 1)
    weights_N = np.append(np.ones(len(pairs_N2)), np.full(_CORNERS, _PSEUDO))
    return np.vstack([pairs_N2, _CORNERS_42]), weights_N


def _drawn_weights(problems: int, pseudo: int, seed: int) -> np.ndarray:
    """Draws Bayesian bootstrap weights [DRAWS, problems + pseudo], which are not normalised.

    A row divided by its sum is a Dirichlet draw. The last `pseudo` columns are the weights of
    additional half problems.
    """
    shapes_N = np.append(np.ones(problems), np.full(pseudo, _PSEUDO))
    return np.random.default_rng(seed).gamma(shapes_N, size=(DRAWS, len(shapes_N)))


def _around(value: float, low: float, high: float, limits: Interval) -> Interval:
    """Returns (low, high), clipped to `limits` and then extended to contain `value`, if not NaN."""
    ends = np.clip([low, high], *limits)
    return float(np.fmin(ends[0], value)), float(np.fmax(ends[1], value))


def percentile_interval(values: np.ndarray) -> Interval:
    """Returns the percentiles 2.5 and 97.5 of drawn values."""
    low, high = np.percentile(values, _LEVELS)
    return float(low), float(high)
