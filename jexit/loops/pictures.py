"""What a run draws of itself when it ends."""

from __future__ import annotations

import pathlib
import sys
import traceback

from jexit.report.html import write_report
from jexit.report.plots import plot_training


def draw(workdir: pathlib.Path) -> str:
    """Writes `plots/*.svg` and `report.html` and says in a few words what it wrote.

    Whatever stops a drawing is told on stderr and stops nothing else: the run's results are on the
    disk by now, and `python -m jexit.report` draws them at any time.
    """
    written = []
    try:
        plots = plot_training(workdir)
        if plots:
            written.append(f"{len(plots)} plots in {workdir / 'plots'}")
    except Exception as error:
        _tell(workdir, "the plots were", error)
    try:
        written.append(str(write_report([workdir])))
    except Exception as error:
        _tell(workdir, "the report was", error)
    return " and ".join(written) or "no picture"


def _tell(workdir: pathlib.Path, what: str, error: Exception) -> None:
    if not isinstance(error, ValueError):  # a fault, whose place matters
        traceback.print_exception(error)
    why = " ".join(str(error).split())
    print(
        f"jexit: {what} not drawn ({why}); the run's results in {workdir} are complete, and "
        f"`python -m jexit.report {workdir}` tries again",
        file=sys.stderr,
    )
