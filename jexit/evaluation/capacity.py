"""Measures how much a model can compute in one step of its chain of thought.

The size of a step is the number of operands that the step combines. The prompt prescribes the size
in `prescribed`, and a forced prefix of the completion prescribes the size in `begun_steps`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jexit.evaluation.accuracy import Examination
from jexit.evaluation.completer import Completer
from jexit.evaluation.intervals import wilson_interval
from jexit.evaluation.scores import Scores, paired
from jexit.results import Capacity, PolicyResult
from jexit.tasks.base import Attempt, Problem
from jexit.tasks.chains import ChainTask


def scores_of(attempts: Sequence[Attempt]) -> Scores:
    """Returns scores that are 1 for correct attempts and 0 for other attempts, in order."""
    return Scores.shares(range(len(attempts)), [float(made.correct) for made in attempts])


def prescribed(
    granularity: str,
    examination: Examination,
    by_policy: Mapping[str, tuple[PolicyResult, Sequence[Attempt]]],
) -> list[Capacity]:
    """Returns the accuracy under each policy when the prompt prescribes the step size.

    `granularity` is the name of the step size. `by_policy` must contain the policy `full`. Each
    record also contains the share of completions whose steps have this size, the accuracy of these
    completions, and the difference in accuracy from full depth on the same problems.
    """
    task = examination.task
    assert isinstance(task, ChainTask)
    found = []
    for policy, (result, attempts) in by_policy.items():
        pairs = zip(examination.problems, attempts, strict=True)
        obedient = [made.correct for problem, made in pairs if task.obeys(problem, made.text)]
        count = len(obedient)
        entry = Capacity(
            policy=policy,
            granularity=granularity,
            problems=result.problems,
            accuracy=result.accuracy,
            accuracy_ci95=result.accuracy_ci95,
            depth_fraction=result.depth_fraction,
            completion_length=result.completion_length,
            step_size=result.text.get("step_size"),
            obeyed=count / len(attempts),
            accuracy_obeyed=sum(obedient) / count if count else None,
            accuracy_obeyed_ci95=wilson_interval(sum(obedient), count) if count else None,
        )
        if policy != "full":
            entry = _against(entry, scores_of(attempts), scores_of(by_policy["full"][1]))
        found.append(entry)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class BegunSteps:
    """The results of first steps with `size` operands, each of which was begun by a forced prefix.

    `numbers`, `taken`, `correct` and `depths` have one entry per problem. `numbers` contains the
    problem's number in the evaluation. `taken` is true where the model wrote a result after the
    prefix, and `correct` is true where this result is correct. `depths` contains how many of the
    model's `layers` layers ran in the pass that produced the first token of the result. `left_out`
    counts the problems whose prompt and prefix left no room in the model's positions.
    """

    size: int
    layers: int
    numbers: Sequence[int]
    taken: Sequence[bool]
    correct: Sequence[bool]
    depths: Sequence[int]
    left_out: int = 0

    def capacity(self, policy: str, full: BegunSteps) -> Capacity:
        """Returns the entry of `eval.json` for these steps under the policy called `policy`.

        `full` contains the steps of the same size at full depth. Unless `policy` is `"full"`, the
        entry includes the difference in accuracy from `full`.
        """
        count = len(self.numbers)
        entry = Capacity(
            policy=policy,
            granularity=str(self.size),
            problems=count,
            accuracy=sum(self.correct) / count,
            accuracy_ci95=wilson_interval(sum(self.correct), count),
            obeyed=sum(self.taken) / count,
            depth_fraction=sum(self.depths) / (count * self.layers),
            **({"left_out": self.left_out} if self.left_out else {}),
        )
        return entry if policy == "full" else _against(entry, self._scores, full._scores)

    @property
    def _scores(self) -> Scores:
        return Scores.shares(self.numbers, [float(correct) for correct in self.correct])


def begun_steps(
    task: ChainTask, problems: Sequence[Problem], completer: Completer
) -> list[BegunSteps]:
    """Returns the results of first steps that a forced prefix begins, with one entry per step size.

    The step sizes are those of `task.begun_sizes` for which some problem has enough operands.
    Different sizes therefore cover different problems. The forced prefix fixes the size of the
    step, so the measured capacity does not depend on the size that the model would choose. The
    prefix counts as the model's own text, so the policy decides after how many layers the prefix's
    tokens leave. All steps are decoded together.

    A model that has not written steps of some size for a long time may have forgotten their format.
    Such a loss of capacity is not caused by depth; comparing with full depth tells the two causes
    apart.
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
            found, correct = task.first_result(problems[number], text)
            outcomes.append((number, found == size, found == size and correct, reply.depths[0]))
        if outcomes:
            numbers, taken, correct, depths = zip(*outcomes, strict=True)
            made.append(
                BegunSteps(
                    size=size, layers=completer.layers, numbers=numbers, taken=taken,
                    correct=correct, depths=depths, left_out=left_out,
                )
            )  # fmt: skip
    return made


def _against(entry: Capacity, ours: Scores, full: Scores) -> Capacity:
    pair = paired(ours, full)
    assert pair is not None, "every policy has the same problems"
    return entry.model_copy(
        update={"less_full": pair.difference, "less_full_ci95": pair.difference_ci95}
    )
