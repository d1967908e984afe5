"""Tasks whose problems come from files: rows that cannot be used are left out and counted."""

from __future__ import annotations

import abc
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from jexit.errors import MissingFile
from jexit.tasks.base import Problem, Rewards, Split, Task, check_split

_REASONS_SHOWN = 5
_VAL_EVERY = 16  # a group of the training rows in so many is held out to validate with

_log = logging.getLogger(__name__)

# A split that the data has itself, or "whole": rows without splits.
Source = Literal["train", "val", "test", "whole"]

# A row that is fit for use, or the reason why it is not; with the place it came from.
Row = tuple[str, dict[str, Any] | str]


class FileTask(Task):
    """A task that reads rows once, when their split is first asked for.

    `path` names files of each split in a folder, or one file: a test split if its name starts with
    `test`. `instruction` ends every prompt, and of rows that have no split of their own every
    `test_every`-th group is held out for the test split (0: none; see `_group`). Training rows of a
    group that the data holds out as well are left out. Where the data has no validation split,
    every sixteenth group of the training rows is held out for it, of fewer groups the last one.
    Rows that cannot be used are left out, with one warning per source that counts them and names
    the first. Raises MissingFile when there is nothing at `path`.
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
            raise MissingFile(f"no data set at {self.path}; set config.task.path to {self.wanted}")
        self._read: dict[Source, list[Problem]] = {}
        self._problems: dict[Split, list[Problem]] = {}

    def size(self, split: Split) -> int:
        return len(self._split(split))

    def problem(self, split: Split, index: int) -> Problem:
        return self._split(split)[index]

    @abc.abstractmethod
    def _sources(self) -> Mapping[Source, Iterable[Row]]:
        """The rows by the split that they are, or all as "whole", of which a part is held out."""

    @abc.abstractmethod
    def _fault(self, row: dict[str, Any]) -> str | None:
        """Why a row cannot be used, or None."""

    @abc.abstractmethod
    def _to_problem(self, row: dict[str, Any]) -> Problem:
        """The problem in a row without fault."""

    def _group(self, problem: Problem) -> str:
        """What problems share that must be on the same side."""
        return problem.prompt

    def _split(self, split: Split) -> list[Problem]:
        check_split(split)
        if split not in self._problems:
            self._problems[split] = self._load(split)
        return self._problems[split]

    def _load(self, split: Split) -> list[Problem]:
        if "whole" in self._sources():
            rest, test = self._hold_out(self._source("whole"), self.test_every)
            val = self._source("val")
            rest = self._apart(rest, val)
        elif split == "test":
            return self._source("test")
        else:
            val, test = self._source("val"), []
            rest = self._apart(self._source("train"), [*val, *self._source("test")])
        if not val:
            groups = len({self._group(problem) for problem in rest})
            rest, val = self._hold_out(rest, min(_VAL_EVERY, groups) if groups > 1 else 0)
        return {"train": rest, "val": val, "test": test}[split]

    def _apart(self, train: list[Problem], held_out: list[Problem]) -> list[Problem]:
        """The training problems without the groups that the data itself holds out as well."""
        taken = {self._group(problem) for problem in held_out}
        rest = [problem for problem in train if self._group(problem) not in taken]
        if len(rest) < len(train):
            _log.warning(
                "left out %d of %d training rows, which are in the val or test split too",
                len(train) - len(rest),
                len(train),
            )
        return rest

    def _source(self, source: Source) -> list[Problem]:
        if source in self._read:
            return self._read[source]
        problems, reasons = [], []
        for place, row in self._sources().get(source, ()):
            reason = row if isinstance(row, str) else self._fault(row)
            if reason:
                reasons.append(f"{place}: {reason}")
            else:
                assert isinstance(row, dict)
                problems.append(self._to_problem(row))
        if reasons:
            more = len(reasons) - _REASONS_SHOWN
            _log.warning(
                "skipped %d of %d rows%s: %s%s",
                len(reasons),
                len(reasons) + len(problems),
                "" if source == "whole" else f" of the {source} split",
                "; ".join(reasons[:_REASONS_SHOWN]),
                f"; and {more} more" if more > 0 else "",
            )
        self._read[source] = problems
        return problems

    def _hold_out(self, problems: list[Problem], every: int) -> tuple[list[Problem], list[Problem]]:
        """The problems without every `every`-th group (0: none is held out), and those groups."""
        ranks: dict[str, int] = {}
        for problem in problems:
            ranks.setdefault(self._group(problem), len(ranks))
        kept: list[Problem] = []
        held_out: list[Problem] = []
        for problem in problems:
            last = every > 0 and ranks[self._group(problem)] % every == every - 1
            (held_out if last else kept).append(problem)
        return kept, held_out


def source_of(file: pathlib.Path) -> Source:
    """What one file is: a test split if its name starts with `test`."""
    return "test" if file.name.startswith("test") else "whole"


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
