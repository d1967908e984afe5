"""Reads and validates the files of a run for the report."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jexit.config import config_dict
from jexit.errors import UserError
from jexit.io.metrics import METRICS_FILE, SAMPLES_FILE, read_metrics, read_samples
from jexit.io.provenance import Start, read_starts
from jexit.results import (
    LARGEST,
    REMEDY,
    Completion,
    Evaluation,
    PolicyResult,
    Record,
    checked,
)
from jexit.untrusted import read_bytes, read_json

Kind = TypeVar("Kind")


class CommandName(Record):
    """The fields of `config.json` that the report interprets; other fields are only displayed."""

    command: str = ""
    preset: str = ""


class Curves:
    """The logged steps and values of each metric of a training run, keyed by the metric's name.

    Entry i of a metric that is a list has the name NAME/i, with two digits. A metric is left out
    unless it has a finite value whose absolute value is at most `LARGEST`.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        points: dict[str, list[tuple[int, float]]] = {}
        for record in sorted(records, key=lambda record: record["step"]):  # files may be edited
            for name, value in record.items():
                entries = enumerate(value) if isinstance(value, list) else [(None, value)]
                for index, entry in entries:
                    key = name if index is None else f"{name}/{index:02}"
                    if name != "step" and isinstance(entry, (int, float)):
                        points.setdefault(key, []).append((record["step"], float(entry)))
        self._points = {
            name: np.array(values)
            for name, values in points.items()
            if any(abs(value) <= LARGEST for _, value in values)
        }
        self.names = sorted(self._points)

    def __contains__(self, name: str) -> bool:
        return name in self._points

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps and values [points] of a metric, with NaN for values beyond ±`LARGEST`.

        Raises KeyError for a metric that is not in `names`.
        """
        steps, values = self._points[name].T
        return steps, np.where(np.abs(values) <= LARGEST, values, np.nan)

    def last(self, name: str) -> float | None:
        """Returns the last finite value of a metric, or None if the run lacks the metric."""
        if name not in self:
            return None
        values = self[name][1]
        return float(values[np.isfinite(values)][-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """The contents of one run's directory, as the report needs them.

    `notes` contains sentences about parts of files that were left out. `place` is the run's number
    on the page, which determines its colour.
    """

    workdir: Path
    label: str
    place: int
    config: dict[str, Any]
    curves: Curves
    evaluation: Evaluation | None
    completions: tuple[Completion, ...]
    samples: tuple[Completion, ...]
    before: PolicyResult | None
    after: PolicyResult | None
    starts: tuple[Start, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        return str(self.config.get("command", "")) or ("eval" if self.evaluation else "")

    @property
    def last_step(self) -> int | None:
        return max((int(self.curves[name][0][-1]) for name in self.curves.names), default=None)

    @property
    def seconds(self) -> float | None:
        """The seconds of all training steps or of an evaluation's decoding, or None if unknown."""
        if self.evaluation is None:
            if "step_seconds" not in self.curves:
                return None
            return float(np.nansum(self.curves["step_seconds"][1]))
        speeds = [(f.tokens, f.tokens_per_second) for f in self.evaluation.runs]
        return sum(tokens / speed for tokens, speed in speeds if speed > 0)

    @property
    def layers(self) -> int | None:
        """The model's number of layers, or None if the run's files do not determine it."""
        if self.evaluation is not None:
            return self.evaluation.model.layers
        for result in (self.after, self.before):
            if result is not None and result.depth_mean >= result.depth_fraction > 1e-6:
                return round(result.depth_mean / result.depth_fraction)
        # The pass that makes the first token never leaves.
        return max((depth for sample in self.samples for depth in sample.depths), default=0) or None

    @property
    def exits(self) -> tuple[int, ...]:
        """The number of layers before each exit, or an empty tuple if the files do not state it."""
        if self.evaluation is not None and self.evaluation.model.exits:
            return self.evaluation.model.exits
        exits = self.config.get("exits")
        layers = exits.get("layers") if isinstance(exits, dict) else None
        return tuple(e for e in layers if isinstance(e, int)) if isinstance(layers, list) else ()


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[ReportedRun]:
    """Reads the runs in the directories `workdirs`, and gives each run a label.

    The label is the shortest unique suffix of the directory's path. Raises UserError if a directory
    is given twice, and the errors of `read_run`.
    """
    paths = [Path(workdir) for workdir in workdirs]
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise UserError(f"{paths[index]} is given twice; give each run once")
    parts = 1
    longest = max((len(path.parts) for path in resolved), default=1)
    while parts < longest and len({path.parts[-parts:] for path in resolved}) < len(resolved):
        parts += 1
    return [
        read_run(path, "/".join(full.parts[-parts:]), place)
        for place, (path, full) in enumerate(zip(paths, resolved, strict=True))
    ]


def read_run(workdir: str | os.PathLike[str], label: str = "", place: int = 0) -> ReportedRun:
    """Reads everything that a run has written to its directory so far.

    Raises UserError if there is nothing to report, or if a file is invalid.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a directory; give the --workdir of a run")
    evaluation = _read(Evaluation, workdir / "eval.json")
    metrics = workdir / METRICS_FILE
    if evaluation is None and not metrics.exists():
        raise UserError(
            f"{workdir} contains neither {METRICS_FILE} nor eval.json; give the --workdir of a "
            "training or evaluation run"
        )
    records, notes = _read_lines(metrics, read_metrics)
    if evaluation is None and not records:
        raise UserError(
            f"{metrics} does not contain a complete line yet; wait for the run's first step"
        )
    samples, more = _read_lines(workdir / SAMPLES_FILE, read_samples)
    if evaluation is not None and not evaluation.complete:
        more.append(
            f"The evaluation in {workdir} ended before all of its measures were done; run its "
            "command again to repeat it."
        )
    config = _read(dict[str, Any], workdir / "config.json") or {}
    checked(CommandName, config, str(workdir / "config.json"))
    return ReportedRun(
        workdir=workdir,
        label=label or workdir.resolve().name,
        place=place,
        config=config,
        curves=Curves(records),
        evaluation=evaluation,
        completions=_read(tuple[Completion, ...], workdir / "completions.json") or (),
        samples=checked(tuple[Completion, ...], samples, str(workdir / SAMPLES_FILE)),
        before=_read(PolicyResult, workdir / "before.json"),
        after=_read(PolicyResult, workdir / "after.json"),
        starts=read_starts(workdir),
        notes=(*notes, *more),
    )


def settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config to a dict whose keys are dotted names that begin with `prefix`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= settings(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def default_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the default settings of the command and preset in `config`, or None if unknown.

    The keys are dotted names (see `settings`).
    """
    try:
        defaults = config_dict(config.get("command", ""), config.get("preset", ""))
    except ValueError:
        return None
    # By way of JSON, so that tuples compare equal to what config.json holds.
    return settings(json.loads(json.dumps(defaults.to_dict())))


def _read(kind: type[Kind], path: Path) -> Kind | None:
    """Returns the contents of a JSON file, validated as type `kind`, or None without a file."""
    try:
        value = read_json(path, REMEDY)
    except FileNotFoundError:
        return None
    return checked(kind, value, str(path))


def _read_lines(path: Path, read: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records of a JSON Lines file, and messages about lines that were left out.

    `read` parses the file in a directory (`read_metrics` or `read_samples`). Without a file, there
    are no records and no messages.
    """
    try:
        lines = read_bytes(path, REMEDY).splitlines(keepends=True)
    except FileNotFoundError:
        return [], []
    records = read(path.parent)
    broken = len(lines) - len(records)
    if not broken:
        return records, []
    if broken == 1 and not lines[-1].endswith(b"\n"):
        return records, [f"The last line of {path} is incomplete and is left out."]
    said = f"{broken} of the {len(lines)} lines of {path} are not records of a step"
    return records, [f"{said} and are left out."]
