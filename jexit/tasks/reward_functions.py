"""Reward functions, which are called with keyword arguments for a batch, as in TRL and tunix."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jexit.errors import UserError
from jexit.settings import shown
from jexit.tasks.user_code import time_limit, user_code

# The arguments that every function may take besides the columns of the rows. `completion_ids` is
# TRL's name for `tokens`.
LARGEST = 1e6  # of a reward's magnitude
GIVEN = ("prompts", "completions", "tokens", "completion_ids", "depths")


@dataclasses.dataclass(frozen=True, eq=False)  # a function may be unhashable
class RewardFunction:
    """A user's function that returns a reward, or None, for each completion of a batch.

    The function is called with keyword arguments: the names in `GIVEN` and the columns of the rows.
    Each argument is a list with one entry per completion. A function without a `**` parameter
    receives only the arguments that its signature names.
    """

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def columns(self) -> list[str]:
        """The names of the data columns that the function requires."""
        return [
            parameter.name
            for parameter in self._parameters
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.default is parameter.empty
            and parameter.name not in GIVEN
        ]

    def check(self, columns: Sequence[str]) -> None:
        for name in self.columns:
            if name not in columns:
                raise UserError(
                    f"reward function {self.name!r} needs {name!r}, but the first row "
                    f"has only the columns {', '.join(columns)}; name one of them, or give "
                    f"{name!r} a default"
                )

    def __call__(
        self, arguments: Mapping[str, list[Any]], prompts: Sequence[str], *, seconds: float
    ) -> list[float | None]:
        """Returns the reward of each completion, or None where the function returns None.

        `arguments` maps names to lists with one entry per completion. Error messages quote
        `prompts`. Raises UserError if the function takes longer than `seconds`, raises an
        exception, or does not return a finite number or None for each completion.
        """
        if not any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            named = {p.name for p in self._parameters}
            arguments = {name: values for name, values in arguments.items() if name in named}
        arguments = {name: [*values] for name, values in arguments.items()}  # its own, to change
        what = f"reward function {self.name!r} failed"
        file = getattr(getattr(self.function, "__code__", None), "co_filename", None)
        with user_code(what, file), time_limit(seconds, f"reward function {self.name!r}"):
            made = self.function(**arguments)
            if inspect.isawaitable(made):
                made = _awaited(made)
            ordered = hasattr(made, "__len__") and hasattr(made, "__getitem__")
            text = isinstance(made, (str, bytes, Mapping))
            whole = ordered and not text and getattr(made, "ndim", 1) == 1
            values = [made[place] for place in range(len(made))] if whole else None
        if values is None:
            raise UserError(
                f"reward function {self.name!r} returned {shown(made)}, but it must return a list "
                "with a number or None for each completion; fix its return value"
            )
        if len(values) != len(prompts):
            raise UserError(
                f"reward function {self.name!r} returned {len(values)} values for {len(prompts)} "
                "completions, but it must return one value for each; fix its return value"
            )
        return [
            self._number(value, place, prompt)
            for place, (value, prompt) in enumerate(zip(values, prompts, strict=True))
        ]

    def _number(self, value: Any, place: int, prompt: str) -> float | None:
        if value is None:
            return None
        try:
            number = value.item() if hasattr(value, "item") else value  # of an array or a tensor
            if isinstance(number, numbers.Real) and abs(number) <= LARGEST:
                return float(number)
        except (TypeError, ValueError, OverflowError):
            pass
        raise UserError(
            f"reward function {self.name!r} returned {shown(value)} for completion {place} "
            f"(prompt {shown(prompt)}), but a reward must be None or a number from -{LARGEST:,.0f} "
            f"to {LARGEST:,.0f}; fix its return value"
        )

    @property
    def _parameters(self) -> Sequence[inspect.Parameter]:
        try:
            return list(inspect.signature(self.function).parameters.values())
        except ValueError:  # of a built-in function, which does not say what it takes
            return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Returns the same event loop in every call, because clients and locks are bound to a loop."""
    return asyncio.new_event_loop()


def _awaited(made: Any) -> Any:
    """Runs an awaitable to its end and returns its result; cancels it if interrupted."""

    async def awaited() -> Any:
        return await made

    task = _loop().create_task(awaited())
    try:
        return _loop().run_until_complete(task)
    finally:
        if not task.done():
            task.cancel()
            _loop().run_until_complete(asyncio.wait([task]))
