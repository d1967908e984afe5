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

The same command again goes on where it was stopped: finished runs are left alone, the one under way
continues from its newest checkpoint. What each was asked for is kept in a .json file beside it, and
a command that asks for something else there is refused. A run that fails does not stop the others;
the exit code is then 1. --jobs runs several at once, each on its share of the CPU's cores;
accelerators run one.

Ends by printing how accuracy and depth came out, in per cent, means over seeds. DIR/table.csv has a
line for each finished run: its settings, then the figures of before.json, after.json and eval.json.
DIR/curves.csv has its training metrics, each line the means of a twentieth of its steps. What says
how fast the machine was is in neither: the same runs give the same files. DIR/completions.json has
up to two of each run's completions under sampled exits (eval.heat_maps keeps them), every token
with its depth. --table_only writes the three from what there is.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jexit.io.figures import figures, is_number, read_json
from jexit.io.files import write_bytes_atomic
from jexit.io.metrics import read_metrics
from jexit.main import INTERRUPTED
from jexit.report.study import Study

FINISHED = "after.json"  # the last file of a training run that is measured
EVALUATED = "eval.json"  # that of an evaluation
POINTS = 20  # lines of a run in curves.csv
SHOWN = 2  # completions of a run in completions.json

_GRID = re.compile(r"(?P<key>[a-z_0-9]+(?:\.[a-z_0-9]+)*)=(?P<values>.*)", re.DOTALL)
_SETTING = re.compile(r"--(?P<of>config|eval)\.(?P<key>[a-z_0-9.]+)=(?P<value>.*)", re.DOTALL)
_MACHINE = re.compile(r"seconds|per_second|memory/|compilations|mfu")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+()-]+")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination: its settings by key, and its directory."""

    settings: Mapping[str, str]
    workdir: pathlib.Path

    @property
    def name(self) -> str:
        return self.workdir.name

    @property
    def log(self) -> pathlib.Path:
        return self.workdir.parent / f"{self.name}.log"

    @property
    def asked(self) -> pathlib.Path:
        """The file with the arguments of the runs that have begun."""
        return self.workdir.parent / f"{self.name}.json"

    @property
    def finished(self) -> bool:
        return (self.workdir / FINISHED).exists() or _whole(self.workdir / EVALUATED)

    @property
    def evaluated(self) -> bool:
        return _whole(self.workdir / "eval" / EVALUATED)

    @property
    def evaluation(self) -> pathlib.Path | None:
        """That after the finished run, or that it is."""
        paths = (self.workdir / "eval" / EVALUATED, self.workdir / EVALUATED)
        return next(filter(_whole, paths), None)

    def figures(self) -> dict[str, float]:
        """Those of the finished run and its evaluation, but for how fast the machine was."""
        found = figures(self.workdir, self.evaluation)
        return {key: value for key, value in found.items() if not _MACHINE.search(key)}

    def completions(self) -> Iterator[dict[str, Any]]:
        """The first that its evaluation decoded under sampled exits and kept."""
        path = self.evaluation and self.evaluation.with_name("completions.json")
        if not path or not path.exists():
            return
        layers = read_json(self.evaluation)["model"]["layers"]
        sampled = (entry for entry in read_json(path) if entry.pop("policy", "") == "sample")
        for entry in itertools.islice(sampled, SHOWN):
            entry.pop("hazards", None)
            yield {"settings": dict(self.settings), "layers": layers, **entry}

    def begin(self, part: str, arguments: Sequence[str]) -> None:
        """Keeps what the cell's run or evaluation is asked for."""
        asked = read_json(self.asked) if self.asked.exists() else {}
        text = json.dumps({**asked, part: list(arguments)}, indent=1) + "\n"
        write_bytes_atomic(self.asked, text.encode())

    def check(self, part: str, arguments: Sequence[str]) -> None:
        """Raises ValueError if it was begun with other arguments and has left something behind."""
        before = read_json(self.asked).get(part) if self.asked.exists() else None
        differing = sorted(set(arguments if before is None else before) ^ set(arguments))
        if not differing:
            return
        raise ValueError(
            f"{self.name} was begun by another command, which differs in {differing[0]}; another "
            f"--into is needed, or delete {self.workdir} and {self.asked}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a command line asks for."""

    config: str
    into: pathlib.Path
    grid: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, str]
    evaluation: str = ""
    evaluation_settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    jobs: int = 1
    table_only: bool = False

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Sweep:
        """Raises ValueError, in one sentence, for arguments that are none or contradict others."""
        given: dict[str, str] = {}
        grid: dict[str, tuple[str, ...]] = {}
        settings: dict[str, dict[str, str]] = {"config": {}, "eval": {}}
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if found := _SETTING.fullmatch(argument):
                settings[found["of"]][found["key"]] = found["value"]
            elif name in ("--config", "--into", "--eval", "--jobs") and equals and value:
                given[name] = value
            elif argument == "--table_only":
                given[argument] = "yes"
            elif found := _GRID.fullmatch(argument):
                separator = "|" if "|" in found["values"] else ","
                grid[found["key"]] = tuple(map(str.strip, found["values"].split(separator)))
            else:
                raise ValueError(
                    f"{argument!r} is no argument of a sweep; give KEY=VALUE,VALUE, "
                    "--config.KEY=VALUE or one of --config, --into, --eval, --jobs"
                )
        if missing := [name for name in ("--config", "--into") if name not in given]:
            raise ValueError(f"{missing[0]} is missing; a sweep needs --config=FILE and --into=DIR")
        for key, values in grid.items():
            if "" in values or len(set(values)) < len(values):
                raise ValueError(
                    f"{key} has the values {', '.join(map(repr, values))}; give different ones, "
                    "none empty"
                )
            if key in settings["config"]:
                raise ValueError(f"{key} is both in the grid and in --config.{key}; give it once")
        if settings["eval"] and "--eval" not in given:
            raise ValueError("--eval.KEY is for --eval=FILE, which is missing; add it")
        jobs = given.get("--jobs", "1")
        if not jobs.isdecimal() or int(jobs) < 1:
            raise ValueError(f"--jobs is {jobs!r}; give a number of runs at once, at least 1")
        return cls(
            config=given["--config"],
            into=pathlib.Path(given["--into"]),
            grid=grid,
            fixed=settings["config"],
            evaluation=given.get("--eval", ""),
            evaluation_settings=settings["eval"],
            jobs=int(jobs),
            table_only="--table_only" in given,
        )

    def cells(self) -> list[Cell]:
        """Every combination; the last key changes fastest."""
        cells = []
        for values in itertools.product(*self.grid.values()):
            settings = dict(zip(self.grid, values, strict=True))
            name = ",".join(f"{key}={value}" for key, value in settings.items()) or "run"
            cells.append(Cell(settings, self.into / _UNSAFE.sub("_", name)))
        if len({cell.workdir for cell in cells}) < len(cells):
            raise ValueError(
                "two combinations of values would share a directory; give values that differ in "
                "letters or digits"
            )
        return cells

    def training(self, cell: Cell) -> list[str]:
        """The arguments of `jexit.main` that make a combination's run."""
        return _arguments(self.config, cell.workdir, {**self.fixed, **cell.settings})

    def evaluating(self, cell: Cell) -> list[str]:
        """Those that evaluate the run, which has begun, on its own task."""
        config = read_json(cell.workdir / "config.json")
        own = {f"task.{key}": value for key, value in config["task"].items()}
        given = {"model.path": str(cell.workdir), **self.evaluation_settings}
        settings = {key: _flag(value) for key, value in own.items()} | given
        return _arguments(self.evaluation, cell.workdir / "eval", settings)

    def commands(self, cell: Cell) -> Iterator[list[str]]:
        """The arguments of `jexit.main` that are left to run for a combination."""
        if not cell.finished:
            cell.begin("run", self.training(cell))
            yield self.training(cell)
        if self.evaluation and not cell.evaluated:
            cell.begin("eval", self.evaluating(cell))
            yield self.evaluating(cell)

    def check(self, cell: Cell) -> None:
        """Raises ValueError if something else was begun in the combination's directories."""
        if cell.workdir.exists():
            cell.check("run", self.training(cell))
        if self.evaluation and (cell.workdir / "eval").exists():
            cell.check("eval", self.evaluating(cell))


def _whole(path: pathlib.Path) -> bool:
    """Whether there is an evaluation, and it has been measured to its end."""
    return path.exists() and read_json(path).get("complete", True)


def _flag(value: Any) -> str:
    """A setting of config.json as a flag takes it."""
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _arguments(config: str, workdir: pathlib.Path, settings: Mapping[str, str]) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={config}", f"--workdir={workdir}", *flags]


class Runner:
    """Runs combinations as processes, and hands signals on to them."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopped = ""

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Runs what is left; returns a line for each combination that did not end well."""
        idle = _shares(self.sweep.jobs)

        def one(cell: Cell) -> str | None:
            with self._lock:
                cores = idle.pop()
            try:
                return self._cell(cell, cores)
            finally:
                with self._lock:
                    idle.append(cores)

        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            with concurrent.futures.ThreadPoolExecutor(self.sweep.jobs) as pool:
                return [line for line in pool.map(one, cells) if line]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        self.stopped = signal.Signals(number).name
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _cell(self, cell: Cell, cores: Sequence[int]) -> str | None:
        for arguments in self.sweep.commands(cell):
            if self.stopped:
                return None
            code = self._process(cell, arguments, cores)
            if code:
                return None if self.stopped else f"{cell.name} ended with {code}: see {cell.log}"
        return None

    def _process(self, cell: Cell, arguments: list[str], cores: Sequence[int]) -> int:
        print(f"{cell.name}: {arguments[0]}", flush=True)
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log, "a") as log:
            # In a group of its own: a Ctrl-C reaches it once, from here.
            process = subprocess.Popen(
                [sys.executable, "-m", "jexit.main", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if cores:
                os.sched_setaffinity(process.pid, cores)
            with self._lock:
                self._running.add(process)
            if self.stopped:  # before there was a process to hand the signal on to
                process.send_signal(signal.SIGTERM)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)


def _shares(jobs: int) -> list[Sequence[int]]:
    """Disjoint cores for each of several jobs; nothing for one, or where they cannot be told."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs:
        raise ValueError(f"--jobs is {jobs} and there are {len(cores)} cores; give at most those")
    return [cores[share::jobs] for share in range(jobs)]


def write_table(sweep: Sweep, cells: Sequence[Cell]) -> pathlib.Path:
    """Writes DIR/table.csv: a line a finished run, a column a setting of the grid or a figure."""
    lines = [(cell, cell.figures()) for cell in cells if cell.finished]
    return _write_csv(sweep, "table.csv", lines)


def _write_csv(
    sweep: Sweep, name: str, lines: Sequence[tuple[Cell, Mapping[str, float]]]
) -> pathlib.Path:
    columns = list(dict.fromkeys(column for _, found in lines for column in found))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*sweep.grid, *columns])
    for cell, found in lines:
        numbers = (f"{found[column]:.6g}" if column in found else "" for column in columns)
        writer.writerow([*cell.settings.values(), *numbers])
    path = sweep.into / name
    write_bytes_atomic(path, text.getvalue().encode())
    return path


def curves(cell: Cell) -> Iterator[dict[str, float]]:
    """A finished run's training metrics, means over stretches of steps; `step` is the last one."""
    records = read_metrics(cell.workdir)
    count = min(POINTS, len(records))
    for number in range(count):
        stretch = records[number * len(records) // count : (number + 1) * len(records) // count]
        means: dict[str, float] = {"step": stretch[-1]["step"]}
        for name in dict.fromkeys(name for record in stretch for name in record):
            if name != "step" and not _MACHINE.search(name):
                values = [record[name] for record in stretch if is_number(record.get(name))]
                values = [value for value in values if math.isfinite(value)]
                if values:
                    means[name] = sum(values) / len(values)
        yield means


def write_curves(sweep: Sweep, cells: Sequence[Cell]) -> pathlib.Path:
    """Writes DIR/curves.csv: a line a stretch of a run, a column a setting or a metric."""
    lines = [(cell, means) for cell in cells if cell.finished for means in curves(cell)]
    return _write_csv(sweep, "curves.csv", lines)


def write_completions(sweep: Sweep, cells: Sequence[Cell]) -> pathlib.Path:
    """Writes DIR/completions.json: a list of completions, each with its run's settings."""
    shown = [entry for cell in cells if cell.finished for entry in cell.completions()]
    path = sweep.into / "completions.json"
    write_bytes_atomic(path, (json.dumps(shown, indent=1) + "\n").encode())
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns a user's mistake into one sentence and an exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__.strip())
        return 0
    try:
        sweep = Sweep.parse(arguments)
        cells = sweep.cells()
        runner = Runner(sweep)
        if not sweep.table_only:
            for cell in cells:
                sweep.check(cell)
        failed = [] if sweep.table_only else runner.run(cells)
        finished = [cell for cell in cells if cell.finished]
        if sweep.table_only and not finished:
            raise ValueError(
                f"none of the {len(cells)} runs in {sweep.into} has finished; run them"
            )
        if finished:
            table = write_table(sweep, cells)
            write_curves(sweep, cells)
            write_completions(sweep, cells)
            print(f"Wrote {table}: {len(finished)} of {len(cells)} runs")
            print(Study.read(table).summary())
    except (ValueError, OSError) as error:
        print(f"jexit: {error}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"jexit: {line}", file=sys.stderr)
    if runner.stopped:
        print(
            f"jexit: stopped by {runner.stopped}; the same command goes on from here",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
