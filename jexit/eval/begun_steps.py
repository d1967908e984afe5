"""What a model can do in one step: steps are begun for it, and it gives their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jexit.eval.continuations import Completer
from jexit.eval.intervals import wilson_interval
from jexit.eval.scores import Scores, paired
from jexit.tasks.base import Problem
from jexit.tasks.chains import ChainTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class BegunSteps:
    """First steps of `size` operands, of the problems with these numbers.

    `taken` says which have a result behind the beginning, `right` which have the right one, and
    `depths` how many of `layers` ran in the pass that wrote the first token of it. `left_out`
    counts problems for which the model had no room.
    """

    size: int
    layers: int
    numbers: Sequence[int]
    taken: Sequence[bool]
    right: Sequence[bool]
    depths: Sequence[int]
    left_out: int = 0

    def record(self, full: BegunSteps | None) -> dict[str, Any]:
        """What `eval.json` holds; with `full`, also the difference from it on the same problems."""
        count = len(self.numbers)
        record = {
            "granularity": str(self.size),
            "problems": count,
            "accuracy": sum(self.right) / count,
            "accuracy_ci95": wilson_interval(sum(self.right), count),
            "obeyed": sum(self.taken) / count,
            "depth_fraction": sum(self.depths) / (count * self.layers),
        }
        if self.left_out:
            record["left_out"] = self.left_out
        if full is not None:
            pair = paired(self._scores, full._scores)
            assert pair is not None, "every policy has the same problems"
            record["less_full"] = pair["difference"]
            record["less_full_ci95"] = pair["difference_ci95"]
        return record

    @property
    def _scores(self) -> Scores:
        return Scores.shares(self.numbers, [float(right) for right in self.right])


def begun_steps(
    task: ChainTask, problems: Sequence[Problem], completer: Completer
) -> list[BegunSteps]:
    """Results of first steps of every size of `task.begun_sizes` that any problem has room for.

    Capacity without obedience: whatever size the model's own steps have, this one has that size.
    What was begun counts as the model's own, so that its passes leave as the policy says. A problem
    counts for the sizes that it has operands for, so that different sizes are of different
    problems; and a model that has long stopped writing steps of a size may have forgotten how they
    look, which is a loss of capacity too, but not one that depth explains: full depth shows which.
    All in one decode.
    """
    rows = [
        (size, number, completer.opening + begun)
        for size in task.begun_sizes
        for number, problem in enumerate(problems)
        if (begun := task.begun_step(problem, size)) is not None
    ]
    replies = completer.complete(
        [problems[number] for _, number, _ in rows],
        [begun for *_, begun in rows],
        answer_only=True,
    )
    made = []
    for size in task.begun_sizes:
        outcomes, left_out = [], 0
        for (of, number, begun), reply in zip(rows, replies, strict=True):
            if of != size:
                continue
            if reply is None:
                left_out += 1
                continue
            text = (begun + reply.text).removeprefix(completer.opening)
            found, right = task.first_result(problems[number], text)
            outcomes.append((number, found == size, found == size and right, reply.depths[0]))
        if outcomes:
            numbers, taken, right, depths = zip(*outcomes, strict=True)
            made.append(
                BegunSteps(
                    size=size, layers=completer.layers, numbers=numbers, taken=taken, right=right,
                    depths=depths, left_out=left_out,
                )
            )  # fmt: skip
    return made
