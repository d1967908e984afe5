"""Runs a config for every combination of some settings, and collects the results of the runs.

    python -m jexit.sweep --config=FILE[:PRESET] --into=DIR KEY=VALUE,VALUE,... [KEY=...]
                          [--config.KEY=VALUE ...] [--eval=FILE[:PRESET] [--eval.KEY=VALUE ...]]
                          [--jobs=N] [--table_only]

    python -m jexit.sweep --config=configs/rl.py --into=runs/pressure \\
        --eval=configs/eval.py rl.depth_coef=0,0.4,0.8 seed=0,1

Each combination is a run in its own directory, such as DIR/rl.depth_coef=0.4,seed=1. The output of
the run is written to a .log file beside this directory. Values that contain commas are separated by
`|`, as in `exits.layers=(2,4)|(4,)`. --config.KEY sets KEY for all runs; `{seed}` or another KEY of
the grid in its value stands for the run's value of that key. With --eval, the model of
each finished run is evaluated on the run's own task, with the settings of --eval.KEY, and the
results are written to `eval` in the run's directory. --config may also name the config of an
evaluation, for example to evaluate several models.

Config files and settings are checked before the first run. Running the same command again continues
where the command was stopped: finished runs are skipped, and an unfinished run continues from its
newest checkpoint. A .json file beside each run's directory records the arguments of the run. A
command with other arguments for a recorded run is refused, but a command with other values of the
same keys adds runs to the study. If a run fails, or another command is already running it, the
other runs continue and the exit code is 1. --jobs sets the number of simultaneous runs, each on its
share of the CPU's cores; on an accelerator, use --jobs=1.

A program is compiled once for all runs: JAX's compilation cache is in DIR/.compiled, which can be
deleted, or in $JAX_COMPILATION_CACHE_DIR.

At the end, the command prints accuracy and depth in per cent, as means over seeds. DIR/table.csv
has one line per finished run in DIR, with the run's settings and the numbers of its before.json,
after.json and eval.json. Measurements of speed are left out of the table, so the same runs always
give the same file. With --table_only, the command only tabulates the runs that have finished.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jexit.errors import INTERRUPTED, UserError, command, say
from jexit.sweep.plan import Sweep
from jexit.sweep.runner import Runner
from jexit.sweep.summary import summary, write_csv

TABLE = "table.csv"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__.strip())
        return 0
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
            f"none of the {len(begun)} runs in {sweep.into} has finished, so a table cannot be "
            "made; run the command without --table_only"
        )
    if finished:
        rows = [(cell.settings, cell.numbers()) for cell in finished]
        write_csv(sweep.into / TABLE, rows)
        print(f"Wrote {sweep.into / TABLE}: {len(finished)} of {len(begun)} runs")
        print(summary(rows))
    for line in failed:
        say(line)
    if runner and runner.stopped:
        say(f"stopped by {runner.stopped}; run the same command again to continue")
        return INTERRUPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
