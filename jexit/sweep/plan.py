"""What a sweep is asked for: its combinations, their directories, and the commands of each."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from jexit.errors import UserError
from jexit.main import parse
from jexit.results import REMEDY, Evaluation, PolicyResult, Record, numbers
from jexit.tasks import make_task
from jexit.untrusted import read_json, read_object

FINISHED = "after.json"  # the last file of a training run that is measured
EVALUATED = "eval.json"  # that of an evaluation
MACHINE = re.compile(r"seconds|per_second|memory/|compilations|mfu")  # how fast it was

_GRID = re.compile(r"(?P<key>[a-z_0-9]+(?:\.[a-z_0-9]+)*)=(?P<values>.*)", re.DOTALL)
_SETTING = re.compile(r"--(?P<of>config|eval)\.(?P<key>[a-z_0-9.]+)=(?P<value>.*)", re.DOTALL)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+()-]+")


class Asked(Record):
    """What a combination was begun with, in a file beside its directory: arguments by process."""

    settings: dict[str, str]
    run: tuple[str, ...] | None = None
    eval: tuple[str, ...] | None = None


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
    def last_word(self) -> str:
        """What its processes said last, and where the rest is."""
        lines = self.log.read_text("utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
        return f"{said.removeprefix('jexit: ')} (see {self.log})"

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

    def numbers(self) -> dict[str, float]:
        """Those of the finished run and its evaluation, but for how fast the machine was."""
        found: dict[str, float] = {}
        for stage in ("before", "after"):
            path = self.workdir / f"{stage}.json"
            if path.exists():
                found |= numbers(stage, PolicyResult.read(path))
        if self.evaluation:
            found |= Evaluation.read(self.evaluation).numbers()
        return {key: value for key, value in found.items() if not MACHINE.search(key)}

    def begin(self, part: str, arguments: Sequence[str]) -> None:
        """Keeps what the cell's run or evaluation is asked for."""
        asked = _asked(self.asked) or Asked(settings=dict(self.settings))
        asked.model_copy(update={part: tuple(arguments)}).write(self.asked)

    def check(self, part: str, arguments: Sequence[str]) -> None:
        """Raises UserError if it was begun with other arguments and has left something behind."""
        asked = getattr(_asked(self.asked), part, None)
        if differing := sorted(set(asked or arguments) ^ set(arguments)):
            raise UserError(
                f"{self.name} was started by another command, which differs in {differing[0]}; "
                f"choose another --into, or delete {self.workdir} and {self.asked}"
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
        """Raises UserError, in one sentence, for arguments that are none or contradict others."""
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
                    f"{argument!r} is no argument of a sweep; give KEY=VALUE,VALUE, "
                    "--config.KEY=VALUE or one of --config, --into, --eval, --jobs"
                )
        if missing := [name for name in ("--config", "--into") if name not in given]:
            raise UserError(f"{missing[0]} is missing; a sweep needs --config=FILE and --into=DIR")
        for key, values in grid.items():
            if "" in values or len(set(values)) < len(values):
                raise UserError(
                    f"{key} has the values {', '.join(map(repr, values))}; give distinct values, "
                    "none of them empty"
                )
            if key in settings["config"]:
                raise UserError(f"{key} is both in the grid and in --config.{key}; give it once")
        if settings["eval"] and "--eval" not in given:
            raise UserError("--eval.KEY=VALUE is given without --eval=FILE; add --eval=FILE")
        jobs = given.get("--jobs", "1")
        if not jobs.isdecimal() or int(jobs) < 1:
            raise UserError(f"--jobs is {jobs!r}; give a number of runs at once, at least 1")
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
            raise UserError(
                "two combinations of values would share a directory; give values that differ in "
                "letters or digits"
            )
        return cells

    def begun(self, cells: Sequence[Cell]) -> list[Cell]:
        """The command's combinations, then those of the same study that others began here.

        Raises UserError if there are runs of another study: of other keys, or with another config
        or other fixed settings.
        """
        found = {cell.name for cell in cells}
        others = [cell for cell in begun_in(self.into) if cell.name not in found]
        for cell in others:
            if tuple(cell.settings) != tuple(self.grid):
                raise UserError(
                    f"{self.into} already holds {cell.name} from another sweep; this one varies "
                    f"{', '.join(self.grid) or 'no keys'}, in this order: choose another --into"
                )
        begun = [*cells, *others]
        for cell in begun:
            if cell.workdir.exists():
                cell.check("run", self.training(cell))
            if self.evaluation and (cell.workdir / "eval").exists():
                cell.check("eval", self.evaluating(cell))
        return begun

    def training(self, cell: Cell) -> list[str]:
        """The arguments of `jexit.main` that make a combination's run."""
        return _arguments(self.config, cell.workdir, {**self.fixed, **cell.settings})

    def evaluating(self, cell: Cell, task: Mapping[str, Any] | None = None) -> list[str]:
        """Those that evaluate the run on its own task, by default that of the run as it began."""
        task = _task(cell.workdir / "config.json") if task is None else task
        own = {f"task.{key}": value for key, value in task.items() if key != "options"}
        own |= {f"task.options.{key}": value for key, value in task.get("options", {}).items()}
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

    def check_settings(self, cell: Cell) -> None:
        """Raises UserError for a config file or a setting that is wrong, before anything runs."""
        try:
            config = parse(["jexit.main", *self.training(cell)]).config
            task = config.task
            make_task(task.name, task.path or None, **task.options)
            if self.evaluation:
                parse(["jexit.main", *self.evaluating(cell, config.to_dict()["task"])])
        except ValueError as error:
            raise UserError(f"{cell.name} cannot run: {error}") from error


def begun_in(into: pathlib.Path) -> list[Cell]:
    """The combinations that sweeps have begun in a directory, ordered by their values."""
    records = ((path, _asked(path)) for path in sorted(into.glob("*.json")))
    cells = [Cell(asked.settings, into / path.stem) for path, asked in records if asked]
    return sorted(cells, key=lambda cell: [*map(_rank, cell.settings.values())])


def _whole(path: pathlib.Path) -> bool:
    """Whether there is an evaluation, and it has been measured to its end."""
    return path.exists() and Evaluation.read(path).complete


def _asked(path: pathlib.Path) -> Asked | None:
    """What `Cell.begin` has kept; None without a file, and for one of something else.

    Raises UserError for a record that is damaged, or of a sweep that kept no settings.
    """
    record = read_json(path, REMEDY) if path.exists() else None
    if not isinstance(record, dict) or not record.keys() & Asked.model_fields.keys():
        return None
    try:
        return Asked.model_validate(record)
    except ValidationError:
        raise UserError(
            f"{path} does not say what its run was asked for; another --into is needed, or delete "
            f"it and {path.parent / path.stem}"
        ) from None


def _task(path: pathlib.Path) -> Mapping[str, Any]:
    remedy = f"delete {path.parent}, to run it anew"
    task = read_object(path, remedy).get("task")
    if not isinstance(task, dict):
        raise UserError(f"{path} is no run's config; {remedy}")
    return task


def _rank(value: str) -> tuple[float, str]:
    """Orders numbers by size, then the rest by letter."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _flag(value: Any) -> str:
    """A setting of config.json as a flag takes it."""
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _arguments(config: str, workdir: pathlib.Path, settings: Mapping[str, str]) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={config}", f"--workdir={workdir}", *flags]
