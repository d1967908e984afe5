"""Registers jexit with Inspect (inspect_ai): the provider `jexit` and the task `jexit/problems`.

    inspect eval jexit/problems -T task=gsm8k -T path=DIR --model jexit/DIR -M policy=threshold:0.5

`--model jexit/DIR` decodes the model directory DIR in Inspect's own process. `-M` sets `policy`,
`max_prompt_tokens`, `max_new_tokens` and `rows`, as for `python -m jexit.serve`. The depth of every
token is in the metadata of each output. Needs the extra `inspect`
(`pip install -e '.[inspect]'` in the checkout).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ModelAPI, modelapi
from inspect_ai.model import ChatMessageAssistant as Assistant
from inspect_ai.model import ChatMessageSystem as System
from inspect_ai.model import ChatMessageUser as User
from inspect_ai.scorer import (
    CORRECT,
    INCORRECT,
    Metric,
    SampleScore,
    Score,
    Scorer,
    Target,
    accuracy,
    metric,
    scorer,
    stderr,
)
from inspect_ai.solver import TaskState, generate

from jexit import tasks
from jexit.tasks.base import Attempt

MESSAGES = {"system": System, "user": User, "assistant": Assistant}


@modelapi(name="jexit")
def jexit() -> type[ModelAPI]:
    from jexit.serve.inspect_provider import JexitAPI

    return JexitAPI


@task
def problems(
    task: str = "word_problems", split: str = "test", problems: int = 100, **options: Any
) -> Task:
    """Returns an Inspect task with the first `problems` problems of one split of a jexit task.

    `task` is one of jexit's tasks or a user's own (FILE.py:NAME), with the given `options`. The
    evaluation reports the accuracy by the task's verdicts, the fraction of layers run per token,
    and the layers run per problem.
    """
    made = tasks.make_task(task, **options)
    size = made.size(split)
    count = problems if size is None else min(problems, size)
    samples = []
    for index in range(count):
        problem = made.problem(split, index)
        said: list[ChatMessage] = [
            MESSAGES[message["role"]](content=message["content"]) for message in problem.messages
        ]
        samples.append(Sample(input=said, target=problem.answer, id=index + 1))
    return Task(
        dataset=MemoryDataset(samples, name=f"{task} ({split})"),
        solver=generate(),
        scorer=verdicts(made, split),
    )


def _mean_of(name: str) -> Callable[[list[SampleScore]], float]:
    def mean(scores: list[SampleScore]) -> float:
        found = [(each.score.metadata or {}).get(name) for each in scores]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else math.nan

    return mean


@metric
def layers_per_problem() -> Metric:
    """Reports the layers per problem, as a mean over problems (NaN without depths).

    Only the provider `jexit` reports depths.
    """
    return _mean_of("layers_run")


@metric
def depth_fraction() -> Metric:
    """Reports the fraction of the model's layers that ran, over the tokens of all answers.

    The result is NaN without depths, which only the provider `jexit` reports.
    """

    def fraction(scores: list[SampleScore]) -> float:
        found = [each.score.metadata or {} for each in scores]
        run = [(m["layers_run"], m["layers_whole"]) for m in found if m.get("layers_whole")]
        return sum(r for r, _ in run) / sum(w for _, w in run) if run else math.nan

    return fraction


@scorer(metrics=[accuracy(), stderr(), depth_fraction(), layers_per_problem()])
def verdicts(made: tasks.Task, split: str) -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        problem = made.problem(split, int(state.sample_id) - 1)
        known = state.output.metadata or {}
        depths = known.get("depths", [])
        attempt = Attempt(
            text=known.get("opening", "") + state.output.completion,
            depths=depths,
            truncated=state.output.stop_reason == "max_tokens",
        )
        (verdict,) = made.judge([problem], [attempt])
        run = {}
        if depths:  # of the provider jexit
            run = {"layers_run": sum(depths), "layers_whole": known["layers"] * len(depths)}
        return Score(
            value=CORRECT if verdict.correct else INCORRECT,
            answer=state.output.completion,
            metadata={"kind": verdict.kind} | run,
        )

    return score
