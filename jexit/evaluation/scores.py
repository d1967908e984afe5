"""A measure's scores on single problems, for comparing two policies on the same problems."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jexit.evaluation.intervals import (
    bootstrap_lost_difference,
    bootstrap_mean,
    lost_interval,
    paired_interval,
    wilson_interval,
)
from jexit.results import Interval, PairedMeasure

Kind = Literal["share", "difference", "lost"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Two numbers from 0 to 1 per problem, and the statistic computed from these numbers.

    The statistic `share` is the mean of `first`, whose entries are 0 or 1. `difference` is the mean
    of `first` minus the mean of `second`. `lost` is 1 − Σ first / Σ second, or NaN if `second` is 0
    for all problems. `numbers` contains the index of each problem in the evaluation.
    """

    kind: Kind
    numbers: Sequence[int]
    first: Sequence[float]
    second: Sequence[float]

    @property
    def value(self) -> float:
        if not self.numbers:
            return math.nan
        if self.kind == "lost":
            whole = float(np.sum(self.second))
            return 1 - float(np.sum(self.first)) / whole if whole else math.nan
        return float(np.mean(self._values))

    @property
    def ci95(self) -> Interval:
        if self.kind == "lost":
            return lost_interval(self.first, self.second)
        if self.kind == "difference":
            return paired_interval(self.first, self.second)
        return wilson_interval(round(sum(self.first)), len(self.numbers))

    @property
    def _values(self) -> np.ndarray:
        first, second = np.asarray(self.first, float), np.asarray(self.second, float)
        return first if self.kind == "share" else first - second

    def of(self, numbers: Sequence[int]) -> Scores:
        """Returns the scores of the problems `numbers`, in this order; all must be in `self`."""
        places = {number: place for place, number in enumerate(self.numbers)}
        chosen = [places[number] for number in numbers]
        return Scores(
            kind=self.kind,
            numbers=numbers,
            first=[self.first[place] for place in chosen],
            second=[self.second[place] for place in chosen],
        )

    @classmethod
    def shares(cls, numbers: Sequence[int], values: Sequence[float]) -> Scores:
        return cls(kind="share", numbers=numbers, first=values, second=[0.0] * len(values))


def paired(
    policy: str, measure: str, ours: Scores, theirs: Scores, seed: int = 0
) -> PairedMeasure | None:
    """Compares a policy's scores (`ours`) with full depth (`theirs`) on their common problems.

    The record's `difference` is ours − theirs. Returns None if no problem is common to both.
    """
    common = sorted(set(ours.numbers) & set(theirs.numbers))
    if not common:
        return None
    ours, theirs = ours.of(common), theirs.of(common)
    if ours.kind == "lost":
        interval = bootstrap_lost_difference(
            (ours.first, ours.second), (theirs.first, theirs.second), seed
        )
    elif ours.kind == "difference":
        interval = bootstrap_mean(ours._values - theirs._values, seed, (-2.0, 2.0))
    else:
        interval = paired_interval(ours.first, theirs.first)
    return PairedMeasure(
        policy=policy,
        against="full",
        measure=measure,
        value=ours.value,
        against_value=theirs.value,
        difference=ours.value - theirs.value,
        difference_ci95=interval,
        problems=len(common),
    )
