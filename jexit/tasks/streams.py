"""Generated problems by split and index: assignment to splits; `val` and `test` have no repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from jexit.tasks.base import Draw, Split, check_split, split_of

T = TypeVar("T")

ATTEMPTS = 1_000  # draws in a row that all repeat: there is hardly another problem to be had


class NoMoreProblems(ValueError):
    """A split has fewer distinct problems than the index asks for."""


class Stream(Generic[T]):
    """What problems are about, drawn from a seed.

    `draw_one` makes one from a `Draw`; `key_of` says in text what it *is*, whatever its wording.
    The key alone decides the split (`split_of`). Training draws are independent, so what is rare is
    as rare as `draw_one` makes it. The first n of `val` and of `test` are distinct for any n: each
    differs from all those before it, which are therefore drawn first and kept.
    """

    def __init__(
        self, name: str, seed: int, draw_one: Callable[[Draw], T], key_of: Callable[[T], str]
    ) -> None:
        self.name = name
        self.seed = seed
        self._draw_one = draw_one
        self._key_of = key_of
        self._listed: dict[Split, list[T]] = {"val": [], "test": []}
        self._keys: dict[Split, set[str]] = {"val": set(), "test": set()}

    def at(self, split: Split, index: int) -> T:
        """The one at `index`, from 0; raises NoMoreProblems where all have come up before."""
        check_split(split)
        if split == "train":
            return self._draw(split, index)
        listed = self._listed[split]
        while len(listed) <= index:
            listed.append(self._draw(split, len(listed), self._keys[split]))
        return listed[index]

    def _draw(self, split: Split, index: int, seen: set[str] | None = None) -> T:
        """The first draw of the index that is on the split's side and, given `seen`, not in it."""
        draw = Draw(self.name, self.seed, split, index)
        for _ in range(ATTEMPTS):
            drawn = self._draw_one(draw)
            key = self._key_of(drawn)
            if split_of(key) != split or (seen is not None and key in seen):
                continue
            if seen is not None:
                seen.add(key)
            return drawn
        raise NoMoreProblems(
            f"the {split} split of {self.name!r} has only about {index} distinct problems with "
            "these settings; lower config.eval.problems or widen the ranges in config.task"
        )
