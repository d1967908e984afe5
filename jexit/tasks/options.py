"""The options that generated tasks share, and their checks, which raise UserError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jexit.errors import UserError

# How often prompts of `steps="mixed"` leave a step's size free, prescribe it, or want no steps.
MIXTURE: Mapping[str, float] = {"free": 0.45, "prescribed": 0.40, "at_once": 0.15}


def check_steps(task: str, steps: object, known: Sequence[object]) -> None:
    """One of the task's own modes."""
    if steps not in known:
        raise UserError(
            f"{task}: steps is one of {', '.join(map(str, known))}, got {steps!r}; "
            "change config.task.options.steps"
        )


def check_range(
    task: str, name: str, smallest: int, largest: int, least: int, most: int
) -> tuple[int, int]:
    """The option's smallest and largest value, which are within bounds and in order."""
    if not least <= smallest <= largest <= most:
        raise UserError(
            f"{task}: {name} must be {least} <= {name}_min <= {name}_max <= {most}, got {smallest} "
            f"and {largest}; change config.task.options.{name}_min or {name}_max"
        )
    return smallest, largest
