"""95 % intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

DRAWS = 4000
_LEVELS = (2.5, 97.5)


def wilson_interval(right: int, of: int, z: float = 1.959964) -> Interval:
    """Score interval of a share (Wilson 1927): sensible at 0, at 1 and for few problems."""
    if of == 0:
        return 0.0, 1.0
    share, square = right / of, z * z / of
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Of a mean over problems, by drawing problems with replacement (Efron 1979, percentiles).

    Of differences between two policies on the same problems it is the paired interval.
    """
    return bootstrap_ratio(values, np.ones(len(values)), seed)


def bootstrap_ratio(
    parts: Sequence[float] | np.ndarray, wholes: Sequence[float] | np.ndarray, seed: int = 0
) -> Interval:
    """Of Σ parts / Σ wholes, such as layers run over tokens; a problem's tokens stay together.

    Raises ValueError without any problem, or for numbers of them that differ.
    """
    parts_N, wholes_N = np.asarray(parts, float), np.asarray(wholes, float)
    if parts_N.shape != wholes_N.shape or not len(parts_N):
        raise ValueError(
            f"an interval needs as many parts as wholes, got {len(parts_N)} and {len(wholes_N)}; "
            "give one of each for every problem"
        )
    return _percentiles(_resampled(parts_N, seed) / _resampled(wholes_N, seed))


def bootstrap_ratio_difference(
    ours: tuple[Sequence[float], Sequence[float]],
    theirs: tuple[Sequence[float], Sequence[float]],
    seed: int = 0,
) -> Interval:
    """Of the difference of two such ratios over the same problems, drawn together."""
    first, second = (
        _resampled(np.asarray(parts, float), seed) / _resampled(np.asarray(wholes, float), seed)
        for parts, wholes in (ours, theirs)
    )
    return _percentiles(first - second)


def _resampled(values_N: np.ndarray, seed: int) -> np.ndarray:
    """Sums of the problems that each draw has: the same problems for the same seed."""
    rng, count = np.random.default_rng(seed), len(values_N)
    drawn = [values_N[rng.integers(0, count, count)].sum() for _ in range(DRAWS)]
    return np.asarray(drawn)


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, _LEVELS)
    return float(low), float(high)
