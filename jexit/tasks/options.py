"""Checks the settings that the generated tasks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jexit.errors import UserError

# With `steps="mixed"`, the fractions of prompts that leave a step's size free, that prescribe it,
# and that request the answer without steps.
MIXTURE: Mapping[str, float] = {"free": 0.45, "prescribed": 0.40, "at_once": 0.15}


def check_steps(task: str, steps: object, known: Sequence[object]) -> None:
    if steps not in known:
        raise UserError(
            f"config.task.options.steps is {steps!r}, but for task {task!r} it must be one of "
            f"{', '.join(map(str, known))}; choose one of these"
        )


def check_range(
    task: str, name: str, smallest: int, largest: int, least: int, most: int
) -> tuple[int, int]:
    """Returns (smallest, largest), the values of an option's settings `name`_min and `name`_max.

    Raises UserError unless `least` <= `smallest` <= `largest` <= `most`.
    """
    if not least <= smallest <= largest <= most:
        raise UserError(
            f"config.task.options.{name}_min is {smallest} and {name}_max is {largest}, but task "
            f"{task!r} needs {least} <= {name}_min <= {name}_max <= {most}; change one of them"
        )
    return smallest, largest
