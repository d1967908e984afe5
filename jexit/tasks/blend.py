"""The task `blend`, which takes problems from several tasks in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jexit.errors import UserError
from jexit.settings import shown
from jexit.tasks import answers, phrases
from jexit.tasks.base import Attempt, Problem, Rewards, Split, Task, Verdict, check_split
from jexit.tasks.references import known_options, make_task
from jexit.tasks.user_code import guarded_judge

PARTS = ("sums", "word_problems", "tom")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlendedProblem(Problem):
    """A problem of a blend: `part` is the name of its task, and `own` the problem of that task."""

    part: str
    own: Problem


class Blend(Task):
    """A task that combines several tasks and takes problems from each of them equally often.

    Problem i of the blend is problem i // n of task i mod n, where n is the number of tasks. The
    task that provides a problem also judges its completions and determines their rewards. The
    metrics, reward functions and accuracy of each task are reported under the task's name, as in
    `sums/accuracy`. Raises UserError unless `tasks` contains at least two tasks, with different
    names.
    """

    name = "blend"

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if len(names) < 2:
            raise UserError(
                f"config.task.options.parts is {', '.join(names) or 'empty'}, but a blend needs at "
                "least two tasks; add one"
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"config.task.options.parts names {twice[0]} {names.count(twice[0])} times, but "
                "the tasks of a blend must differ; name it once"
            )
        self.tasks = dict(zip(names, tasks, strict=True))

    @property
    def time_limit(self) -> float:
        """The largest time limit of the tasks, in seconds; assigning it sets every task's limit."""
        return max(task.time_limit for task in self.tasks.values())

    @time_limit.setter
    def time_limit(self, seconds: float) -> None:
        for task in self.tasks.values():
            task.time_limit = seconds

    def size(self, split: Split) -> int | None:
        check_split(split)
        sizes = [task.size(split) for task in self.tasks.values()]
        finite = [size for size in sizes if size is not None]
        return min(finite) * len(self.tasks) if finite else None

    def problem(self, split: Split, index: int) -> Problem:
        check_split(split)
        number, place = divmod(index, len(self.tasks))
        name, task = list(self.tasks.items())[place]
        own = task.problem(split, number)
        return BlendedProblem(**vars(own) | {"part": name, "own": own})

    def verify(self, problem: Problem, completion: str) -> Verdict:
        assert isinstance(problem, BlendedProblem)
        return self.tasks[problem.part].verify(problem.own, completion)

    def judge(self, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[Verdict]:
        """Returns a verdict for each attempt; each task judges all its attempts in one call."""
        verdicts: dict[int, Verdict] = {}
        for name, task in self.tasks.items():
            place, own, made = _of_part(name, problems, attempts)
            for index, verdict in zip(place, guarded_judge(task, own, made), strict=True):
                parts = {f"{name}/{each}": value for each, value in verdict.parts.items()}
                verdicts[index] = dataclasses.replace(verdict, parts=parts)
        return [verdicts[i] for i in range(len(problems))]

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        return answers.answer_mark(text) or phrases.answer_mark(text)

    def text_totals(
        self, problems: Sequence[Problem], attempts: Sequence[Attempt]
    ) -> dict[str, tuple[float, int]]:
        totals: dict[str, tuple[float, int]] = {}
        for name, task in self.tasks.items():
            _, own, made = _of_part(name, problems, attempts)
            found = task.text_totals(own, made)
            found["accuracy"] = (sum(attempt.correct for attempt in made), len(made))
            totals |= {f"{name}/{key}": value for key, value in found.items()}
        return totals


def _of_part(
    name: str, problems: Sequence[Any], attempts: Sequence[Attempt]
) -> tuple[list[int], list[Problem], list[Attempt]]:
    index = [i for i, problem in enumerate(problems) if problem.part == name]
    return index, [problems[i].own for i in index], [attempts[i] for i in index]


def task(
    *,
    parts: Sequence[str] = PARTS,
    steps: str = "mixed",
    rewards: Rewards | None = None,
    **options: Any,
) -> Blend:
    """Makes a blend of the tasks whose names are in `parts`.

    `rewards` is passed to every task, and each of the other options to the tasks that accept it.
    Raises UserError for an option in `options` that no task accepts.
    """
    names = (parts,) if isinstance(parts, str) else parts
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"config.task.options.parts is {shown(parts)}, but it must be a list of task names; "
            "set it to one such as ('sums', 'tom')"
        )
    made: list[Task] = []
    unknown, options = set(options), options | {"steps": steps}
    for name in names:
        taken = known_options(name) & options.keys()
        made.append(make_task(name, rewards=rewards, **{key: options[key] for key in taken}))
        unknown -= taken
    if unknown:
        raise UserError(
            f"config.task.options contains {min(unknown)!r}, but none of the tasks "
            f"{', '.join(names)} has this option; remove it"
        )
    return Blend(made)
