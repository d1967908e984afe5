"""Writes the report: one HTML page that can be read without a network, a server or scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from jexit.config import CHAIN_MEASURES
from jexit.errors import UserError
from jexit.io.files import write_bytes_atomic
from jexit.report import evaluation_charts, tables
from jexit.report.charts import Chart
from jexit.report.colours import page_colours
from jexit.report.heat_maps import heat_maps
from jexit.report.rendering import asset, render
from jexit.report.runs import ReportedRun
from jexit.report.training_curves import OTHER, training_charts

REPORT_FILE = "report.html"


def write_report(runs: Sequence[ReportedRun], output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report on one run, or on several runs side by side, and returns its path.

    The default `output` is `report.html` in the directory of the first run. The same runs always
    give the same page, byte for byte. Raises UserError if the page cannot be written.
    """
    path = runs[0].workdir / REPORT_FILE if output is None else Path(output)
    if path.is_dir():
        raise UserError(
            f"{path} is a directory, but --output must be a file; give a file name, such as "
            f"{REPORT_FILE}"
        )
    write_bytes_atomic(path, page(runs).encode())
    return path


def page(runs: Sequence[ReportedRun]) -> Markup:
    """Renders the whole report with the template `templates/page.html`."""
    return render(
        "page.html",
        runs=runs,
        command=" ".join(["python -m jexit.report", *(str(run.workdir) for run in runs)]),
        training=training(runs),
        heat_maps=[(run, shown) for run in runs if (shown := heat_maps(run)) is not None],
        has_hazards=any(shown.hazards for run in runs for shown in run.completions),
        chain_measures=CHAIN_MEASURES,
        charts=evaluation_charts,
        tables=tables,
        drawn=drawn,
        style=page_colours() + asset("page.css") + asset("charts.css"),
        script=asset("page.js"),
    )


def drawn(*charts: Chart | None, small: bool = False) -> Markup:
    """Draws the charts that are not None side by side, or returns empty markup if all are None."""
    there = [chart for chart in charts if chart is not None]
    return render("charts.html", charts=there, small=small) if there else Markup()


def training(runs: Sequence[ReportedRun]) -> list[tuple[str, list[Chart], list[Chart]]]:
    """Returns, for each command, a heading, the training curves and small charts of other metrics.

    Commands have separate charts because two commands may log different quantities under the same
    name, such as `loss`.
    """
    by_command: dict[str, list[ReportedRun]] = {}
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
