"""Plans a sweep, which runs a config once for each combination of settings in a grid."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from jexit.config import TaskConfig
from jexit.errors import UserError
from jexit.main import parse
from jexit.results import REMEDY, Evaluation, PolicyResult, Record, numbers
from jexit.tasks import Task, check_measures, make_task
from jexit.untrusted import read_json, read_object

FINISHED = "after.json"  # the last measurement of a training run
EVALUATED = "eval.json"  # the measurements of an evaluation
MACHINE = re.compile(r"seconds|per_second|memory/|compilations|mfu")  # depend on the machine

_GRID = re.compile(r"(?P<key>[a-z_0-9]+(?:\.[a-z_0-9]+)*)=(?P<values>.*)", re.DOTALL)
_SETTING = re.compile(r"--(?P<of>config|eval)\.(?P<key>[a-z_0-9.]+)=(?P<value>.*)", re.DOTALL)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+()-]+")


class CellRecord(Record):
    """The settings and `jexit.main` arguments of one combination, as recorded in a JSON file.

    `run` and `eval` are the arguments of the run and of its evaluation, or None until they begin.
    """

    settings: dict[str, str]
    run: tuple[str, ...] | None = None
    eval: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of a sweep's settings (config key to value), and the directory of its run."""

    settings: Mapping[str, str]
    workdir: pathlib.Path

    @property
    def name(self) -> str:
        return self.workdir.name

    @property
    def log(self) -> pathlib.Path:
        return self.workdir.parent / f"{self.name}.log"

    @property
    def last_word(self) -> str:
        """The last line that the combination's processes printed, and the path of the log."""
        lines = self.log.read_text("utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        return f"{said.removeprefix('jexit: ')} (see {self.log})"

    @property
    def asked(self) -> pathlib.Path:
        return self.workdir.parent / f"{self.name}.json"

    @property
    def finished(self) -> bool:
        return (self.workdir / FINISHED).exists() or _whole(self.workdir / EVALUATED)

    @property
    def evaluated(self) -> bool:
        return _whole(self.workdir / "eval" / EVALUATED)

    @property
    def evaluation(self) -> pathlib.Path | None:
        """The path of the `eval.json` with all measures, or None if there is none.

        This is the file of the run's evaluation or, if the run itself is an evaluation, its own
        file.
        """
        paths = (self.workdir / "eval" / EVALUATED, self.workdir / EVALUATED)
        return next(filter(_whole, paths), None)

    def numbers(self) -> dict[str, float]:
        """Returns the metrics of the run and its evaluation, except those of speed and memory."""
        found: dict[str, float] = {}
        for stage in ("before", "after"):
            path = self.workdir / f"{stage}.json"
            if path.exists():
                found |= numbers(stage, PolicyResult.read(path))
        if self.evaluation:
            found |= Evaluation.read(self.evaluation).numbers()
        return {key: value for key, value in found.items() if not MACHINE.search(key)}

    def begin(self, part: str, arguments: Sequence[str]) -> None:
        """Records the arguments of `part`: `"run"`, or `"eval"` for the run's evaluation."""
        asked = _asked(self.asked) or CellRecord(settings=dict(self.settings))
        asked.model_copy(update={part: tuple(arguments)}).write(self.asked)

    def check(self, part: str, arguments: Sequence[str]) -> None:
        """Raises UserError if `part` has been recorded with arguments other than `arguments`."""
        asked = getattr(_asked(self.asked), part, None)
        if differing := sorted(set(asked or arguments) ^ set(arguments)):
            raise UserError(
                f"{self.name} was started with other arguments ({differing[0]} differs); choose "
                f"another --into or, to start it anew, delete {self.workdir} and {self.asked}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The arguments of a sweep's command line.

    `config` is the config file of the runs, `grid` maps each key that varies to its values, and
    `fixed` maps the other keys that were set to values, in which `{KEY}` stands for the value of a
    key in the grid. `into` is the directory of the runs.
    `evaluation` is the config file for evaluating each finished run, or an empty string.
    """

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
        """Parses the arguments of a sweep's command line.

        Raises UserError if an argument is unknown, repeated, missing, invalid or in conflict with
        another argument.
        """
        names = [argument.partition("=")[0] for argument in arguments]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{twice[0]} is given {names.count(twice[0])} times; give it once")
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
                raise UserError(
                    f"{argument!r} is not an argument of a sweep; give KEY=VALUE,VALUE, "
                    "--config.KEY=VALUE, --eval.KEY=VALUE, --config=FILE, --into=DIR, --eval=FILE, "
                    "--jobs=N or --table_only"
                )
        if missing := [name for name in ("--config", "--into") if name not in given]:
            raise UserError(f"{missing[0]} is missing; a sweep needs --config=FILE and --into=DIR")
        for key, values in grid.items():
            if "" in values:
                raise UserError(
                    f"{key} has the values {', '.join(map(repr, values))}, but values must not be "
                    "empty; remove the empty value"
                )
            if repeated := [value for value in values if values.count(value) > 1]:
                raise UserError(
                    f"{key} has the value {repeated[0]!r} {values.count(repeated[0])} times, but "
                    "values must differ; give it once"
                )
            if key in settings["config"]:
                raise UserError(f"{key} is both in the grid and in --config.{key}; give it once")
        if settings["eval"] and "--eval" not in given:
            raise UserError(
                "--eval.KEY=VALUE is given without --eval=FILE; add the evaluation's config file"
            )
        jobs = given.get("--jobs", "1")
        if not jobs.isdecimal() or int(jobs) < 1:
            raise UserError(
                f"--jobs is {jobs!r}, but it must be a whole number of at least 1; give the number "
                "of simultaneous runs"
            )
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
        """Returns every combination of the grid's values; the last key changes fastest.

        Raises UserError if two combinations would have the same directory.
        """
        cells = []
        for values in itertools.product(*self.grid.values()):
            settings = dict(zip(self.grid, values, strict=True))
            name = ",".join(f"{key}={value}" for key, value in settings.items()) or "run"
            cells.append(Cell(settings, self.into / _UNSAFE.sub("_", name)))
        if len({cell.workdir for cell in cells}) < len(cells):
            raise UserError(
                "two combinations of values would share a directory, because other characters than "
                "letters, digits and _.,=+()- become _ in its name; choose values that differ in "
                "these characters"
            )
        return cells

    def begun(self, cells: Sequence[Cell]) -> list[Cell]:
        """Returns `cells`, followed by the other combinations that were begun in `into`.

        Raises UserError if `into` contains a combination of other keys, or a run or evaluation that
        was started with other arguments, such as another config.
        """
        found = {cell.name for cell in cells}
        others = [cell for cell in begun_in(self.into) if cell.name not in found]
        for cell in others:
            if tuple(cell.settings) != tuple(self.grid):
                raise UserError(
                    f"{self.into} contains {cell.name} of another sweep, but this sweep varies "
                    f"{', '.join(self.grid) or 'no keys'}, in this order; choose another --into"
                )
        begun = [*cells, *others]
        for cell in begun:
            if cell.workdir.exists():
                cell.check("run", self.training(cell))
            if self.evaluation and (cell.workdir / "eval").exists():
                cell.check("eval", self.evaluating(cell))
        return begun

    def training(self, cell: Cell) -> list[str]:
        fixed = {key: _filled(value, cell.settings) for key, value in self.fixed.items()}
        return _arguments(self.config, cell.workdir, {**fixed, **cell.settings})

    def evaluating(self, cell: Cell, task: Mapping[str, Any] | None = None) -> list[str]:
        """Returns the arguments of `jexit.main` that evaluate the finished run of `cell` on `task`.

        `task` is the section `task` of a config, by default that of the run's `config.json`. Raises
        UserError if the file lacks the section.
        """
        task = _task(cell.workdir / "config.json") if task is None else task
        own = {f"task.{key}": _flag(value) for key, value in task.items() if key != "options"}
        options = task.get("options", {})
        own |= {f"task.options.{key}": _option(value) for key, value in options.items()}
        settings = {**own, "model.path": str(cell.workdir), **self.evaluation_settings}
        return _arguments(self.evaluation, cell.workdir / "eval", settings)

    def commands(self, cell: Cell) -> Iterator[list[str]]:
        """Yields the arguments of `jexit.main` for each process that `cell` still needs.

        The arguments of a process are recorded before they are yielded.
        """
        if not cell.finished:
            cell.begin("run", self.training(cell))
            yield self.training(cell)
        if self.evaluation and not cell.evaluated:
            cell.begin("eval", self.evaluating(cell))
            yield self.evaluating(cell)

    def check_settings(self, cell: Cell) -> None:
        """Raises UserError if a config file or a setting for the combination `cell` is invalid."""
        try:
            config = parse(["jexit.main", *self.training(cell)]).config
            if config.command in ("pretrain", "generate"):
                raise UserError(
                    f"{config.command} measures no model, but a sweep compares measurements; use "
                    "finetune, sft, rl or eval, or run jexit.main for each setting"
                )
            task = _made(config.task)
            if self.evaluation:
                section = config.to_dict()["task"]
                config = parse(["jexit.main", *self.evaluating(cell, section)]).config
                task = _made(config.task)
            check_measures(task, config.eval.measures)
        except ValueError as error:
            raise UserError(f"the run in {cell.workdir} cannot start: {error}") from error


def _made(task: TaskConfig) -> Task:
    return make_task(task.name, task.path or None, **task.options)


def _filled(value: str, settings: Mapping[str, str]) -> str:
    return re.sub(r"\{([\w.]+)\}", lambda found: settings.get(found[1], found[0]), value)


def begun_in(into: pathlib.Path) -> list[Cell]:
    """Returns the combinations that any sweep has begun in `into`, in the order of their values."""
    records = ((path, _asked(path)) for path in sorted(into.glob("*.json")))
    cells = [Cell(asked.settings, into / path.stem) for path, asked in records if asked]
    return sorted(cells, key=lambda cell: [*map(_rank, cell.settings.values())])


def _whole(path: pathlib.Path) -> bool:
    return path.exists() and Evaluation.read(path).complete


def _asked(path: pathlib.Path) -> CellRecord | None:
    """Returns the record that `Cell.begin` wrote to `path`, or None if `path` is not such a file.

    Raises UserError if the record is damaged or does not contain settings.
    """
    record = read_json(path, REMEDY) if path.exists() else None
    if not isinstance(record, dict) or not record.keys() & CellRecord.model_fields.keys():
        return None
    try:
        return CellRecord.model_validate(record)
    except ValidationError:
        raise UserError(
            f"{path} does not contain the settings of its run; choose another --into, or delete "
            f"it and {path.parent / path.stem}"
        ) from None


def _task(path: pathlib.Path) -> Mapping[str, Any]:
    remedy = f"delete {path.parent} to repeat its run"
    task = read_object(path, remedy).get("task")
    if not isinstance(task, dict):
        raise UserError(
            f"{path} lacks the section 'task', which a run's config must have; {remedy}"
        )
    return task


def _rank(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _flag(value: Any) -> str:
    """Formats a value of `config.json` for a command-line flag; lists become tuples."""
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _option(value: Any) -> str:
    """Formats a task's option for a command-line flag, quoted if it would be read as a literal."""
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(value, str) and ast.literal_eval(value) != value:
            return repr(value)
    return _flag(value)


def _arguments(config: str, workdir: pathlib.Path, settings: Mapping[str, str]) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={config}", f"--workdir={workdir}", *flags]
