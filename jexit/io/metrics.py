"""Reads and writes the files that grow during a run: metrics and sample completions.

`metrics.jsonl` and `samples.jsonl` contain one JSON object per line, with `step` as the first key.
Each line is written immediately and as a whole. If the process is killed, at most the last line is
incomplete; readers skip an incomplete line, and the next writer removes it. JSON has no NaN or
infinity: a number that is not finite is written as `null`, and `read_metrics` returns `null` as
NaN.

`step` is the number of finished steps. When a run resumes from the checkpoint of step n, the writer
therefore removes every line with a step above n. The resumed run writes these lines again, as an
uninterrupted run would have written them.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jexit.errors import UserError, missing_package
from jexit.io.files import disk_errors, json_line, write_bytes_atomic
from jexit.presets import LARGEST_COUNT
from jexit.untrusted import read_json_lines

if TYPE_CHECKING:
    from jexit.io.tensorboard import EventFile

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_DIR = "tensorboard"
WANDB_ID = "wandb_id.txt"  # of the W&B run, which a resumed run continues

# Anything that float() accepts (Python, NumPy and JAX scalars), or a sequence of them.
MetricValue = Any


class _LineWriter(contextlib.AbstractContextManager):
    """The base class of the writers that append lines to the JSON Lines files of a run.

    Lines of steps above `resume_step`, the number of finished steps, are removed from the file. The
    methods write only if `enabled`, which is False for every process but the first. Raises
    UserError if the file cannot be written.
    """

    file_name: ClassVar[str]

    def __init__(
        self, workdir: str | os.PathLike[str], resume_step: int = 0, *, enabled: bool = True
    ) -> None:
        self._workdir = Path(workdir)
        self._path = self._workdir / self.file_name
        self._file = None
        if enabled:
            before = _read_records(self._path)
            kept = [json_line(record) for record in before if record["step"] <= resume_step]
            write_bytes_atomic(self._path, b"".join(kept))
            with disk_errors(self._path):
                self._file = self._path.open("ab", buffering=0)

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        data = b"".join(map(json_line, records))
        with disk_errors(self._path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
            except OSError:
                # Removes the incomplete line: a file can shrink even on a full disk.
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                raise

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsWriter(_LineWriter):
    """Appends metrics to `metrics.jsonl` and, if requested, to TensorBoard and Weights & Biases.

    `wandb` is the name of a W&B project, or None to disable W&B. Raises UserError if a file cannot
    be written, or if W&B is enabled but the package is missing.
    """

    file_name = METRICS_FILE

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int = 0,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        enabled: bool = True,
    ) -> None:
        self._tensorboard: EventFile | None = None
        self._wandb: Any = None
        if enabled and wandb:  # first: a missing package must stop the run before it writes
            self._wandb = _start_wandb(Path(workdir), wandb)
        super().__init__(workdir, resume_step, enabled=enabled)
        if enabled and tensorboard:
            # Imported here, because tensorboardX loads PyTorch if it is installed, and readers need
            # neither of the two.
            from jexit.io.tensorboard import EventFile

            with disk_errors(self._workdir / TENSORBOARD_DIR):
                self._tensorboard = EventFile(self._workdir / TENSORBOARD_DIR, resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Appends one line with the metrics of `step`.

        A sequence of numbers (such as a histogram) becomes a JSON list, and one scalar per entry in
        TensorBoard and W&B. Raises UserError if a value is neither a number nor a flat sequence of
        numbers, or if a file cannot be written.
        """
        if self._file is None:
            return
        step = int(step)
        values = {name: _to_floats(name, value) for name, value in metrics.items()}
        self._append([{"step": step, **values}])
        flat = dict(_flatten(values))
        if self._tensorboard is not None:
            with disk_errors(self._workdir / TENSORBOARD_DIR):
                self._tensorboard.write(step, flat)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        super().close()
        if self._tensorboard is not None:
            # Every event has been flushed: an error here can only repeat an earlier one.
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._tensorboard = self._wandb = None


class SamplesWriter(_LineWriter):
    """Appends sample completions of a run to `samples.jsonl`.

    A record describes one completion: `prompt`, `completion`, `tokens`, `depths` (the number of
    layers run for each token), `reward`, and any other keys that the caller adds.
    """

    file_name = SAMPLES_FILE

    def write(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends `records` in one write, one line each, with `step` as the first key."""
        if self._file is not None:
            self._append({"step": int(step), **record} for record in records)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of `metrics.jsonl` in order, with NaN for null; [] if no file exists."""
    return [
        {name: _null_to_nan(value) for name, value in record.items()}
        for record in _read_records(Path(workdir) / METRICS_FILE)
    ]


def read_samples(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of `samples.jsonl` in order; [] if the file does not exist."""
    return list(_read_records(Path(workdir) / SAMPLES_FILE))


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of the JSON Lines file `path`, or nothing if it does not exist.

    Skips lines without a valid `step`, which is an integer of at least 0.
    """
    for record in read_json_lines(path, "remove it, or repeat the run that wrote it"):
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is int and 0 <= step <= LARGEST_COUNT:
            yield record


def import_wandb() -> Any:
    """Returns the module `wandb`; raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"W&B logging is on, but {missing_package('wandb', 'wandb')}, or set "
            "config.log.wandb_project=''"
        ) from error
    return wandb


def _start_wandb(workdir: Path, project: str) -> Any:
    wandb = import_wandb()
    path = workdir / WANDB_ID
    with disk_errors(path):
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_bytes_atomic(path, secrets.token_hex(8).encode())
        run_id = path.read_text()
    return wandb.init(project=project, dir=str(workdir), id=run_id, resume="allow")


def _to_floats(name: str, value: MetricValue) -> float | list[float]:
    if hasattr(value, "tolist"):  # NumPy and JAX arrays, whatever their size
        value = value.tolist()
    try:
        if isinstance(value, (list, tuple)):
            return [float(entry) for entry in value]
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"metric {name!r} is {value!r}, but it must be a number or a flat sequence of numbers; "
            "convert it before it is written"
        ) from error


def _flatten(values: Mapping[str, float | list[float]]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{index}", entry) for index, entry in enumerate(value))
        else:
            yield name, value


def _null_to_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_to_nan(entry) for entry in value]
    return math.nan if value is None else value
