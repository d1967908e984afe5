"""Prepares published data sets for tensorflow-datasets, without network access.

    python -m jexit.data.prepare gsm8k --from=DIR [--to=TFDS_DIR]

DIR contains GSM8K as published: `train.jsonl` and `test.jsonl`, with one question and answer per
line (https://github.com/openai/grade-school-math). TFDS_DIR is the data directory of
tensorflow-datasets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets). Training with
`config.task.name=gsm8k` reads the dataset from the same directory. The dataset is written either
completely or not at all, and an existing dataset is not changed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from jexit.errors import MissingFile, UserError, command, without_remedy
from jexit.tasks.files import read_jsonl
from jexit.tasks.gsm8k import PUBLISHED_SPLITS, Gsm8k, row_fault

PUBLISHED_ROWS = {"train": 7473, "test": 1319}

_AS_PUBLISHED = "put the files of github.com/openai/grade-school-math there, exactly as published"


def prepare_gsm8k(source: str | os.PathLike[str], target: str | os.PathLike[str] | None) -> str:
    """Builds the dataset `target`/gsm8k/VERSION from the files in `source`; returns a summary line.

    `target` defaults to the data directory of tensorflow-datasets. An existing dataset is not
    changed. Raises MissingFile or UserError if files or rows are missing or damaged, if an existing
    dataset cannot be read, or if the dataset cannot be written.
    """
    source = pathlib.Path(source).expanduser()
    data_dir = str(pathlib.Path(target).expanduser().absolute()) if target else None
    files = _source_files(source)  # before the import, which takes seconds
    builder = _builder(data_dir)
    final = pathlib.Path(os.fspath(builder.data_path))
    if final.exists():
        return _left_alone(final)
    builder.rows = {split: list(_rows(file)) for split, file in files.items()}
    try:
        # Hides the library's message about a download, which does not take place. The library
        # writes into a folder that it then renames.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            builder.download_and_prepare(download_dir=folder)
    except Exception as error:  # the writer is C++, whose errors have no common base
        if final.exists():  # another host with the same directory was faster
            return _left_alone(final)
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise UserError(
            f"{final} cannot be written ({reason}); free some space, make it writable, or give "
            "another directory with --to"
        ) from error
    counts = {split: len(rows) for split, rows in builder.rows.items()}
    note = (
        "" if counts == PUBLISHED_ROWS else f"; the published files have {_counted(PUBLISHED_ROWS)}"
    )
    return f"wrote {final}: {_counted(counts)}{note}"


def _source_files(source: pathlib.Path) -> dict[str, pathlib.Path]:
    if not source.is_dir():
        raise MissingFile(f"there is no directory {source}; {_AS_PUBLISHED}")
    files = {split: source / f"{split}.jsonl" for split in PUBLISHED_SPLITS}
    for file in files.values():
        if not file.exists():
            raise MissingFile(f"{source} does not contain {file.name}; {_AS_PUBLISHED}")
    return files


def _rows(file: pathlib.Path) -> Iterator[dict[str, str]]:
    """Yields the rows of a published file, in the dataset's schema.

    Raises UserError if a row is damaged or if there are none.
    """
    empty = True
    for place, row in read_jsonl(file):
        empty = False
        fault = row if isinstance(row, str) else row_fault(row)
        if fault:
            raise UserError(
                f"{place} cannot be used ({fault}); download the published file again, which has a "
                "question and an answer in every line"
            )
        annotation, _, short_answer = row["answer"].rpartition("####")
        yield {
            "question": row["question"],
            "answer": row["answer"],
            "annotation": annotation,
            "short_answer": short_answer.removeprefix(" "),
        }
    if empty:
        raise UserError(f"{file} contains no rows, but at least one is needed; download it again")


def _builder(data_dir: str | None) -> Any:
    """Returns a GSM8K builder of tensorflow-datasets that reads its `rows` and downloads nothing.

    Raises UserError if `data_dir` contains a gsm8k dataset that the library cannot read.
    """
    # The class, not tfds.builder("gsm8k"): looking the name up needs TensorFlow.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.text.gsm8k import gsm8k

    tfds.disable_progress_bar()

    class Builder(gsm8k.Gsm8k, skip_registration=True):
        name = "gsm8k"
        rows: dict[str, list[dict[str, str]]]

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
            return {split: enumerate(rows) for split, rows in self.rows.items()}

    try:
        return Builder(data_dir=data_dir, file_format="array_record")
    except Exception as error:  # a dataset exists in a format or a state that the library rejects
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the gsm8k dataset in {data_dir or 'the data directory of tensorflow-datasets'} "
            f"cannot be read ({reason}); remove it, or give another directory with --to"
        ) from error


def _left_alone(final: pathlib.Path) -> str:
    try:
        task = Gsm8k(path=final)
        counts = {"train": task.size("train") + task.size("val"), "test": task.size("test")}
    except UserError as error:
        raise UserError(
            f"{final} exists, but is not a dataset that can be read ({without_remedy(error)}); "
            "remove it, or give another directory with --to"
        ) from error
    return f"{final} exists already and was not changed: {_counted(counts)}"


def _counted(counts: dict[str, int]) -> str:
    return f"{counts['train']:,} train and {counts['test']:,} test rows"


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jexit.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=["gsm8k"])
    parser.add_argument(
        "--from", dest="source", required=True, help="directory of the published files"
    )
    parser.add_argument("--to", dest="target", help="data directory of tensorflow-datasets")
    options = parser.parse_args(argv)
    print(prepare_gsm8k(options.source, options.target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
