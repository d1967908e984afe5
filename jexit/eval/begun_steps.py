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
    `depths` how many of `layers` ran in the pass that wrote the first token of it.
    """

    size: int
    layers: int
    numbers: Sequence[int]
    taken: Sequence[bool]
    right: Sequence[bool]
    depths: Sequence[int]

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
        if full is not None and (pair := paired(self._scores, full._scores)):
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

    Capacity without obedience: whatever size the model's own steps have, and whether or not it
    follows prompts that ask for others, this step has that size. All in one decode. What was begun
    counts as the model's own, so that its passes leave as the policy says.
    """
    rows = [
        (size, number, begun)
        for size in task.begun_sizes
        for number, problem in enumerate(problems)
        if (begun := task.begun_step(problem, size)) is not None
    ]
    replies = completer.complete(
        [problems[number] for _, number, _ in rows],
        [begun for *_, begun in rows],
        answer_only=True,
    )
    tried: dict[int, list[tuple[int, bool, bool, int]]] = {}
    for (size, number, begun), reply in zip(rows, replies, strict=True):
        if reply is not None:
            found, right = task.first_result(problems[number], begun + reply.text)
            outcome = (number, found == size, found == size and right, reply.depths[0])
            tried.setdefault(size, []).append(outcome)
    made = []
    for size, outcomes in tried.items():
        numbers, taken, right, depths = zip(*outcomes, strict=True)
        made.append(
            BegunSteps(
                size=size, layers=completer.layers,
                numbers=numbers, taken=taken, right=right, depths=depths,
            )
        )  # fmt: skip
    return made
