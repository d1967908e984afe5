"""Intervals over the seeds of a setting, from a bootstrap over its runs and their problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jexit.evaluation.compare import Outcomes, check_same_problems
from jexit.evaluation.intervals import drawn_over_runs, percentile_interval


def over_seeds(runs: Sequence[Outcomes], initial: Outcomes | None = None) -> dict[str, float]:
    """Returns the ends of 95 % intervals of the mean over the runs of one setting and policy.

    The numbers are those of an evaluation (`accuracy`, `depth_fraction`, `layers_per_problem`) and,
    with `initial`, the gains over that evaluation (`differences` in jexit.evaluation.compare),
    under names such as `accuracy_ci95/low`. Raises UserError if the runs' problems differ.
    """
    check_same_problems(*runs, *([initial] if initial else []))
    shape = len(runs), len(runs[0].problems)
    correct_RN, layers_RN, tokens_RN = (
        np.stack([getattr(run, name) for run in runs])
        for name in ("correct_N", "layers_N", "tokens_N")
    )
    layers_I = drawn_over_runs(layers_RN)
    depth_I = layers_I / drawn_over_runs(tokens_RN) / runs[0].layers
    drawn = {
        "": {
            "accuracy": drawn_over_runs(correct_RN, 0, 1),
            "depth_fraction": depth_I,
            "layers_per_problem": layers_I,
        }
    }
    if initial:
        difference_RN = correct_RN - initial.correct_N
        theirs_I, tokens_I = (
            drawn_over_runs(np.broadcast_to(values_N, shape))
            for values_N in (initial.layers_N, initial.tokens_N)
        )
        drawn[" less initial"] = {
            "accuracy_difference": drawn_over_runs(difference_RN, 0, -1, 1, 0),
            "saved_per_token": theirs_I / tokens_I / initial.layers - depth_I,
            "saved_per_problem": 1 - layers_I / theirs_I,
        }
    return {
        f"{suffix}/{name}_ci95/{end}": value
        for suffix, numbers in drawn.items()
        for name, draws_I in numbers.items()
        for end, value in zip(("low", "high"), percentile_interval(draws_I), strict=True)
    }
