"""Tasks that are made of rows of data and reward functions."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jexit.errors import MissingFile, UserError, missing_package
from jexit.settings import is_unicode, shown
from jexit.tasks.base import (
    Attempt,
    Message,
    Problem,
    Split,
    Verdict,
    conversation_fault,
)
from jexit.tasks.files import FileTask, Row, Source, read_csv, read_jsonl
from jexit.tasks.reward_functions import GIVEN, LARGEST, RewardFunction
from jexit.tasks.user_code import user_code

# A sequence of mappings (a list, a Hugging Face Dataset, a Grain source), or where to read it from.
Rows = Sequence[Mapping[str, Any]] | str | os.PathLike[str]

# Metrics `reward/NAME` of an update, whatever the task.
RESERVED = ("mean", "verifier", "depth", "kl", "length")
CORRECT = 0.5  # the smallest value of `correct` for which a completion counts as correct

_HUB_SPLITS: Mapping[Split, str] = {"train": "train", "val": "validation", "test": "test"}


class RowsTask(FileTask):
    """A task made of rows of data and reward functions; `rows_task` explains the arguments."""

    def __init__(
        self,
        *,
        rows: Mapping[Source, Rows],
        prompt: str,
        completion: str | None,
        rewards: Mapping[RewardFunction, float],
        correct: RewardFunction,
        test_every: int,
    ) -> None:
        super().__init__(path=None, instruction="", test_every=test_every, rewards=None)
        self._rows, self._prompt, self._completion = dict(rows), prompt, completion
        self._functions, self._correct = dict(rewards), correct
        self._columns: dict[str, None] = {}  # of all rows that were read, in order
        own = {name: None for f in (*rewards, correct) for name in f.columns}
        self._needed = [*own, *filter(None, (completion,))]

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.judge([problem], [Attempt(text=completion)])[0]

    def judge(self, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[Verdict]:
        """Returns a verdict for each attempt; calls each reward function once for all attempts."""
        if not problems:
            return []
        rows = [problem.fields for problem in problems]
        arguments = {name: [row.get(name) for row in rows] for name in self._columns}
        tokens = [list(attempt.ids) for attempt in attempts]
        arguments |= {
            "prompts": [row[self._prompt] for row in rows],
            "completions": [
                attempt.text
                if isinstance(row[self._prompt], str)
                else [{"role": "assistant", "content": attempt.text}]
                for row, attempt in zip(rows, attempts, strict=True)
            ],
            "tokens": tokens,
            "completion_ids": tokens,
            "depths": [list(attempt.depths) for attempt in attempts],
        }
        prompts = [problem.prompt for problem in problems]
        made = {
            function: function(arguments, prompts, seconds=self.time_limit)
            for function in dict.fromkeys((*self._functions, self._correct))
        }
        return [self._verdict({f: made[f][i] for f in made}) for i in range(len(problems))]

    def _verdict(self, made: Mapping[RewardFunction, float | None]) -> Verdict:
        earned = {f: made[f] for f in self._functions if made[f] is not None}
        correct = made[self._correct]
        kind = "none" if correct is None else "strict" if correct >= CORRECT else "wrong"
        return Verdict(
            kind=kind,
            reward=sum(self._functions[f] * reward for f, reward in earned.items()),
            parts={f.name: reward for f, reward in earned.items()},
        )

    def _sources(self) -> Mapping[Source, Iterable[Row]]:
        return {source: _read(rows, source) for source, rows in self._rows.items()}

    def _fault(self, row: dict[str, Any]) -> str | None:
        if strange := [name for name in row if not isinstance(name, str)]:
            return f"it has the column {strange[0]!r}, but names of columns must be texts"
        if not self._columns:
            for function in (*self._functions, self._correct):
                function.check([*row])
            for column in filter(None, (self._prompt, self._completion)):
                if column not in row:
                    raise UserError(
                        f"the first row has no column {column!r}, only {', '.join(row)}; name one "
                        "of them in the call of rows_task"
                    )
        self._columns |= {name: None for name in row if name not in GIVEN}
        fault = conversation_fault(row.get(self._prompt))
        if fault:
            return f"{self._prompt!r} {fault}"
        if missing := [name for name in self._needed if name not in row]:
            return f"no {missing[0]!r}"
        if self._completion and _text_of(row.get(self._completion)) is None:
            value = shown(row.get(self._completion))
            return f"{self._completion!r} is {value}, but it must be valid text that is not blank"
        return None

    def _to_problem(self, row: dict[str, Any]) -> Problem:
        said = row[self._prompt]
        messages: Sequence[Message] = (
            [{"role": "user", "content": said}] if isinstance(said, str) else said
        )
        answer = row.get("answer", "")
        return Problem(
            prompt=messages[-1]["content"],
            answer=answer if isinstance(answer, str) else str(answer),
            completion=_text_of(row[self._completion]) if self._completion else None,
            earlier=tuple(messages[:-1]),
            fields=row,
        )

    def _group(self, problem: Problem) -> str:
        return repr(problem.messages)


def rows_task(
    *,
    train: Rows,
    test: Rows | None = None,
    val: Rows | None = None,
    prompt: str = "prompt",
    completion: str | None = None,
    rewards: Mapping[Callable[..., Any], float] | Sequence[Callable[..., Any]] | Callable[..., Any],
    correct: Callable[..., Any] | None = None,
    test_every: int = 8,
) -> RowsTask:
    """Makes a task from rows of data and reward functions.

    To use the task, assign it to a name in a Python file and set `config.task.name` to
    `FILE.py:NAME`.

    Args:
      train: The rows: a sequence of mappings; the path of a JSONL, CSV or Parquet file; or
        `hf:OWNER/NAME[:CONFIG]`, a data set of the Hugging Face hub, of which the split `train`,
        `validation` or `test` is used for `train`, `val` or `test`.
      test: Rows in one of the forms of `train`. If this is None, every `test_every`-th distinct
        prompt of `train` is held out for testing.
      val: Rows in one of the forms of `train`. If this is None, one in sixteen of the remaining
        distinct prompts is held out for validation.
      prompt: The name of the column with the user's message, or with a list of chat messages
        (`role` and `content`) whose last message is the user's.
      completion: The name of the column with reference completions, from which
        `configs/finetune.py` learns. None if the rows contain no reference completions.
      rewards: A mapping from functions to their weights, or one or several functions with weight
        1. Each function is called with keyword arguments: `prompts` and `completions` (strings, or
        chat messages if the prompts are chat messages), `tokens` and `depths` (a list of integers
        for each completion; a depth is the number of layers that ran for the token), and every
        column. The function returns a list with a number or None for each completion. None is left
        out of the weighted sum that forms the reward. Functions may be asynchronous.
      correct: The function that decides accuracy: a completion is correct if the function returns
        at least 0.5 for it. The default is the first function of `rewards`.
      test_every: If `test` is None, one of every `test_every` distinct prompts is held out for
        testing; 0 holds out no prompts.

    Returns:
      The task. It reports a metric `reward/NAME` for each reward function.

    Raises:
      UserError: If an argument is invalid, `rewards` is empty, two functions have the same name, or
        a function has the name of a metric of every run, such as `length`.
    """
    if not (callable(rewards) or isinstance(rewards, (Mapping, Sequence))):
        raise UserError(
            f"rewards is {shown(rewards)}, but it must be a function, a list of functions, or "
            "functions with their weights, such as {my_reward: 1.0}; pass one of these to rows_task"
        )
    each = [rewards] if callable(rewards) else rewards
    weighted = [*each.items()] if isinstance(each, Mapping) else [(one, 1.0) for one in each]
    for name, some in (("train", train), ("val", val), ("test", test)):
        if not (some is None and name != "train") and not _are_rows(some):
            raise UserError(
                f"the rows of {name} are {shown(some)}, but they must be a sequence of mappings "
                "(of a generator, take list(...)), the path of a file, or hf:OWNER/NAME; pass one "
                "of these to rows_task"
            )
    if isinstance(test_every, bool) or not isinstance(test_every, int) or test_every < 0:
        raise UserError(
            f"test_every is {shown(test_every)}, but it must be a whole number of at least 0; pass "
            "0 to hold out no rows for testing"
        )
    if correct is not None and not callable(correct):
        raise UserError(
            f"correct is {shown(correct)}, but it must be a function; pass one like those in "
            "rewards, or leave it out"
        )
    functions = {}
    for function, weight in weighted:
        if not callable(function):
            raise UserError(
                f"rewards contains {shown(function)}, but it must contain functions; pass them "
                "with their weights, such as {my_reward: 1.0}"
            )
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not abs(weight) <= LARGEST:
            raise UserError(
                f"the weight of {function} is {shown(weight)}, but it must be a number "
                "from -1,000,000 to 1,000,000; change it in rewards"
            )
        functions[RewardFunction(function)] = float(weight)
    names = [function.name for function in functions]
    if taken := [name for name in names if name in RESERVED]:
        raise UserError(
            f"a reward function is called {taken[0]!r}, but every run already has a metric "
            f"reward/{taken[0]}; rename the function"
        )
    if not names:
        raise UserError("rewards contains no function, but at least one is needed; add one")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"rewards contains {names.count(twice[0])} functions called {twice[0]!r}, but their "
            "names must differ; rename one"
        )
    given = {"whole" if test is None else "train": train, "val": val, "test": test}
    return RowsTask(
        rows={source: each for source, each in given.items() if each is not None},
        prompt=prompt,
        completion=completion,
        rewards=functions,
        correct=next(
            (one for one in functions if correct in (None, one.function)), RewardFunction(correct)
        ),
        test_every=test_every,
    )


def _are_rows(rows: Any) -> bool:
    sequence = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    return isinstance(rows, (str, os.PathLike)) or (sequence and not isinstance(rows, Mapping))


def _read(rows: Rows, source: Source) -> Iterator[Row]:
    """Yields (place, row) for each row, or (place, reason) if the row cannot be used.

    The place is a text such as "row 3" or "FILE:LINE". `source` is the split to load if `rows`
    names a data set of the Hugging Face hub.
    """
    if not isinstance(rows, (str, os.PathLike)):
        for index in range(len(rows)):
            with user_code(f"row {index} of the rows cannot be read", None):
                row = rows[index]
            yield f"row {index}", dict(row) if isinstance(row, Mapping) else "not a mapping"
        return
    if str(rows).startswith("hf:"):
        yield from _read(_hub_rows(str(rows), source), source)
        return
    path = pathlib.Path(rows).expanduser()
    if not path.is_file():
        raise MissingFile(
            f"the rows file {rows} does not exist; give a JSONL, CSV or Parquet file, or "
            "hf:OWNER/NAME"
        )
    readers: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
        ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": _parquet_rows,
    }  # fmt: skip
    if path.suffix not in readers:
        raise UserError(
            f"the name of {path} ends in {path.suffix!r}, but it must end in one of "
            f"{', '.join(readers)}; rename the file to match its contents"
        )
    yield from readers[path.suffix](path)


def _parquet_rows(file: pathlib.Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
        readable = "make it readable" if isinstance(error, PermissionError) else "give a valid one"
        raise UserError(
            f"{file} cannot be read as a Parquet file ({reason}); {readable}"
        ) from error
    for index, row in enumerate(rows):
        yield f"{file}[{index}]", row


@functools.lru_cache(maxsize=8)
def _hub_rows(reference: str, source: Source) -> Sequence[Mapping[str, Any]]:
    """Returns a split of a data set of the Hugging Face hub, downloaded if it is not cached.

    `reference` has the form `hf:OWNER/NAME[:CONFIG]`. The source "whole" stands for the split
    `train`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{reference} cannot be loaded, because {missing_package('datasets', 'hub')}"
        ) from error
    name, _, config = reference.removeprefix("hf:").partition(":")
    split = _HUB_SPLITS.get(source, "train")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library's errors have no common base
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the {split} split of {reference} cannot be loaded ({type(error).__name__}: "
            f"{reason}); check the network and your access (hf auth login), or name a data set "
            "that has this split, as hf:OWNER/NAME or hf:OWNER/NAME:CONFIG"
        ) from error


def _text_of(value: Any) -> str | None:
    """Returns the text of a string or of a list of one chat message.

    Returns None for other values, and for text that is blank or not valid Unicode.
    """
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0].get("content") if isinstance(value[0], Mapping) else None
    if not isinstance(value, str) or not value.strip():
        return None
    return value if is_unicode(value) else None
