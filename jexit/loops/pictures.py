"""Draws the plots and the report of a run when it ends."""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Callable

from jexit.errors import UserError
from jexit.report.page import write_report
from jexit.report.runs import read_run
from jexit.report.training_curves import write_charts


def draw(workdir: pathlib.Path) -> str:
    """Writes `plots/*.svg` and `report.html`; returns a short description of the written files.

    An error is reported on stderr and does not end the run, because its results are already on
    disk. `python -m jexit.report` can draw them at any time.
    """

    def plots() -> str:
        written = write_charts(read_run(workdir))
        return f"{len(written)} plots in {workdir / 'plots'}" if written else ""

    done = [
        _drawn(workdir, "the plots were", plots),
        _drawn(workdir, "the report was", lambda: str(write_report([workdir]))),
    ]
    return " and ".join(filter(None, done)) or "no picture"


def _drawn(workdir: pathlib.Path, what: str, write: Callable[[], str]) -> str:
    """Returns the description from `write`; on an error, reports it and returns an empty string."""
    try:
        return write()
    except Exception as error:
        if not isinstance(error, UserError):  # a bug: show where it is
            traceback.print_exception(error)
        why = " ".join(str(error).split())
    print(
        f"jexit: {what} not drawn ({why}), but the run's results in {workdir} are complete; to try "
        f"again, run `python -m jexit.report {workdir}`",
        file=sys.stderr,
    )
    return ""
