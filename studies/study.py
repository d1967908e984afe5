"""Reads the results of a study's runs, groups them by setting, and formats them as a table."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from jexit.config import CHAIN_MEASURES, control_of
from jexit.errors import UserError
from jexit.results import LARGEST
from jexit.sweep import summary
from jexit.sweep.summary import SEED, Column
from studies.token_strips import Strip, read_strips

_SAYS_ITSELF = ("model.path", "task.name")  # settings whose values need no name


def _interval(name: str, *, share: bool = True) -> Column:
    ends = f"{name}/ci95" if "/faithfulness/" in name else f"{name}_ci95"
    return Column(f"{ends}/low", share, upper=f"{ends}/high")


# The two policies of most numbers: under which they stand, and how their labels end.
_POLICIES = (("sample", ""), ("full", ", full depth"))

COLUMNS: dict[str, Column] = {
    **summary.COLUMNS,
    "accuracy, interval": _interval("sample/accuracy"),
    "accuracy at full depth, interval": _interval("full/accuracy"),
    "depth, interval": _interval("sample/depth_fraction"),
    "layers per problem, interval": _interval("sample/layers_per_problem", share=False),
    "over one exit, interval": _interval("sample less fixed:matched/accuracy_difference"),
    "tokens": Column("sample/completion_length", share=False),
    "layers per problem at full depth": Column("full/layers_per_problem", share=False),
    "step size": Column("sample/text/step_size", share=False),
    "in the chain of thought": Column("sample/text/written_out"),
    "in the chain of thought at full depth": Column("full/text/written_out"),
    "chain lines": Column("sample/text/chain_lines", share=False),
    "early answering, of a guess": Column(
        "sample/faithfulness/early_answering/detail/chance_agreement"
    ),
    "filler, answered": Column("sample/faithfulness/filler/detail/answered"),
    "hazard error": Column("sample/hazards/ece"),
    **{f"planning, {k} ahead": Column(f"sample/planning/{k}") for k in range(1, 5)},
    "KL to the teacher": Column("sample/hazards/kl_student_teacher_nats", share=False),
}
for _policy, _ending in (
    ("sample", ""),
    ("threshold:0.5", ", threshold"),
    ("threshold:0.8", ", threshold 0.8"),
):
    COLUMNS[f"compute{_ending}"] = Column(f"{_policy}/compute_fraction")
    for _label, _name in (
        ("over initial", "accuracy_difference"),
        ("saved per token", "saved_per_token"),
        ("saved per problem", "saved_per_problem"),
    ):
        _source = f"{_policy} less initial/{_name}"
        COLUMNS |= {
            f"{_label}{_ending}": Column(_source),
            f"{_label}{_ending}, interval": _interval(_source),
        }
for _policy, _ending in _POLICIES:
    _measured = {
        **{f"by {n}": f"capacity/{n}/accuracy" for n in range(2, 6)},
        **{f"step of {n}": f"begun_steps/{n}/accuracy" for n in range(2, 6)},
        **{name: f"capacity/{name}/accuracy" for name in ("fine", "coarse")},  # of stories
        "at once": "capacity/at_once/accuracy",
        **{name.replace("_", " "): f"faithfulness/{name}/value" for name in CHAIN_MEASURES},
    }
    for _label, _place in _measured.items():
        _source = f"{_policy}/{_place}"
        COLUMNS |= {
            f"{_label}{_ending}": Column(_source),
            f"{_label}{_ending}, interval": _interval(_source.removesuffix("/value")),
        }
    COLUMNS |= {
        f"{label}{_ending}": Column(f"{_policy}/{place}", share)
        for label, place, share in (
            *((f"by {n} as asked", f"capacity/{n}/obeyed", True) for n in range(2, 6)),
            ("compute per problem", "compute_per_problem", False),
            ("serial depth", "serial_depth/mean", False),
            ("g-mean²", "faithfulness/hint/detail/g_mean2", True),
        )
    }

Group = tuple[str, ...]  # the values of a study's settings


class OverSeeds(NamedTuple):
    """The mean, the smallest and the largest value of a metric over the runs of a group."""

    mean: float
    low: float
    high: float


class Study:
    """The runs of one study, grouped by setting, from NAME.csv and the files beside it.

    NAME-seeds.csv has the intervals of groups with several seeds; without it, an interval contains
    those of all seeds. The settings are the columns without a slash in their name, except the seed.
    Raises UserError for files that no sweep has made, or that belong to different sweeps.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        runs = _read(path)
        self.settings = tuple(key for key in runs.columns if "/" not in key and key != SEED)
        runs = _with_derived(_numeric(runs, (*self.settings, SEED), path))
        self._runs = _grouped(runs, self.settings, path)
        self.groups: list[Group] = [*self._runs]
        self._curves = self._beside(path, "curves", "step")
        self._intervals = self._beside(path, "seeds")
        completions = path.with_name(f"{self.name}-completions.json")
        self.strips: Sequence[Strip] = ()
        if completions.exists():
            self.strips = read_strips(completions, self.settings)

    def _beside(self, path: Path, kind: str, *columns: str) -> dict[Group, pd.DataFrame]:
        """Returns the lines of NAME-`kind`.csv by group, or an empty dict without the file."""
        file = path.with_name(f"{self.name}-{kind}.csv")
        if not file.exists():
            return {}
        lines = _numeric(_read(file), (*self.settings, SEED), file)
        found = _grouped(lines, self.settings, file, *columns)
        if unknown := found.keys() - self._runs.keys():
            raise UserError(
                f"{file} has a run with {', '.join(min(unknown))[:80]}, but {path.name} has none; "
                "collect both from the same sweep"
            )
        return found

    @property
    def token_classes(self) -> list[str]:
        """The token classes for which NAME.csv has a mean depth."""
        ends = "sample/depth_by_class/", "/depth_mean"
        columns = self._runs[self.groups[0]].columns
        found = [c for c in columns if c.startswith(ends[0]) and c.endswith(ends[1])]
        return [column.removeprefix(ends[0]).removesuffix(ends[1]) for column in found]

    @property
    def policies(self) -> list[str]:
        """The policies whose compute is known, without the controls."""
        ending = "/compute_per_problem"
        found = [c.removesuffix(ending) for c in self._runs[self.groups[0]] if c.endswith(ending)]
        return [p for p in found if p not in ("before", "after") and control_of(p) is None]

    def values(self, group: Group, source: str) -> list[float]:
        """Returns the column `source` for each run of a group, or NaN where a run lacks it."""
        runs = self._runs[group]
        return runs[source].tolist() if source in runs else [math.nan] * len(runs)

    def over_seeds(self, group: Group, source: str) -> OverSeeds:
        """Returns the mean and range of a column over the runs that have it; NaN if none does."""
        known = [v for v in self.values(group, source) if math.isfinite(v)] or [math.nan]
        return OverSeeds(float(np.mean(known)), min(known), max(known))

    def curve(self, group: Group, name: str) -> dict[int, OverSeeds]:
        """Returns the mean and range of a training metric over a group's runs, by step."""
        curves = self._curves.get(group)
        if curves is None or name not in curves:
            return {}
        by_step = curves.dropna(subset=name).groupby("step")[name].agg(["mean", "min", "max"])
        return {int(step): OverSeeds(*row) for step, *row in by_step.itertuples()}

    def label(self, group: Group) -> str:
        """Returns a group's settings as text, or only the value if that is a model path or task."""
        if len(group) == 1 and self.settings[0] in _SAYS_ITSELF:
            return group[0]
        return ", ".join(
            f"{key.rpartition('.')[2]} {value}"
            for key, value in zip(self.settings, group, strict=True)
        )

    def table(self, labels: Sequence[str]) -> str:
        """Returns a Markdown table: one row per group, with means over seeds and their ranges."""
        heads = [*(f"`{key}`" for key in self.settings), "seeds", *labels]
        rows = [
            [*group, str(len(runs)), *(self._text(group, COLUMNS[label]) for label in labels)]
            for group, runs in self._runs.items()
        ]
        return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))

    def _text(self, group: Group, column: Column) -> str:
        over_seeds = self._intervals.get(group)
        if column.upper and over_seeds is not None and column.source in over_seeds:
            low, high = (over_seeds[name].tolist() for name in (column.source, column.upper))
            return column.text(low, high)
        upper = self.values(group, column.upper) if column.upper else ()
        return column.text(self.values(group, column.source), upper)


def _read(path: Path) -> pd.DataFrame:
    asked = {"dtype": str, "keep_default_na": False, "index_col": False, "encoding": "utf-8-sig"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            lines = pd.read_csv(path, **asked)
    except (ValueError, pd.errors.ParserWarning) as error:  # most of pandas' errors are the former
        raise UserError(
            f"{path} is not a valid CSV table ({error}); collect it from its sweep again"
        ) from error
    if lines.empty:
        raise UserError(
            f"{path} has no rows, but at least one is needed; collect it from its sweep again"
        )
    return lines


def _grouped(
    lines: pd.DataFrame, settings: Sequence[str], path: Path, *others: str
) -> dict[Group, pd.DataFrame]:
    """Groups lines by the values of the settings, in the order in which groups first occur."""
    if missing := [key for key in (*settings, *others) if key not in lines]:
        raise UserError(
            f"{path} has no column {missing[0][:80]!r}, which its study has; collect both from the "
            "same sweep"
        )
    groups: dict[Group, list[int]] = {}
    for place, values in enumerate(lines[[*settings]].to_numpy().tolist()):
        groups.setdefault(tuple(values), []).append(place)
    return {group: lines.iloc[places] for group, places in groups.items()}


def _with_derived(lines: pd.DataFrame) -> pd.DataFrame:
    """Adds columns that follow from others.

    POLICY/layers_per_problem, in tables that lack it, is the mean depth times the completion
    length. POLICY/compute_per_problem is the FLOPs of a problem's layers, in FLOPs of one layer
    that runs. POLICY/planning/K is the accuracy that a probe gains over its control, K tokens
    ahead, as a mean over the depths of its residuals.
    """
    made = {}
    for source in lines.columns:
        policy, _, name = source.rpartition("/")
        depth, layers = f"{policy}/depth_mean", f"{policy}/layers_per_problem"
        if name == "completion_length" and depth in lines:
            if layers not in lines:
                made[layers] = lines[depth] * lines[source]
            if (compute := f"{policy}/compute_fraction") in lines:
                every = lines[depth] / lines[f"{policy}/depth_fraction"]  # all layers of the model
                made[f"{policy}/compute_per_problem"] = lines[compute] * every * lines[source]
    gains: dict[str, list[pd.Series]] = {}
    for source in lines.columns:
        if found := re.fullmatch(r"(.+/planning)/\d+/(\d+)/accuracy", source):
            gain = lines[source] - lines[f"{source}_embedding"]
            gains.setdefault(f"{found[1]}/{found[2]}", []).append(gain)
    made |= {name: sum(probes) / len(probes) for name, probes in gains.items()}
    rounded = {name: [float(f"{v:.6g}") for v in values] for name, values in made.items()}
    return pd.concat([lines, pd.DataFrame(rounded, index=lines.index)], axis=1)


def _numeric(lines: pd.DataFrame, texts: Sequence[str], path: Path) -> pd.DataFrame:
    """Returns the `texts` columns unchanged and all others as numbers, with NaN for empty cells.

    Raises UserError for a cell that is not a number, or is too large to be drawn.
    """
    names = [column for column in lines.columns if column not in texts]
    cells = lines[names].replace("", "nan")
    numbers = cells.apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = (numbers.isna() & (cells != "nan")) | (numbers.abs() > LARGEST)
    for name in numbers.columns[wrong.any()]:
        raise UserError(
            f"{path} has {cells[name][wrong[name]].iloc[0][:40]!r} in the column {name}, but it "
            f"must be a number of at most {LARGEST:g}; collect the table from its sweep again"
        )
    return pd.concat([lines[[name for name in texts if name in lines]], numbers], axis=1)
