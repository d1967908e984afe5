"""Where completions spend their layers, and the controls that separate adapting from shallowness.

A policy that stops tokens early may do well because it knows *which* tokens to stop, or because
shallow passes are good enough for all of them. Two controls run at the same mean depth without that
knowledge: each completion's tokens all stopped at one exit (`fixed:matched`), and the policy's own
depths dealt out to tokens at random (`shuffled`). The first has the policy's mean depth whatever
lengths its completions come to (`mixed`), the second as far as they come to those of the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jexit.eval.intervals import Interval, bootstrap_ratio_difference, paired_interval

CLASSES = ("digit", "operator", "word", "other", "marker", "answer", "end")
_OPERATORS = frozenset("+-*/=<>^%×÷−")
# Where a completion's answer is marked: the marker's start and end, None without one.
Mark = Callable[[str], tuple[int, int] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One problem's completion under a policy; a token's depth is of the pass that produced it."""

    ids: list[int]
    text: str
    depths: list[int]
    verdict: str
    truncated: bool

    @property
    def right(self) -> bool:
        return self.verdict in ("strict", "lenient")

    @property
    def layers_run(self) -> int:
        return sum(self.depths)


def token_class(token: str) -> str:
    """The class of a token of the chain of thought, by what its text holds."""
    text = token.strip()
    if text and all(character in _OPERATORS for character in text):
        return "operator"
    if any(character.isdigit() for character in text):
        return "digit"
    return "word" if any(character.isalpha() for character in text) else "other"


def token_classes(
    ids: Sequence[int], tokens: Sequence[str], mark: Mark, end_ids: Collection[int]
) -> list[str]:
    """The class of each token of a completion, from its ids and their texts.

    `end` by the id; `marker` for what `mark` finds, `answer` for what follows it, a token that
    holds both included; before it, or without one, by `token_class`.
    """
    text = "".join(tokens)
    start, stop = mark(text) or (-1, -1)
    classes, end = [], 0
    for number, token in zip(ids, tokens, strict=True):
        end += len(token)
        if number in end_ids:
            classes.append("end")
        elif start < 0 or end <= start:
            classes.append(token_class(token))
        else:
            begins_before = end - len(token) < stop
            beyond = text[stop:end].strip()
            classes.append("marker" if begins_before and not beyond else "answer")
    return classes


def depth_by_class(
    completions: Sequence[Completion],
    tokens: Callable[[Sequence[int]], Sequence[str]],
    mark: Mark,
    end_ids: Collection[int],
) -> dict[str, dict[str, float]]:
    """Tokens and mean layers run of each class; `tokens` gives the ids' own texts.

    A completion's first token is left out: its pass is the prompt's last and never leaves.
    """
    totals = {name: [0, 0] for name in CLASSES}
    for completion in completions:
        classes = token_classes(completion.ids, tokens(completion.ids), mark, end_ids)
        for name, depth in list(zip(classes, completion.depths, strict=True))[1:]:
            totals[name][0] += 1
            totals[name][1] += depth
    return {
        name: {"tokens": count, "depth_mean": layers / count}
        for name, (count, layers) in totals.items()
        if count
    }


def mean_depth(completions: Sequence[Completion]) -> float:
    """Layers run for a token, the first of each completion included."""
    return sum(c.layers_run for c in completions) / sum(len(c.depths) for c in completions)


def mixed(
    shallow: Sequence[Completion], deep: Sequence[Completion], mean: float, *, seed: int
) -> list[Completion]:
    """A completion of each problem, from one of two exits, so that a token's mean depth is `mean`.

    Problems take their deeper completion in a random order, as many of them as bring `mean_depth`
    closest to `mean`: none or all where it does not lie between the two.
    """
    order = np.random.default_rng(seed).permutation(len(shallow))

    def totals(of: Callable[[Completion], int]) -> np.ndarray:
        """Over all problems, after each number of them that take the deeper one."""
        gains = [of(deep[index]) - of(shallow[index]) for index in order]
        return np.cumsum([sum(map(of, shallow)), *gains])

    means = totals(lambda c: c.layers_run) / totals(lambda c: len(c.depths))
    deeper = set(order[: int(np.abs(means - mean).argmin())].tolist())
    pairs = enumerate(zip(shallow, deep, strict=True))
    return [there if index in deeper else here for index, (here, there) in pairs]


def shuffled_depths(
    completions: Sequence[Completion], layers: int, *, columns: int, seed: int
) -> np.ndarray:
    """[problems, columns] depths for `Prescribed`: the completions' own, dealt out anew.

    Every pass that could leave is dealt one of all their depths, without replacement; passes beyond
    a completion's own length draw from all of them, for completions that become longer.
    """
    rng = np.random.default_rng(seed)
    depths = _free_depths(completions, layers)
    deal_BT = rng.choice(depths, (len(completions), columns))
    dealt = iter(rng.permutation(depths))
    for row, completion in enumerate(completions):
        for column in range(1, len(completion.depths)):
            deal_BT[row, column] = next(dealt)
    return deal_BT.astype(np.int32)


def _free_depths(completions: Sequence[Completion], layers: int) -> np.ndarray:
    """Of all passes that could leave; one of full depth where there is none."""
    depths = [depth for completion in completions for depth in completion.depths[1:]]
    return np.asarray(depths or [layers], np.int32)


def compared(
    policy: str,
    control: str,
    ours: Sequence[Completion],
    theirs: Sequence[Completion],
    layers: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Policy less control on the same problems: accuracy and share of layers run, with intervals.

    Positive `accuracy_difference`: knowing which tokens to stop was worth so much.
    """
    right, theirs_right = ([float(made.right) for made in some] for some in (ours, theirs))

    def depth_parts(completions: Sequence[Completion]) -> tuple[list[int], list[int]]:
        return [c.layers_run for c in completions], [layers * len(c.depths) for c in completions]

    (ours_run, ours_all), (theirs_run, theirs_all) = depth_parts(ours), depth_parts(theirs)
    interval: Interval = bootstrap_ratio_difference(
        (ours_run, ours_all), (theirs_run, theirs_all), seed
    )
    return {
        "policy": policy,
        "control": control,
        "accuracy_difference": float(np.mean(right) - np.mean(theirs_right)),
        "accuracy_difference_ci95": paired_interval(right, theirs_right),
        "depth_fraction_difference": sum(ours_run) / sum(ours_all)
        - sum(theirs_run) / sum(theirs_all),
        "depth_fraction_difference_ci95": interval,
        "problems": len(right),
    }
