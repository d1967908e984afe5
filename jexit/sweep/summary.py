"""Writes the results of a sweep's runs as a CSV file, and formats their means over seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from statistics import fmean

from jexit.io.files import write_bytes_atomic

SEED = "seed"

Row = tuple[Mapping[str, str], Mapping[str, float]]  # a run's settings and numbers


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the summary: the column of `table.csv` that it shows, and the number format."""

    source: str
    share: bool = True  # shown in per cent
    upper: str | None = None  # of an interval, whose lower end is `source`

    def text(self, values: Sequence[float], upper: Sequence[float] = ()) -> str:
        """Returns a cell: the mean of `values` over seeds and, if they differ, their range.

        For an interval, `values` contains the lower ends and `upper` the upper ends, and the cell
        shows the smallest and the largest end. If some seeds lack the number, the cell states how
        many have it.
        """
        ends = zip(values, upper or values, strict=True)
        whole = [pair for pair in ends if all(map(math.isfinite, pair))]
        if not whole:
            return "–"
        known = [end for pair in whole for end in pair]
        scale, digits = (100.0, 1) if self.share else (1.0, 2)
        mean, low, high = (
            f"{scale * v:.{digits}f}" for v in (fmean(known), min(known), max(known))
        )
        if upper:
            text = f"{low} to {high}"
        else:
            text = mean if low == high else f"{mean} ({low} to {high})"
        return text if len(whole) == len(values) else f"{text}, of {len(whole)}"


COLUMNS: Mapping[str, Column] = {
    "accuracy before": Column("before/accuracy"),
    "depth before": Column("before/depth_fraction"),
    "layers per problem before": Column("before/layers_per_problem", share=False),
    "accuracy after": Column("after/accuracy"),
    "depth after": Column("after/depth_fraction"),
    "layers per problem after": Column("after/layers_per_problem", share=False),
    "accuracy": Column("sample/accuracy"),
    "depth": Column("sample/depth_fraction"),
    "layers per problem": Column("sample/layers_per_problem", share=False),
    "accuracy at full depth": Column("full/accuracy"),
    "over one exit": Column("sample less fixed:matched/accuracy_difference"),
    "over shuffled": Column("sample less shuffled/accuracy_difference"),
}


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


def summary(rows: Sequence[Row]) -> str:
    """Returns a table of the results of a sweep, with means over seeds.

    Runs whose settings differ only in the seed share a line. The columns are the settings and the
    entries of `COLUMNS` that any run has.
    """
    settings = [key for key in rows[0][0] if key != SEED]
    groups: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for given, numbers in rows:
        groups.setdefault(tuple(given[key] for key in settings), []).append(numbers)
    labels = [
        label for label, column in COLUMNS.items() if any(column.source in of for _, of in rows)
    ]
    cells = [[*settings, "seeds", *labels]]
    for group, runs in groups.items():
        sources = (COLUMNS[label] for label in labels)
        texts = (c.text([run.get(c.source, math.nan) for run in runs]) for c in sources)
        cells.append([*group, str(len(runs)), *texts])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
