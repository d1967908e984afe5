"""The options that generated tasks share, and their checks, which raise UserError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jexit.errors import UserError

# How often prompts of `steps="mixed"` leave a step's size free, prescribe it, or want no steps.
MIXTURE: Mapping[str, float] = {"free": 0.45, "prescribed": 0.40, "at_once": 0.15}


def check_steps(task: str, steps: object, known: Sequence[object]) -> None:
    """One of the task's own modes."""
    if steps not in known:
        raise UserError(
            f"{task}: steps is one of {', '.join(map(str, known))}, got {steps!r}; "
            "change config.task.steps"
        )


def check_range(
    task: str, name: str, pair: Sequence[int], least: int, most: float = math.inf
) -> tuple[int, int]:
    """The option's smallest and largest value, which are within bounds and in order."""
    if len(pair) != 2 or not least <= pair[0] <= pair[1] <= most:
        bound = f" <= {most}" if most < math.inf else ""
        raise UserError(
            f"{task}: {name} must be (smallest, largest) with {least} <= smallest <= largest"
            f"{bound}, got {tuple(pair)}; change config.task.{name}_min or {name}_max"
        )
    return int(pair[0]), int(pair[1])
