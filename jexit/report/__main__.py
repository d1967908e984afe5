"""Writes the report on one run, or on several runs side by side.

    python -m jexit.report WORKDIR [WORKDIR ...] [--output=FILE]

The page is written to FILE, by default report.html in the first WORKDIR. A browser can open it from
disk, without a server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jexit.errors import command, say
from jexit.report.page import write_report
from jexit.report.runs import read_runs


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jexit.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="directory of a run")
    parser.add_argument("--output", help="file of the page; default: report.html in the first run")
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.workdirs)
    for note in (note for run in runs for note in run.notes):
        say(note)
    path = write_report(runs, arguments.output)
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
