"""Writes the results of a sweep's finished runs as a CSV file."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence

from jexit.io.files import write_bytes_atomic

Row = tuple[Mapping[str, str], Mapping[str, float]]  # a run's settings and numbers


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes a header and one row per run: its settings, then the numbers that any run has.

    A number that a run lacks is an empty cell. There must be at least one run, and all runs must
    have the same settings.
    """
    columns = list(dict.fromkeys(column for _, numbers in rows for column in numbers))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rows[0][0], *columns])
    for settings, numbers in rows:
        cells = (f"{numbers[column]:.6g}" if column in numbers else "" for column in columns)
        writer.writerow([*settings.values(), *cells])
    write_bytes_atomic(path, text.getvalue().encode())
