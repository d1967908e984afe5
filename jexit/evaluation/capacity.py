"""Measures how much a model can compute in one step of its chain of thought.

The size of a step is the number of operands that it combines. In `prescribed`, the prompt
prescribes the size of all steps. In `begun_steps`, a forced prefix of the completion fixes the size
of the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jexit.evaluation.accuracy import Examination
from jexit.evaluation.completer import ModelCompleter
from jexit.evaluation.intervals import wilson_interval
from jexit.evaluation.scores import Scores, paired
from jexit.results import Capacity, PolicyResult
from jexit.tasks.base import Attempt, Problem
from jexit.tasks.chains import ChainTask


def scores_of(attempts: Sequence[Attempt]) -> Scores:
    return Scores.shares(range(len(attempts)), [float(made.correct) for made in attempts])


def prescribed(
    granularity: str,
    examination: Examination,
    by_policy: Mapping[str, tuple[PolicyResult, Sequence[Attempt]]],
) -> list[Capacity]:
    """Returns a record of each policy's accuracy on prompts that prescribe the size of the steps.

    `granularity` is the prescribed size, or its name. `by_policy` maps the names of policies to
    their results and attempts, and must include `full`. A record also contains the fraction of
    completions whose steps have this size, the accuracy of these completions (None without any)
    and, except for `full` itself, the accuracy minus that at full depth.
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
            entry = less_full(entry, scores_of(attempts), scores_of(by_policy["full"][1]))
        found.append(entry)
    return found


def begun_steps(
    policy: str, task: ChainTask, problems: Sequence[Problem], completer: ModelCompleter
) -> list[tuple[Capacity, Scores]]:
    """Measures how often the first step is correct when a forced prefix fixes its size.

    Returns a pair (record, scores per problem) for each measured size in `task.begun_sizes`. A
    score is 1 if the first step has this size and a correct result, otherwise 0. A size is measured
    on the problems that have enough operands, so the problems differ between sizes. As
    the prefix fixes the size, the result does not depend on the size that the model would choose.
    The policy decides the depths of the prefix's tokens too, as if the model had written them.

    A model that has not written steps of some size for a long time may have forgotten their format.
    Such a loss is not caused by depth; comparing with full depth (`less_full`) removes it.
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
    found = []
    for size in task.begun_sizes:
        outcomes, left_out = [], 0
        for (of, number, begun), reply in zip(rows, replies, strict=True):
            if of != size:
                continue
            if reply is None:
                left_out += 1
                continue
            text = (begun + reply.text).removeprefix(completer.opening)
            wrote, correct = task.first_result(problems[number], text)
            outcomes.append((number, wrote == size, wrote == size and correct, reply.depths[0]))
        if outcomes:
            numbers, taken, correct, depths = zip(*outcomes, strict=True)
            count = len(numbers)
            entry = Capacity(
                policy=policy,
                granularity=str(size),
                problems=count,
                accuracy=sum(correct) / count,
                accuracy_ci95=wilson_interval(sum(correct), count),
                obeyed=sum(taken) / count,
                depth_fraction=sum(depths) / (count * completer.layers),
                **({"left_out": left_out} if left_out else {}),
            )
            found.append((entry, Scores.shares(numbers, list(map(float, correct)))))
    return found


def less_full(entry: Capacity, ours: Scores, full: Scores) -> Capacity:
    """Returns a copy of `entry` that also contains its accuracy minus that at full depth.

    `ours` and `full` are the scores of the same problems under the policy of `entry` and at full
    depth.
    """
    pair = paired(entry.policy, "accuracy", ours, full)
    assert pair is not None, "every policy has the same problems"
    return entry.model_copy(
        update={"less_full": pair.difference, "less_full_ci95": pair.difference_ci95}
    )
