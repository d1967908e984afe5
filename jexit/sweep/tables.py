"""What a sweep's finished runs came to: table.csv, curves.csv and completions.json."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from jexit.io.files import write_bytes_atomic
from jexit.io.metrics import read_metrics
from jexit.results import LARGEST, is_number
from jexit.sweep.plan import MACHINE, Cell, Sweep

POINTS = 20  # lines of a run in curves.csv


def write_table(sweep: Sweep, cells: Sequence[Cell]) -> pathlib.Path:
    """Writes DIR/table.csv: a line a finished run, a column a setting or a figure."""
    lines = [(cell, cell.figures()) for cell in cells]
    return _write_csv(sweep, "table.csv", lines)


def _write_csv(
    sweep: Sweep, name: str, lines: Sequence[tuple[Cell, Mapping[str, float]]]
) -> pathlib.Path:
    columns = list(dict.fromkeys(column for _, found in lines for column in found))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*sweep.grid, *columns])
    for cell, found in lines:
        numbers = (f"{found[column]:.6g}" if column in found else "" for column in columns)
        writer.writerow([*cell.settings.values(), *numbers])
    path = sweep.into / name
    write_bytes_atomic(path, text.getvalue().encode())
    return path


def curves(cell: Cell) -> Iterator[dict[str, float]]:
    """A finished run's training metrics, means over stretches of steps; `step` is the last one."""
    records = read_metrics(cell.workdir)
    count = min(POINTS, len(records))
    for number in range(count):
        stretch = records[number * len(records) // count : (number + 1) * len(records) // count]
        means: dict[str, float] = {"step": stretch[-1]["step"]}
        for name in dict.fromkeys(name for record in stretch for name in record):
            if name != "step" and not MACHINE.search(name):
                values = [record[name] for record in stretch if is_number(record.get(name))]
                values = [value for value in values if abs(value) <= LARGEST]
                if values:
                    means[name] = sum(values) / len(values)
        yield means


def write_curves(sweep: Sweep, cells: Sequence[Cell]) -> pathlib.Path:
    """Writes DIR/curves.csv: a line a stretch of a run, a column a setting or a metric."""
    lines = [(cell, means) for cell in cells for means in curves(cell)]
    return _write_csv(sweep, "curves.csv", lines)


def write_completions(sweep: Sweep, cells: Sequence[Cell]) -> pathlib.Path:
    """Writes DIR/completions.json: a list of completions, each with its run's settings."""
    shown = [entry for cell in cells for entry in cell.completions()]
    path = sweep.into / "completions.json"
    write_bytes_atomic(path, (json.dumps(shown, indent=1) + "\n").encode())
    return path
