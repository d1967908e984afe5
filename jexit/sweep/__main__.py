"""Runs a config for every combination of some settings, and collects how the runs ended.

    python -m jexit.sweep --config=FILE[:PRESET] --into=DIR KEY=VALUE,VALUE,... [KEY=...]
                          [--config.KEY=VALUE ...] [--eval=FILE[:PRESET] [--eval.KEY=VALUE ...]]
                          [--jobs=N] [--table_only]

    python -m jexit.sweep --config=configs/rl.py --into=runs/pressure \\
        --eval=configs/eval.py rl.depth_coef=0,0.4,0.8 seed=0,1

Each combination is a run in a directory of its own, DIR/rl.depth_coef=0.4,seed=1, with what it
prints in a .log file beside it. Values with commas in them are separated by `|`, as in
`exits.layers=(2,4)|(4,)`. --config.KEY holds for all runs. With --eval the model of each finished
run is evaluated, in its directory's `eval`, on the run's own task, with
the settings that --eval.KEY gives. FILE may also be an evaluation's, over models for example.

Config files and settings are checked before the first run. The same command again goes on where it
was stopped: finished runs are left alone, the one under way continues from its newest checkpoint.
What each was asked for is kept in a .json file beside it, and a command that asks for something
else there is refused; one with other values of the same keys adds to the study. A run that fails
does not stop the others, nor does one that another command is running; the exit code is then 1.
--jobs runs several at once, each on its share of the CPU's cores; accelerators run one.

Ends by printing how accuracy and depth came out, in per cent, means over seeds. DIR/table.csv has a
line for each finished run in DIR: its settings, then the numbers of before.json, after.json and
eval.json but for how fast the machine was: the same runs give the same file. --table_only writes it
from what there is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jexit.errors import INTERRUPTED, UserError
from jexit.sweep.plan import Sweep
from jexit.sweep.runner import Runner
from jexit.sweep.summary import summary
from jexit.sweep.tables import write_csv

TABLE = "table.csv"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns a user's mistake into one sentence and an exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__.strip())
        return 0
    try:
        sweep = Sweep.parse(arguments)
        cells = sweep.cells()
        runner = None if sweep.table_only else Runner(sweep)
        sweep.begun(cells)
        failed = []
        if runner:
            for cell in cells:
                sweep.check_settings(cell)
            failed = runner.run(cells)
        begun = sweep.begun(cells)  # also what another command began meanwhile
        finished = [cell for cell in begun if cell.finished]
        if sweep.table_only and not finished:
            raise UserError(
                f"none of the {len(begun)} runs in {sweep.into} has finished, so there is no table "
                "yet; run the command without --table_only"
            )
        if finished:
            rows = [(cell.settings, cell.numbers()) for cell in finished]
            write_csv(sweep.into / TABLE, rows)
            print(f"Wrote {sweep.into / TABLE}: {len(finished)} of {len(begun)} runs")
            print(summary(rows))
    except (ValueError, OSError) as error:
        print(f"jexit: {error}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"jexit: {line}", file=sys.stderr)
    if runner and runner.stopped:
        print(
            f"jexit: stopped by {runner.stopped}; the same command goes on from here",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
