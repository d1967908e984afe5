"""The report: one HTML page that needs no network, no server and no scripts to be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from jexit.errors import UserError
from jexit.io.files import write_bytes_atomic
from jexit.report import evaluation_charts, tables
from jexit.report.charts import Chart, side_by_side
from jexit.report.colours import page_colours
from jexit.report.heat_maps import heat_maps
from jexit.report.rendering import asset, render
from jexit.report.runs import Run, read_runs
from jexit.report.training_curves import OTHER, training_charts

REPORT_FILE = "report.html"


def write_report(
    workdirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report on one run, or on several side by side, and returns its path.

    Without `output` that is `report.html` in the first run's directory. The same files give the
    same bytes. Raises UserError when a directory holds nothing to report or a file that no run
    writes, or the disk refuses the page; nothing is written then.
    """
    return write_page(read_runs(workdirs), output)


def write_page(runs: Sequence[Run], output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report on runs that have been read; see `write_report`."""
    path = runs[0].workdir / REPORT_FILE if output is None else Path(output)
    if path.is_dir():
        raise UserError(f"{path} is a directory; give --output a file name, such as {REPORT_FILE}")
    write_bytes_atomic(path, page(runs).encode())
    return path


def page(runs: Sequence[Run]) -> Markup:
    """Renders the whole page; `templates/page.html` holds its sections and their text."""
    return render(
        "page.html",
        runs=runs,
        command=" ".join(["python -m jexit.report", *(str(run.workdir) for run in runs)]),
        training=training(runs),
        heat_maps=[(run, shown) for run in runs if (shown := heat_maps(run)) is not None],
        has_hazards=any(shown.hazards for run in runs for shown in run.completions),
        charts=evaluation_charts,
        tables=tables,
        drawn=drawn,
        style=page_colours() + asset("page.css") + asset("charts.css"),
        script=asset("page.js"),
    )


def drawn(*charts: Chart | None, small: bool = False) -> Markup:
    """Those of the charts that there are, side by side; nothing for none."""
    there = [chart for chart in charts if chart is not None]
    return side_by_side(there, small=small) if there else Markup()


def training(runs: Sequence[Run]) -> list[tuple[str, list[Chart], list[Chart]]]:
    """Of each command: the names of its runs, their charts, and those of all other metrics.

    What two commands log under one name, such as their loss, is not the same.
    """
    by_command: dict[str, list[Run]] = {}
    for run in runs:
        if run.curves.names:
            by_command.setdefault(run.command, []).append(run)
    groups = []
    for command, trained in by_command.items():
        charts = training_charts(trained)
        other = charts.pop(OTHER, [])
        names = ", ".join(run.label for run in trained)
        heading = f"{command}: {names}" if command else names
        groups.append((heading, [chart for made in charts.values() for chart in made], other))
    return groups
