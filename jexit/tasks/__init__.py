"""Tasks, which provide prompts and judge completions; this package does not import jax."""

from jexit.tasks.base import Attempt, Draw, Problem, Rewards, Split, Task, Verdict
from jexit.tasks.chains import ChainTask, check_measures
from jexit.tasks.references import make_task
from jexit.tasks.rows import rows_task

__all__ = [
    "Attempt",
    "ChainTask",
    "Draw",
    "Problem",
    "Rewards",
    "Split",
    "Task",
    "Verdict",
    "check_measures",
    "make_task",
    "rows_task",
]
