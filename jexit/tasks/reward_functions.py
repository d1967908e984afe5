"""Reward functions, called as TRL and tunix call them, with whole batches and by keyword."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jexit.errors import UserError
from jexit.settings import shown
from jexit.tasks.user_code import time_limit, user_code

# What every function may take besides the columns of the rows; `completion_ids` is TRL's name.
GIVEN = ("prompts", "completions", "tokens", "completion_ids", "depths")


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """One function: a reward, or None, for each completion of a batch.

    It is called with keywords only. Each of `GIVEN` and of the rows' columns is a list with an
    entry a completion, and one that does not take `**columns` gets those that it names.
    """

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def check(self, columns: Sequence[str]) -> None:
        """Raises UserError if the function needs an argument that is not there."""
        for parameter in self._parameters:
            plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            needed = parameter.default is parameter.empty
            if plain and needed and parameter.name not in (*GIVEN, *columns):
                raise UserError(
                    f"reward function {self.name!r} needs {parameter.name!r}, and the rows have "
                    f"the columns {', '.join(columns)}; name one of them, or give it a default"
                )

    def __call__(
        self, arguments: Mapping[str, list[Any]], prompts: Sequence[str], *, seconds: float
    ) -> list[float | None]:
        """The reward of each completion, within so many seconds; `prompts` are for messages.

        Raises UserError, which names the function, the completion and the rule, for an exception,
        for another number of results, and for what is no finite number nor None.
        """
        if not any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            named = {p.name for p in self._parameters}
            arguments = {name: values for name, values in arguments.items() if name in named}
        what = f"reward function {self.name!r} failed"
        with user_code(what, self._file), time_limit(seconds, f"reward function {self.name!r}"):
            made = self.function(**arguments)
            if inspect.isawaitable(made):
                made = asyncio.run(_awaited(made))
        if isinstance(made, (str, bytes, Mapping)) or not hasattr(made, "__len__"):
            raise UserError(
                f"reward function {self.name!r} returned {shown(made)}; it must return a list with "
                "a number or None for each completion"
            )
        if len(made) != len(prompts):
            raise UserError(
                f"reward function {self.name!r} returned {len(made)} values for {len(prompts)} "
                "completions; it must return one for each"
            )
        return [
            self._number(value, place, prompt)
            for place, (value, prompt) in enumerate(zip(made, prompts, strict=True))
        ]

    def _number(self, value: Any, place: int, prompt: str) -> float | None:
        if hasattr(value, "item"):  # an array's or a tensor's entry
            value = value.item()
        if value is None:
            return None
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(
                f"reward function {self.name!r} returned {shown(value)} for completion {place} "
                f"(prompt {shown(prompt)}); a reward is a finite number or None"
            )
        return float(value)

    @property
    def _parameters(self) -> Sequence[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())

    @property
    def _file(self) -> str | None:
        return getattr(getattr(self.function, "__code__", None), "co_filename", None)


async def _awaited(result: Any) -> Any:
    return await result
