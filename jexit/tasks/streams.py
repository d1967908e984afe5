"""Streams of generated problems by split and index. `val` and `test` contain no problem twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from jexit.tasks.base import Draw, Split, check_split, split_of

T = TypeVar("T")

ATTEMPTS = 1_000  # unsuitable draws in a row after which a split counts as exhausted


class NoMoreProblems(ValueError):
    """Raised if a split has fewer distinct problems than the index requires."""


class Stream(Generic[T]):
    """A stream of items drawn from a seed, such as the contents of generated problems.

    `draw_one` makes one item from a `Draw`. `key_of` returns a text that identifies an item,
    whatever its wording, and this key alone decides the split (see `split_of`). Items of `train`
    are drawn independently, so rare items are as rare as `draw_one` makes them. The first n items
    of `val` and of `test` are distinct for any n. Each of these items must differ from all those
    before it, so the earlier ones are drawn first and kept.
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
        """Returns the item at `index`, from 0. Raises NoMoreProblems if no further item exists."""
        check_split(split)
        if split == "train":
            return self._draw(split, index)
        listed = self._listed[split]
        while len(listed) <= index:
            listed.append(self._draw(split, len(listed), self._keys[split]))
        return listed[index]

    def _draw(self, split: Split, index: int, seen: set[str] | None = None) -> T:
        """Returns the first draw for the index that is in the split and whose key is not in `seen`.

        Adds the key to `seen`, if that is given.
        """
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
