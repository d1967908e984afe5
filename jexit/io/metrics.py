"""What a run writes down step by step: metrics and sample completions.

`metrics.jsonl` and `samples.jsonl` hold one JSON object a line, `step` first. Lines are appended
whole and flushed one by one, so a process killed at any moment leaves at most one torn last line,
which the next writer removes and the readers skip. JSON has no NaN or infinity: any number that is
not finite is written as `null` and read back from `metrics.jsonl` as NaN.

A step number counts finished steps. A run that resumes from the checkpoint of step n therefore
drops every line with a step above n: what it writes next is what an uninterrupted run would hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexit.errors import UserError
from jexit.io.files import disk_errors, to_jsonable, write_bytes_atomic
from jexit.presets import LARGEST_COUNT
from jexit.untrusted import parse_json, read_bytes

if TYPE_CHECKING:
    from jexit.io.tensorboard import EventFile

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TENSORBOARD_DIR = "tensorboard"

# Anything float() takes: Python, NumPy and JAX scalars; or a sequence of them.
MetricValue = Any


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends scalars to `metrics.jsonl`, and to TensorBoard and Weights & Biases where asked.

    Args:
      workdir: The run's directory; made when missing.
      resume_step: Steps that the run had finished when its checkpoint was saved. Lines after it are
        dropped. None starts a new file: a run without a checkpoint starts from nothing.
      tensorboard: Whether to write event files to `workdir/tensorboard` as well.
      wandb: A W&B project, or arguments of `wandb.init`; None for no W&B.
      enabled: False makes every method do nothing, for all processes but the first.

    Raises:
      ValueError: When the disk refuses a write, or W&B is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: str | Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self._lines: _LineFile | None = None
        self._tensorboard: EventFile | None = None
        self._wandb: Any = None
        if not enabled:
            return
        workdir = Path(workdir)
        if wandb is not None:  # first: a missing package must stop the run before it writes
            self._wandb = _start_wandb(workdir, wandb)
        self._lines = _LineFile(workdir / METRICS_FILE, resume_step)
        if tensorboard:
            # Imported here: tensorboardX loads PyTorch where there is one; readers need neither.
            from jexit.io.tensorboard import EventFile

            first_step = 0 if resume_step is None else resume_step + 1
            with disk_errors(workdir / TENSORBOARD_DIR):
                self._tensorboard = EventFile(workdir / TENSORBOARD_DIR, first_step)

    def write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Appends one line; a value that is a sequence (a histogram) becomes a JSON list."""
        if self._lines is None:
            return
        step = int(step)
        values = {name: _to_floats(name, value) for name, value in metrics.items()}
        self._lines.append([{"step": step, **values}])
        flat = dict(_flatten(values))
        if self._tensorboard is not None:
            with disk_errors(self._lines.path.parent / TENSORBOARD_DIR):
                self._tensorboard.write(step, flat)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        """Closes every file; harmless when called twice."""
        if self._lines is not None:
            self._lines.close()
        if self._tensorboard is not None:
            # Every event has been flushed: an error here can only repeat an earlier one.
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._lines = self._tensorboard = self._wandb = None

    def __exit__(self, *_: object) -> None:
        self.close()


class SamplesWriter(contextlib.AbstractContextManager):
    """Appends sample completions to `samples.jsonl`; see MetricsWriter for the arguments.

    A record holds what a reader wants to see of one completion: `prompt`, `completion`, `tokens`,
    `depths` (layers run for each token), `reward`, and whatever else the caller gives.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None = None,
        enabled: bool = True,
    ) -> None:
        path = Path(workdir) / SAMPLES_FILE
        self._lines = _LineFile(path, resume_step) if enabled else None

    def write(self, step: int, records: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Appends one record, or several in one go, each with `step` put first."""
        if self._lines is None:
            return
        if isinstance(records, Mapping):
            records = [records]
        self._lines.append([{"step": int(step), **record} for record in records])

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in order, with `null` as NaN; empty when there is no file."""
    return [
        {name: _null_to_nan(value) for name, value in record.items()}
        for record in _read_lines(Path(workdir) / METRICS_FILE)
    ]


def read_samples(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of `samples.jsonl` in order; empty when there is no file."""
    return list(_read_lines(Path(workdir) / SAMPLES_FILE))


class _LineFile:
    """A JSON-lines file that only ever grows by whole lines."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            before = _contents(path)
        kept = b"" if resume_step is None else _lines_up_to(before, resume_step)
        if kept != before:
            write_bytes_atomic(path, kept)
        with disk_errors(path):
            self._file = path.open("ab", buffering=0)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [
            json.dumps(to_jsonable(record), ensure_ascii=False, allow_nan=False)
            for record in records
        ]
        data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
        with disk_errors(self.path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
            except OSError:
                # Nothing half-written: a full disk still lets a file shrink.
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                raise

    def close(self) -> None:
        self._file.close()


def _lines_up_to(data: bytes, step: int) -> bytes:
    """The whole lines of `data` that parse and whose step is at most `step`."""
    kept = []
    for line in data.splitlines(keepends=True):
        record = _parse(line)
        if record is not None and record["step"] <= step:
            kept.append(line)
    return b"".join(kept)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in _contents(path).splitlines(keepends=True):
        record = _parse(line)
        if record is not None:
            yield record


def _contents(path: Path) -> bytes:
    """Empty when there is no file; ValueError for what is none."""
    try:
        return read_bytes(path, "remove it, or run what writes it again")
    except FileNotFoundError:
        return b""


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where a crash or a disk fault left no whole one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step <= LARGEST_COUNT else None


def _start_wandb(workdir: Path, arguments: str | Mapping[str, Any]) -> Any:
    if isinstance(arguments, str):
        arguments = {"project": arguments}
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "W&B logging is on but the wandb package is not installed; "
            "pip install wandb, or leave config.log.wandb_project empty"
        ) from error
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    return wandb.init(**{"dir": str(workdir), "resume": "allow", **arguments})


def _to_floats(name: str, value: MetricValue) -> float | list[float]:
    if hasattr(value, "tolist"):  # NumPy and JAX arrays, whatever their size
        value = value.tolist()
    try:
        if isinstance(value, (list, tuple)):
            return [float(entry) for entry in value]
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"metric {name!r} is {value!r}; metrics are numbers or flat sequences of numbers"
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
