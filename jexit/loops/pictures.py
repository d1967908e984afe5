"""Draws the plots and the HTML report of a run when the run ends."""

from __future__ import annotations

import functools
import pathlib
import sys
import traceback

from jexit.errors import UserError, without_remedy
from jexit.report.page import write_report
from jexit.report.runs import read_runs
from jexit.report.training_curves import write_charts


def draw(workdir: pathlib.Path) -> str:
    """Writes `plots/*.svg` and `report.html` to `workdir`; returns a description of these files.

    An error is reported on stderr and does not end the run, whose results are already on disk.
    """
    runs = functools.cache(lambda: read_runs([workdir]))

    def plots() -> str:
        (run,) = runs()
        written = write_charts(run)
        return f"{len(written)} plots in {workdir / 'plots'}" if written else ""

    def report() -> str:
        return str(write_report(runs()))

    done = []
    for what, write in (("the plots were", plots), ("the report was", report)):
        try:
            done.append(write())
        except Exception as error:
            if not isinstance(error, UserError):  # a bug: show where it is
                traceback.print_exception(error)
            why = " ".join(without_remedy(error).split())
            print(
                f"jexit: {what} not drawn ({why}), but the run's results in {workdir} are "
                f"complete; to try again, run `python -m jexit.report {workdir}`",
                file=sys.stderr,
            )
    return " and ".join(filter(None, done)) or "no picture"
