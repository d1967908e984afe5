"""Provides generated problems by split and index; no problem occurs twice in `val` or `test`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from jexit.tasks.base import Draw, Split, check_split, split_of

T = TypeVar("T")

ATTEMPTS = 1_000  # consecutive unsuitable draws after which a split counts as exhausted


class NoMoreProblems(ValueError):
    """Raised if a split has too few distinct problems for the requested index."""


class ProblemStream(Generic[T]):
    """A sequence of items that are drawn at random from a seed, such as generated problems.

    `draw_one` draws an item. `key_of` returns a string that identifies an item independently of its
    wording, and decides the split of the item. Items of `train` are drawn independently, so an item
    can occur several times. Items of `val` and of `test` are distinct. For this reason, an item of
    `val` or `test` is drawn only after all earlier items of its split, which are kept in memory.
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
        """Returns the item at `index` of `split`; raises NoMoreProblems if there is none."""
        check_split(split)
        if split == "train":
            return self._draw(split, index)
        listed = self._listed[split]
        while len(listed) <= index:
            listed.append(self._draw(split, len(listed)))
        return listed[index]

    def _draw(self, split: Split, index: int) -> T:
        """Returns the first item drawn for `index` that is in `split` and, outside train, is new.

        Raises NoMoreProblems if none of `ATTEMPTS` draws gives such an item.
        """
        draw = Draw(self.name, self.seed, split, index)
        seen = self._keys.get(split, set())  # in train, an item may occur again
        for _ in range(ATTEMPTS):
            drawn = self._draw_one(draw)
            key = self._key_of(drawn)
            if split_of(key) == split and key not in seen:
                seen.add(key)
                return drawn
        raise NoMoreProblems(
            f"the {split} split of {self.name!r} has only about {index} distinct problems with "
            "these settings, but more are requested; lower config.eval.problems or widen the "
            "ranges in config.task.options"
        )
