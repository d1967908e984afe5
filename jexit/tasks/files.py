"""Tasks whose problems come from files: rows that cannot be used are left out and counted."""

from __future__ import annotations

import abc
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

from jexit.tasks.base import Problem, Rewards, Split, Task, check_split

_REASONS_SHOWN = 5

_log = logging.getLogger(__name__)

# A row that is fit for use, or the reason why it is not; with the place it came from.
Row = tuple[str, dict[str, Any] | str]


class FileTask(Task):
    """A task that reads each split's rows once, when it is first asked for.

    `path` names a file or a folder, `instruction` ends every prompt, and of rows that have no split
    of their own every `test_every`-th group is held out for the test split (0: none; see `group`).
    Rows that cannot be used are left out, with one warning per split that counts them and names the
    first. Raises FileNotFoundError when there is nothing at `path`.
    """

    wanted: ClassVar[str]  # what `path` may name, for the error message

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None,
        instruction: str,
        test_every: int,
        rewards: Rewards | None,
    ) -> None:
        super().__init__(rewards=rewards)
        self.path = pathlib.Path(path).expanduser() if path else None
        self.instruction = instruction
        self.test_every = test_every
        if self.path is not None and not self.path.exists():
            raise FileNotFoundError(
                f"no data set at {self.path}; set config.task.path to {self.wanted}"
            )
        self.skipped_rows: dict[str, int] = {}
        self._problems: dict[str, list[Problem]] = {}

    def size(self, split: Split) -> int:
        return len(self._split(split))

    def problem(self, split: Split, index: int) -> Problem:
        return self._split(split)[index]

    @abc.abstractmethod
    def _rows(self, split: Split) -> Iterator[Row]:
        """The split's rows, or all rows where `_is_whole`."""

    @abc.abstractmethod
    def _fault(self, row: dict[str, Any]) -> str | None:
        """Why a row cannot be used, or None."""

    @abc.abstractmethod
    def _to_problem(self, row: dict[str, Any]) -> Problem:
        """The problem in a row without fault."""

    @abc.abstractmethod
    def _is_whole(self) -> bool:
        """Whether the rows come without splits, so that a part of them is held out."""

    def _group(self, problem: Problem) -> str:
        """What problems share that must be on the same side."""
        return problem.prompt

    def _split(self, split: Split) -> list[Problem]:
        check_split(split)
        if split not in self._problems:
            self._problems[split] = self._load(split)
        return self._problems[split]

    def _load(self, split: Split) -> list[Problem]:
        problems, reasons = [], []
        for place, row in self._rows(split):
            reason = row if isinstance(row, str) else self._fault(row)
            if reason:
                reasons.append(f"{place}: {reason}")
            else:
                assert isinstance(row, dict)
                problems.append(self._to_problem(row))
        self.skipped_rows[split] = len(reasons)
        if reasons:
            more = len(reasons) - _REASONS_SHOWN
            _log.warning(
                "skipped %d of %d rows of the %s split: %s%s",
                len(reasons),
                len(reasons) + len(problems),
                split,
                "; ".join(reasons[:_REASONS_SHOWN]),
                f"; and {more} more" if more > 0 else "",
            )
        return self._hold_out(problems, split) if self._is_whole() else problems

    def _hold_out(self, problems: list[Problem], split: Split) -> list[Problem]:
        """The part of rows without splits that belongs to the split, whole groups on one side."""
        ranks: dict[str, int] = {}
        for problem in problems:
            ranks.setdefault(self._group(problem), len(ranks))
        every = self.test_every

        def held_out(problem: Problem) -> bool:
            return every > 0 and ranks[self._group(problem)] % every == every - 1

        return [problem for problem in problems if held_out(problem) == (split == "test")]


def text_fault(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Why one of a row's values is no text that can be used, or None."""
    for key in keys:
        if key not in row:
            return f"no {key!r}"
        if not isinstance(row[key], str) or not row[key].strip():
            return f"{key!r} is not a text"
        try:
            row[key].encode()
        except UnicodeEncodeError:  # half of a surrogate pair, or bytes that are no UTF-8
            return f"{key!r} holds half a character"
    return None
