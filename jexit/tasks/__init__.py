"""Prompts and verifiers; nothing in here imports jax."""

from __future__ import annotations

import inspect
from typing import Any

from jexit.errors import UserError
from jexit.tasks.base import Draw, Problem, Rewards, Split, Task, Verdict
from jexit.tasks.blend import Blend
from jexit.tasks.chains import ChainTask
from jexit.tasks.exploretom import ExploreToM
from jexit.tasks.gsm8k import Gsm8k
from jexit.tasks.sums import Sums
from jexit.tasks.tom.task import Tom
from jexit.tasks.word_problems import WordProblems

__all__ = [
    "Blend",
    "ChainTask",
    "Draw",
    "ExploreToM",
    "Gsm8k",
    "Problem",
    "Rewards",
    "Split",
    "Sums",
    "Task",
    "Tom",
    "Verdict",
    "WordProblems",
    "make_task",
]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Sums, WordProblems, Gsm8k, Tom, ExploreToM, Blend)
}
# A generated task whose kind of problem files can hold too, and the task that reads them.
READERS = {Tom.name: ExploreToM.name}


def make_task(name: str, path: str | None = None, **options: Any) -> Task:
    """Makes the task that a config names.

    `path` says where a task that reads files finds them (None or "" for its default); `tom` with a
    path is `exploretom`. The options are the constructor's keyword arguments. Raises UserError for
    an unknown task or option, or for a path given to a generated task.
    """
    if name not in TASKS:
        raise UserError(
            f"there is no task {name!r}; set config.task.name to one of {', '.join(sorted(TASKS))}"
        )
    if path:
        name = READERS.get(name, name)
    known = inspect.signature(TASKS[name]).parameters
    if path:
        if "path" not in known:
            raise UserError(
                f"task {name!r} generates its problems and reads no files, got path {path!r}; "
                "leave config.task.path empty"
            )
        options["path"] = path
    if surplus := sorted(set(options) - set(known)):
        raise UserError(
            f"task {name!r} has no option {surplus[0]!r}; "
            f"it takes {', '.join(sorted(set(known) - {'path'}))}"
        )
    return TASKS[name](**options)
