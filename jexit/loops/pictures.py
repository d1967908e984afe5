"""What a run draws of itself when it ends."""

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
    """Writes `plots/*.svg` and `report.html` and says in a few words what it wrote.

    Whatever stops a drawing is told on stderr and stops nothing else: the run's results are on the
    disk by now, and `python -m jexit.report` draws them at any time.
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
    """What `write` says that it wrote; nothing where something stopped it, which is told."""
    try:
        return write()
    except Exception as error:
        if not isinstance(error, UserError):  # a fault, whose place matters
            traceback.print_exception(error)
        why = " ".join(str(error).split())
    print(
        f"jexit: {what} not drawn ({why}); the run's results in {workdir} are complete, and "
        f"`python -m jexit.report {workdir}` tries again",
        file=sys.stderr,
    )
    return ""
