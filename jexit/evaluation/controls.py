"""Evaluates controls: runs at a policy's mean depth that do not choose which tokens stop early.

Controls separate the gain from choosing tokens from the effect of running fewer layers. The control
`fixed:matched` stops all tokens of a completion at one exit. It has the policy's mean depth even if
its completions are longer or shorter than the policy's (see `mixed`). The control `shuffled`
assigns the policy's own depths to tokens at random. It has the policy's mean depth only if its
completions are as long as the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from jexit.config import control_of
from jexit.evaluation.accuracy import Examination, policy_result
from jexit.evaluation.decoder import Decoder
from jexit.evaluation.intervals import bootstrap_ratio_difference, paired_interval
from jexit.model.policies import Prescribed
from jexit.results import ControlDifference, PolicyResult
from jexit.tasks import Attempt


def evaluate_control(
    decoder: Decoder, examination: Examination, name: str, of: Sequence[Attempt]
) -> tuple[PolicyResult, list[Attempt]]:
    """Returns the results and the attempts of a control.

    `name` is `shuffled`, `fixed:matched`, or one of these with `:POLICY` appended. `of` contains
    the attempts under the policy whose mean depth the control matches.
    """
    if name.startswith("shuffled"):
        depth_BT = shuffled_depths(
            of, decoder.layers, columns=decoder.max_new_tokens, seed=decoder.seed
        )
        attempts, speed = examination.attempts(decoder, Prescribed(depth_BT), name)
    else:
        attempts, speed = _matched(decoder, examination, name, mean_depth(of))
    result = policy_result(name, examination, attempts, decoder.layers, tokens_per_second=speed)
    return result.model_copy(update={"control_of": control_of(name)}), attempts


def mean_depth(attempts: Sequence[Attempt]) -> float:
    """Returns the mean number of layers run per token, including each completion's first token."""
    return sum(a.layers_run for a in attempts) / sum(len(a.depths) for a in attempts)


def _matched(
    decoder: Decoder, examination: Examination, name: str, mean: float
) -> tuple[list[Attempt], float]:
    """Decodes attempts at fixed exits, such that the mean depth is near `mean`.

    Returns (attempts, tokens per second). Every prompt is decoded at two neighbouring exits whose
    mean depths enclose `mean`, and each attempt is taken from one of the two (see `mixed`). The
    mean depth at an exit depends on the length of the completions and is known only after decoding,
    so further exits may be tried first. If the first exit is deeper than `mean`, all attempts are
    those at the first exit.
    """
    stops = [*nnx.merge(*decoder.parts).exit_layers, decoder.layers]
    decoded: dict[int, list[Attempt]] = {}
    seconds = 0.0

    def at(place: int) -> list[Attempt]:
        nonlocal seconds
        if place not in decoded:
            policy = decoder.policy(f"fixed:{stops[place]}")
            decoded[place], speed = examination.attempts(decoder, policy, name)
            seconds += sum(len(made.depths) for made in decoded[place]) / speed
        return decoded[place]

    last = len(stops) - 1
    upper = min(max(int(np.searchsorted(stops, mean)), 1), last)
    while upper > 1 and mean_depth(at(upper - 1)) > mean:
        upper -= 1
    while upper < last and mean_depth(at(upper)) < mean:
        upper += 1
    attempts = mixed(at(max(upper - 1, 0)), at(upper), mean, seed=decoder.seed)
    tokens = sum(len(made.depths) for some in decoded.values() for made in some)
    return attempts, tokens / seconds


def mixed(
    shallow: Sequence[Attempt], deep: Sequence[Attempt], mean: float, *, seed: int
) -> list[Attempt]:
    """Takes each problem's attempt from one of two exits, so that the mean depth is near `mean`.

    All problems begin with their attempt in `shallow`. One after another, in a random order, they
    switch to their attempt in `deep`, until the mean depth is as close as possible to `mean`.
    """
    order = np.random.default_rng(seed).permutation(len(shallow))

    def totals(of: Callable[[Attempt], int]) -> np.ndarray:
        """Returns the sums of `of` over the chosen attempts when 0, 1, 2, … problems use `deep`."""
        gains = [of(deep[index]) - of(shallow[index]) for index in order]
        return np.cumsum([sum(map(of, shallow)), *gains])

    means = totals(lambda a: a.layers_run) / totals(lambda a: len(a.depths))
    deeper = set(order[: int(np.abs(means - mean).argmin())].tolist())
    pairs = enumerate(zip(shallow, deep, strict=True))
    return [there if index in deeper else here for index, (here, there) in pairs]


def shuffled_depths(
    attempts: Sequence[Attempt], layers: int, *, columns: int, seed: int
) -> np.ndarray:
    """Permutes the depths of attempts at random, and returns them as int32 [problems, columns].

    Column i is the depth of the pass that produces token i, as in `Prescribed`. The depths of all
    passes that could leave early are permuted across all attempts. Columns beyond an attempt's
    length are drawn from these depths with replacement, because the new completion may be longer.
    If no pass could leave early, all depths are `layers`. Column 0 has no effect, because a
    completion's first token always runs all layers.
    """
    rng = np.random.default_rng(seed)
    depths = [depth for made in attempts for depth in made.depths[1:]]
    depths_N = np.asarray(depths or [layers], np.int32)
    deal_BT = rng.choice(depths_N, (len(attempts), columns))
    dealt = iter(rng.permutation(depths_N))
    for row, made in enumerate(attempts):
        for column in range(1, len(made.depths)):
            deal_BT[row, column] = next(dealt)
    return deal_BT.astype(np.int32)


def compared(
    policy: str,
    control: str,
    ours: Sequence[Attempt],
    theirs: Sequence[Attempt],
    layers: int,
    seed: int,
) -> ControlDifference:
    """Returns a policy's accuracy and depth fraction minus those of a control, with 95 % intervals.

    `ours` are the policy's attempts, and `theirs` the control's at the same problems. `layers` is
    the model's number of layers, and `seed` that of the bootstrap. A positive `accuracy_difference`
    is the gain from choosing which tokens to stop.
    """
    correct = [[float(made.correct) for made in some] for some in (ours, theirs)]
    # For each attempt, the layers that ran and the layers that full depth would have run.
    parts = [
        ([a.layers_run for a in some], [layers * len(a.depths) for a in some])
        for some in (ours, theirs)
    ]
    fractions = [sum(run) / sum(whole) for run, whole in parts]
    return ControlDifference(
        policy=policy,
        control=control,
        accuracy_difference=float(np.mean(correct[0]) - np.mean(correct[1])),
        accuracy_difference_ci95=paired_interval(*correct),
        depth_fraction_difference=fractions[0] - fractions[1],
        depth_fraction_difference_ci95=bootstrap_ratio_difference(*parts, seed),
        problems=len(ours),
    )
