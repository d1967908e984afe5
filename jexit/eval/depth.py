"""Where completions spend their layers, and the controls that separate adapting from shallowness.

A policy that stops tokens early may do well because it knows *which* tokens to stop, or because
shallow passes are good enough for all of them. Two controls run at the same mean depth without that
knowledge: every token stopped at one layer (`fixed:matched`), and the policy's own depths dealt out
to tokens at random (`shuffled`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jexit.eval.intervals import Interval, bootstrap_mean, bootstrap_ratio_difference

CLASSES = ("digit", "operator", "word", "answer", "other")
_OPERATORS = frozenset("+-*/=<>^%×÷−")


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


def token_class(token: str, *, answers: bool) -> str:
    """The class of a token's text: `answer` from the answer's cue on, else by what it holds."""
    text = token.strip()
    if answers:
        return "answer"
    if text and all(character in _OPERATORS for character in text):
        return "operator"
    if any(character.isdigit() for character in text):
        return "digit"
    return "word" if any(character.isalpha() for character in text) else "other"


def token_classes(tokens: Sequence[str], cue: str | None) -> list[str]:
    """The class of each token of a completion; the answer begins with the last `cue`."""
    text = "".join(tokens)
    start = text.rfind(cue) if cue else -1
    classes, end = [], 0
    for token in tokens:
        end += len(token)
        classes.append(token_class(token, answers=start >= 0 and end > start))
    return classes


def depth_by_class(
    completions: Sequence[tuple[Sequence[str], Sequence[int]]], cue: str | None
) -> dict[str, dict[str, float]]:
    """Tokens and mean layers run of each class, over (tokens, depths) of completions.

    A completion's first token is left out: its pass is the prompt's last and never leaves.
    """
    totals = {name: [0, 0] for name in CLASSES}
    for tokens, depths in completions:
        for name, depth in list(zip(token_classes(tokens, cue), depths, strict=True))[1:]:
            totals[name][0] += 1
            totals[name][1] += depth
    return {
        name: {"tokens": count, "depth_mean": layers / count}
        for name, (count, layers) in totals.items()
        if count
    }


def matched_layers(completions: Sequence[Completion], layers: int) -> int:
    """The smallest layer count that is not below the mean depth of passes that could leave.

    Rounded up: the control may run a little deeper than what it is compared with, never less deep.
    """
    depths = _free_depths(completions, layers)
    return math.ceil(depths.mean() - 1e-9)


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
    right = np.asarray([a.right for a in ours], float) - [b.right for b in theirs]

    def depth_parts(completions: Sequence[Completion]) -> tuple[list[int], list[int]]:
        return [c.layers_run for c in completions], [layers * len(c.depths) for c in completions]

    (ours_run, ours_all), (theirs_run, theirs_all) = depth_parts(ours), depth_parts(theirs)
    interval: Interval = bootstrap_ratio_difference(
        (ours_run, ours_all), (theirs_run, theirs_all), seed
    )
    return {
        "policy": policy,
        "control": control,
        "accuracy_difference": float(right.mean()),
        "accuracy_difference_ci95": bootstrap_mean(right, seed),
        "depth_fraction_difference": sum(ours_run) / sum(ours_all)
        - sum(theirs_run) / sum(theirs_all),
        "depth_fraction_difference_ci95": interval,
        "problems": len(right),
    }
