"""The base class of tasks that read problems from files, and readers of JSONL and CSV files."""

from __future__ import annotations

import abc
import csv
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from jexit.errors import MissingFile, UserError
from jexit.settings import is_unicode, shown
from jexit.tasks.base import Problem, Rewards, Split, Task, check_split
from jexit.untrusted import parse_json

_REASONS_SHOWN = 5
_VAL_EVERY = 16  # one in this number of groups of training rows is held out for validation

_log = logging.getLogger(__name__)

# A split that the data itself has, or "whole" for rows without splits.
Source = Literal["train", "val", "test", "whole"]

# The place that a row came from, and the row or the reason why it cannot be used.
Row = tuple[str, dict[str, Any] | str]


class FileTask(Task):
    """A task that reads its problems from files when their split is first requested.

    `path` is a folder or one file. A single file is the test split if its name starts with `test`.
    `instruction` is the text at the end of every prompt.

    A split is held out by groups: problems of one group, by default those with the same prompt, go
    to the same split. If rows are not divided into splits, every `test_every`-th group of them is
    held out for the test split (0: none). Training rows whose group also occurs in the data's own
    validation or test split are left out, and so are validation rows whose group occurs in its
    test split. If the data contains no validation split, every sixteenth
    group of the training rows is held out for validation. If there are only two to fifteen groups,
    the last one is held out; a single group stays in training.

    Rows that cannot be used are left out, with one warning for each split. Raises MissingFile if
    `path` does not exist.
    """

    wanted: ClassVar[str]  # what `path` may be, for error messages

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
            raise MissingFile(
                f"there is no data set at {self.path}; set config.task.path to {self.wanted}"
            )
        self._read: dict[Source, list[Problem]] = {}
        self._problems: dict[Split, list[Problem]] = {}

    def size(self, split: Split) -> int:
        return len(self._split(split))

    def problem(self, split: Split, index: int) -> Problem:
        return self._split(split)[index]

    @abc.abstractmethod
    def _sources(self) -> Mapping[Source, Iterable[Row]]:
        """Returns the rows of each split; rows that are not divided into splits are under "whole".

        A `Row` is a pair: its origin, such as "FILE:LINE", and its fields or why it cannot be used.
        """

    @abc.abstractmethod
    def _fault(self, row: dict[str, Any]) -> str | None:
        """Returns why `row` cannot be used, such as "no 'answer'", or None if it can be used."""

    @abc.abstractmethod
    def _to_problem(self, row: dict[str, Any]) -> Problem:
        """Returns the problem that a usable row describes."""

    def _group(self, problem: Problem) -> str:
        """Returns the key of the problem's group: by default its prompt; tasks may override this.

        Problems with the same key go to the same split, so that none leaks into a held-out split.
        """
        return problem.prompt

    def _split(self, split: Split) -> list[Problem]:
        check_split(split)
        if split not in self._problems:
            self._problems[split] = self._load(split)
        return self._problems[split]

    def _load(self, split: Split) -> list[Problem]:
        if "whole" in self._sources():
            val = self._source("val")
            rest, test = self._hold_out(self._apart("whole", val), self.test_every)
        elif split == "test":
            return self._source("test")
        else:
            test = self._source("test")
            val = self._apart("val", test)
            rest = self._apart("train", [*val, *test])
        if not val:
            groups = len({self._group(problem) for problem in rest})
            rest, val = self._hold_out(rest, min(_VAL_EVERY, groups) if groups > 1 else 0)
        return {"train": rest, "val": val, "test": test}[split]

    def _apart(self, source: Source, held_out: list[Problem]) -> list[Problem]:
        """Returns the problems of `source` whose group is not in `held_out`; counts the others."""
        rows = self._source(source)
        taken = {self._group(problem) for problem in held_out}
        rest = [problem for problem in rows if self._group(problem) not in taken]
        if len(rest) < len(rows):
            _log.warning(
                "left out %d of %d %s rows because they are also in the val or test split",
                len(rows) - len(rest),
                len(rows),
                "validation" if source == "val" else "training",
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
        """Returns (kept, held out); every `every`-th group of problems is held out (0: none).

        Groups are counted in the order in which they first occur.
        """
        groups = list(dict.fromkeys(map(self._group, problems)))
        chosen = set(groups[every - 1 :: every] if every else ())
        kept: list[Problem] = []
        held_out: list[Problem] = []
        for problem in problems:
            (held_out if self._group(problem) in chosen else kept).append(problem)
        return kept, held_out


def source_of(file: pathlib.Path) -> Source:
    """Returns "test" if the name of `file` starts with `test`, otherwise "whole" (no splits)."""
    return "test" if file.name.startswith("test") else "whole"


def read_jsonl(file: pathlib.Path) -> Iterator[Row]:
    """Yields ("FILE:LINE", row) for each line that is not blank.

    In place of a row that is not a JSON object, yields the reason why it cannot be used.
    """
    with file.open("rb") as lines:  # bytes: one undecodable line must not spoil the others
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            yield f"{file}:{number}", row if isinstance(row, dict) else "not a JSON object"


def read_csv(file: pathlib.Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yields ("FILE:LINE", row) for each row, or ("FILE:LINE", reason) if it cannot be used.

    Bytes that are not UTF-8 affect only their own row. Raises UserError if the file lacks one of
    `columns`.
    """
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            names = reader.fieldnames or ()
        except csv.Error:
            names = ()
        missing = [column for column in columns if column not in names]
        if missing:
            raise UserError(
                f"{file} has no column {missing[0]!r}, but its first line must name the columns "
                f"{', '.join(columns)}; add or rename the column"
            )
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield f"{file}:{reader.line_num}", f"not a CSV row ({error})"
                continue
            if row is None:
                return
            whole = None not in row and None not in row.values()
            yield f"{file}:{reader.line_num}", row if whole else "not one value per column"


def text_fault(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Returns why the value of one of `keys` in `row` cannot be used, or None if all can be used.

    Each value must be a string of valid Unicode that is not blank.
    """
    for key in keys:
        if key not in row:
            return f"no {key!r}"
        if not isinstance(row[key], str):
            return f"{key!r} is {shown(row[key])}, but it must be a text"
        if not row[key].strip():
            return f"{key!r} is empty"
        if not is_unicode(row[key]):  # also of bytes in a CSV file that are not UTF-8
            return f"{key!r} is not valid Unicode"
    return None
