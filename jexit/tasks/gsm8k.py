"""The task `gsm8k`: grade-school word problems, from JSONL files or tensorflow-datasets.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jexit.errors import MissingFile, UserError
from jexit.tasks import answers
from jexit.tasks.base import SPLITS, Draw, Message, Problem, Rewards, Split, turns
from jexit.tasks.files import FileTask, Row, Source, read_jsonl, source_of, text_fault
from jexit.tasks.number_chain import NumberChain

INSTRUCTION = (
    "Think step by step. End with a line of the form\n#### answer\nwhere answer is a number."
)

PUBLISHED_SPLITS: tuple[Split, ...] = ("train", "test")

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Gsm8k(FileTask, NumberChain):
    """Grade-school word problems whose answers are numbers, read from files.

    `path` is one of

    - a folder with `train.jsonl`, `test*.jsonl` and perhaps `val*.jsonl`, or one JSONL file;
    - a tensorflow-datasets folder, either the data directory or the folder of a data set's version;
    - None, for the default data directory of tensorflow-datasets. GSM8K is downloaded if this
      directory does not contain it yet.

    Every prompt is preceded by `shots` worked examples from the training split. The examples are
    drawn with `seed` and are the same for all problems, but a problem is never one of its own
    examples.

    A row must contain the strings `question` and `answer`, and `answer` must end in `#### n`, where
    n is a number. The docstring of `jexit.tasks.answers` defines what a number is and which number
    is the answer of a completion.
    """

    name = "gsm8k"
    prose = True
    wanted = (
        "a JSONL file, a folder with train.jsonl and test*.jsonl, or a tensorflow-datasets folder"
    )

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None = None,
        instruction: str = INSTRUCTION,
        test_every: int = 8,
        shots: int = 0,
        seed: int = 0,
        rewards: Rewards | None = None,
    ) -> None:
        if shots < 0:
            raise UserError(
                f"config.task.options.shots is {shots}, but it must be at least 0; raise it"
            )
        super().__init__(path=path, instruction=instruction, test_every=test_every, rewards=rewards)
        self.shots = shots
        self.seed = seed
        self._examples: Sequence[Problem] = ()

    def problem(self, split: Split, index: int) -> Problem:
        problem = super().problem(split, index)
        return dataclasses.replace(problem, earlier=self._shots(problem)) if self.shots else problem

    def _shots(self, problem: Problem) -> tuple[Message, ...]:
        """Returns messages with `shots` worked training examples, none of which is `problem`."""
        if not self._examples:
            # Keyed by question, because the data may contain one twice. One more than are shown is
            # drawn, in case one of them is the problem itself.
            rows = list({row.prompt: row for row in self._split("train")}.values())
            if len(rows) <= self.shots:
                raise UserError(
                    f"config.task.options.shots is {self.shots}, but {self.shots} shots need "
                    f"{self.shots + 1} different training questions, and there are only "
                    f"{len(rows)}; lower config.task.options.shots, or give more training data"
                )
            self._examples = Draw("gsm8k shots", self.seed).sample(rows, self.shots + 1)
        shown = [row for row in self._examples if row.prompt != problem.prompt]
        return turns((row.prompt, row.completion or "") for row in shown[: self.shots])

    def _fault(self, row: dict[str, Any]) -> str | None:
        return row_fault(row)

    def _to_problem(self, row: dict[str, Any]) -> Problem:
        worked = _CALCULATOR.sub("", row["answer"]).strip()
        return Problem(
            prompt=f"{row['question'].strip()}\n\n{self.instruction}".strip(),
            answer=worked.rpartition("####")[2].strip(),
            completion=worked,
            fields={"question": row["question"]},
        )

    def _sources(self) -> Mapping[Source, Iterable[Row]]:
        if self.path is None:
            return _tfds_rows(_downloaded_builder())
        if self.path.is_file():
            return {source_of(self.path): read_jsonl(self.path)}
        files = {split: published_files(self.path, split) for split in SPLITS}
        if any(files.values()):
            return {
                split: itertools.chain.from_iterable(map(read_jsonl, some))
                for split, some in files.items()
            }
        # The names of folders that tensorflow-datasets has not finished start with "incomplete.".
        versions = sorted(self.path.glob("gsm8k/[0-9]*/dataset_info.json"))
        for info in (self.path / "dataset_info.json", *reversed(versions)):
            if info.exists():
                import tensorflow_datasets as tfds

                return _tfds_rows(tfds.builder_from_directory(str(info.parent)))
        raise MissingFile(
            f"{self.path} contains no GSM8K data: it must contain train.jsonl, test*.jsonl or a "
            "prepared tensorflow-datasets folder (gsm8k/VERSION/dataset_info.json); set "
            "config.task.path to such a folder"
        )


task = Gsm8k


def published_files(folder: pathlib.Path, split: Split) -> list[pathlib.Path]:
    """Returns the files of `split`: `train.jsonl`, or all of `val*.jsonl` or `test*.jsonl`.

    Files named "socratic" contain the same questions with other worked answers, and are left out.
    """
    pattern = "train.jsonl" if split == "train" else f"{split}*.jsonl"
    return [file for file in sorted(folder.glob(pattern)) if "socratic" not in file.name]


def row_fault(row: dict[str, Any]) -> str | None:
    """Returns the reason why `row` cannot be used, or None; see `Gsm8k` for the requirements."""
    if fault := text_fault(row, ("question", "answer")):
        return fault
    _, marker, answer = row["answer"].rpartition("####")
    if not marker or answers.parse_number(answer) is None:
        return "'answer' does not end in '#### number'"
    return None


def _tfds_rows(builder: Any) -> Mapping[Source, Iterable[Row]]:
    return {split: _tfds_split(builder, split) for split in PUBLISHED_SPLITS}


def _tfds_split(builder: Any, split: Split) -> Iterator[Row]:
    try:
        source = builder.as_data_source(split=split)
    except Exception as error:  # the library's errors have no common base
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"split {split!r} in {builder.data_path} cannot be read without TensorFlow ({reason}); "
            "prepare it with file_format='array_record', or set config.task.path to JSONL files"
        ) from error
    for index in range(len(source)):
        row = {
            key: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            for key, value in source[index].items()
        }
        yield f"{builder.data_path}, {split}[{index}]", row


def _downloaded_builder() -> Any:
    # The class, not tfds.builder("gsm8k"): looking the name up needs TensorFlow.
    from tensorflow_datasets.text.gsm8k import gsm8k

    builder = gsm8k.Gsm8k(file_format="array_record")
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:  # network, disk, checksums: the library's own errors
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"GSM8K is not in {builder.data_path} and could not be downloaded ({reason}); set "
                "config.task.path to JSONL files or to a prepared tensorflow-datasets folder"
            ) from error
    return builder
