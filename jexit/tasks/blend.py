"""Several tasks as one: their problems in turn, each judged by the task that it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jexit.errors import UserError
from jexit.tasks import answers, phrases
from jexit.tasks.base import Problem, Rewards, Split, Task, Verdict, check_split


class Blend(Task):
    """Problems of each of `tasks` equally often: index i is number i // n of task i mod n.

    `fields["task"]` of a problem names its task. Verdicts, and so rewards, are that task's; the
    totals about the text are each task's own under its name (`sums/step_size`), with its
    `accuracy` (`sums/accuracy`). Raises UserError for fewer than two tasks or one given twice.
    """

    name = "blend"

    def __init__(self, *, tasks: Sequence[Task], rewards: Rewards | None = None) -> None:
        super().__init__(rewards=rewards)
        names = [task.name for task in tasks]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(
                f"blend: the tasks are two or more, each once, got {', '.join(names) or 'none'}; "
                "change config.task.parts"
            )
        self.tasks = dict(zip(names, tasks, strict=True))

    def size(self, split: Split) -> int | None:
        check_split(split)
        sizes = [task.size(split) for task in self.tasks.values()]
        finite = [size for size in sizes if size is not None]
        return min(finite) * len(self.tasks) if finite else None

    def problem(self, split: Split, index: int) -> Problem:
        check_split(split)
        number, place = divmod(index, len(self.tasks))
        name, task = list(self.tasks.items())[place]
        problem = task.problem(split, number)
        return dataclasses.replace(problem, fields={**problem.fields, "task": name})

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.tasks[problem.fields["task"]].verify(problem, completion)

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        return answers.answer_mark(text) or phrases.answer_mark(text)

    def text_totals(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> dict[str, tuple[float, int]]:
        totals: dict[str, tuple[float, int]] = {}
        for name, task in self.tasks.items():
            pairs = [
                (problem, text)
                for problem, text in zip(problems, completions, strict=True)
                if problem.fields["task"] == name
            ]
            right = sum(task.verify(problem, text).correct for problem, text in pairs)
            own = task.text_totals([problem for problem, _ in pairs], [text for _, text in pairs])
            totals |= {f"{name}/{key}": value for key, value in own.items()}
            totals[f"{name}/accuracy"] = (right, len(pairs))
        return totals
