"""A study: the figures of a sweep's runs by what was asked of them, and its table."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jexit.errors import UserError
from jexit.report.token_strips import Strip, read_strips
from jexit.results import LARGEST

SEED = "seed"
_SAYS_ITSELF = ("model.path", "task.name")  # settings whose values need no name


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of a run under a label: its column of NAME.csv, and how it reads."""

    source: str
    share: bool = True  # shown in per cent
    upper: str | None = None  # of an interval, whose lower end is `source`

    def text(self, values: Sequence[float], upper: Sequence[float] = ()) -> str:
        """The mean over seeds, and the smallest and largest where they differ.

        Of an interval: from the smallest lower to the largest upper end. Where some seeds have no
        figure, it says how many have.
        """
        ends = zip(values, upper or values, strict=True)
        whole = [pair for pair in ends if all(map(math.isfinite, pair))]
        if not whole:
            return "–"
        known = [end for pair in whole for end in pair]
        scale, digits = (100.0, 1) if self.share else (1.0, 2)
        mean, low, high = (
            f"{scale * v:.{digits}f}" for v in (float(np.mean(known)), min(known), max(known))
        )
        if upper:
            text = f"{low} to {high}"
        else:
            text = mean if low == high else f"{mean} ({low} to {high})"
        return text if len(whole) == len(values) else f"{text}, of {len(whole)}"


def _interval(name: str) -> Column:
    return Column(f"{name}_ci95/low", upper=f"{name}_ci95/high")


def _measure(name: str, policy: str) -> Column:
    return Column(f"{policy}/faithfulness/{name}/value")


COLUMNS: Mapping[str, Column] = {
    "right before": Column("before/accuracy"),
    "depth before": Column("before/depth_fraction"),
    "right after": Column("after/accuracy"),
    "depth after": Column("after/depth_fraction"),
    "right": Column("sample/accuracy"),
    "depth": Column("sample/depth_fraction"),
    "right, interval": _interval("sample/accuracy"),
    "right at full depth": Column("full/accuracy"),
    "right at full depth, interval": _interval("full/accuracy"),
    "over shuffled": Column("sample less shuffled/accuracy_difference"),
    "over one exit": Column("sample less fixed:matched/accuracy_difference"),
    "over one exit, interval": _interval("sample less fixed:matched/accuracy_difference"),
    "tokens": Column("sample/completion_length", share=False),
    "layers a problem": Column("sample/layers_per_problem", share=False),
    "layers a problem before": Column("before/layers_per_problem", share=False),
    "layers a problem after": Column("after/layers_per_problem", share=False),
    "layers a problem at full depth": Column("full/layers_per_problem", share=False),
    "step size": Column("sample/text/step_size", share=False),
    "on the page": Column("sample/text/on_the_page"),
    "on the page at full depth": Column("full/text/on_the_page"),
    "chain lines": Column("sample/text/chain_lines", share=False),
    "at once": Column("sample/capacity/at_once/accuracy"),
    "at once, full depth": Column("full/capacity/at_once/accuracy"),
    **{
        f"{label}{where}": Column(f"{policy}/capacity/{name}/accuracy")
        for name, label in (
            *((str(n), f"by {n}") for n in range(2, 6)),
            *(("fine", "fine"), ("coarse", "coarse")),  # of stories
        )
        for policy, where in (("sample", ""), ("full", ", full depth"))
    },
    **{
        f"step of {n}{where}": Column(f"{policy}/begun_steps/{n}/accuracy")
        for n in range(2, 6)
        for policy, where in (("sample", ""), ("full", ", full depth"))
    },
    **{
        f"by {n} as asked{where}": Column(f"{policy}/capacity/{n}/obeyed")
        for n in range(2, 6)
        for policy, where in (("sample", ""), ("full", ", full depth"))
    },
    **{
        f"{label}{where}": _measure(name, policy)
        for name, label in (
            ("early_answering", "early answering"),
            ("no_chain", "no chain"),
            ("filler", "filler"),
            ("corrupted_step", "corrupted step"),
            ("hint", "hint"),
        )
        for policy, where in (("sample", ""), ("full", ", full depth"))
    },
    "early answering, of a guess": Column(
        "sample/faithfulness/early_answering/detail/chance_agreement"
    ),
    "filler, answered": Column("sample/faithfulness/filler/detail/answered"),
    "hazard error": Column("sample/hazards/ece"),
    "KL to the teacher": Column("sample/hazards/kl_student_teacher_nats", share=False),
}

SUMMARY = (
    *("right before", "depth before", "layers a problem before"),
    *("right after", "depth after", "layers a problem after"),
    *("right", "depth", "layers a problem", "right at full depth", "over one exit"),
    "over shuffled",
)


@dataclasses.dataclass(frozen=True)
class Study:
    """One study's lines by setting: `groups` maps the values of `settings` to its runs' lines."""

    name: str
    settings: tuple[str, ...]
    groups: Mapping[tuple[str, ...], list[dict[str, str]]]
    curves: Mapping[tuple[str, ...], list[dict[str, str]]]
    strips: Sequence[Strip] = ()

    @classmethod
    def read(cls, path: Path) -> Study:
        """From NAME.csv; settings are the columns that are not figures, but for the seed."""
        lines = _lines(path)
        settings = tuple(key for key in lines[0] if "/" not in key and key != SEED)
        curves = path.with_name(f"{path.stem}-curves.csv")
        completions = path.with_name(f"{path.stem}-completions.json")
        groups = _grouped(path, lines, settings)
        training = _grouped(curves, _lines(curves), settings, "step") if curves.exists() else {}
        if unknown := [group for group in training if group not in groups]:
            raise UserError(
                f"{curves} has a run with {', '.join(unknown[0])[:80]} and {path.name} has none; "
                "copy both from the same sweep"
            )
        return cls(
            path.stem,
            settings,
            groups,
            training,
            _strips(completions, settings) if completions.exists() else (),
        )

    def values(self, group: tuple[str, ...], source: str) -> list[float]:
        """A column's figures of a group's runs; NaN where a run has none."""
        return [
            _number(line.get(source), f"{self.name}.csv", source) for line in self.groups[group]
        ]

    def curve(self, group: tuple[str, ...], name: str) -> dict[int, list[float]]:
        """A training metric of a group's runs by step; steps without any figure are left out."""
        by_step: dict[int, list[float]] = {}
        file = f"{self.name}-curves.csv"
        for line in self.curves.get(group, ()):
            if line.get(name):
                step = _number(line["step"], file, "step")
                if not step.is_integer():
                    raise UserError(
                        f"{file} has the step {line['step']!r}, which is no whole number; copy it "
                        "anew from the sweep"
                    )
                by_step.setdefault(int(step), []).append(_number(line[name], file, name))
        return dict(sorted(by_step.items()))

    def mean(self, group: tuple[str, ...], label: str) -> float:
        return self.mean_of(group, COLUMNS[label].source)

    def mean_of(self, group: tuple[str, ...], source: str) -> float:
        """Over the group's runs that have the figure; NaN for none."""
        known = [value for value in self.values(group, source) if math.isfinite(value)]
        return float(np.mean(known)) if known else math.nan

    def label(self, group: tuple[str, ...]) -> str:
        """The settings' last names and values; of one that is a path, a name, only its value."""
        if len(group) == 1 and self.settings[0] in _SAYS_ITSELF:
            return group[0]
        return ", ".join(
            f"{key.rpartition('.')[2]} {value}"
            for key, value in zip(self.settings, group, strict=True)
        )

    def table(self, labels: Sequence[str]) -> str:
        """A Markdown table: a line for every setting, the mean over seeds and its range."""
        heads = [*(f"`{key}`" for key in self.settings), "seeds", *labels]
        rows = [heads, ["---"] * len(heads), *self._rows(labels)]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def summary(self) -> str:
        """Those figures of `SUMMARY` that any run has, in columns of text; shares in per cent."""
        labels = [
            label
            for label in SUMMARY
            if any(math.isfinite(self.mean(group, label)) for group in self.groups)
        ]
        rows = [[*self.settings, "seeds", *labels], *self._rows(labels)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join(lines)

    def _rows(self, labels: Sequence[str]) -> list[list[str]]:
        return [
            [*group, str(len(lines)), *(self._text(group, COLUMNS[label]) for label in labels)]
            for group, lines in self.groups.items()
        ]

    def _text(self, group: tuple[str, ...], column: Column) -> str:
        upper = self.values(group, column.upper) if column.upper else ()
        return column.text(self.values(group, column.source), upper)


def _lines(path: Path) -> list[dict[str, str]]:
    kept = "curves.csv" if path.stem.endswith("-curves") else "table.csv"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader, lines = csv.DictReader(file), []
            for line in reader:
                if None in line or None in line.values():  # more or fewer cells than the head
                    raise UserError(
                        f"line {reader.line_num} of {path} has not as many cells as the first; "
                        f"copy a sweep's {kept} there anew"
                    )
                lines.append(line | _layers_per_problem(line, path.name))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file ({error}); copy a sweep's {kept} there") from error
    if not lines:
        raise UserError(f"{path} has no line; copy a sweep's {kept} there")
    return lines


def _layers_per_problem(line: Mapping[str, str], file: str) -> dict[str, str]:
    """What older tables lack and imply: a policy's mean depth times its completions' length."""
    ending, made = "/completion_length", {}
    for source in line:
        policy = source.removesuffix(ending)
        name, depth = f"{policy}/layers_per_problem", f"{policy}/depth_mean"
        if policy != source and name not in line and depth in line:
            layers = _number(line[depth], file, depth) * _number(line[source], file, source)
            made[name] = f"{layers:g}"
    return made


def _number(text: str | None, file: str, column: str) -> float:
    """A cell's number, NaN for an empty one; ValueError for what is none, or cannot be drawn."""
    try:
        number = float(text or "nan")
    except ValueError:
        number = math.inf
    if abs(number) > LARGEST:
        raise UserError(
            f"{file} has {text[:40]!r} under {column}, which is no number up to {LARGEST:g}; copy "
            "it anew from the sweep"
        )
    return number


def _strips(path: Path, settings: Sequence[str]) -> tuple[Strip, ...]:
    strips = read_strips(path)
    if missing := [key for strip in strips for key in settings if key not in strip.settings]:
        raise UserError(
            f"{path} has completions without {missing[0][:80]!r}, which its study has; copy the "
            "completions.json of the same sweep"
        )
    return strips


def _grouped(
    path: Path, lines: Sequence[dict[str, str]], settings: Sequence[str], *others: str
) -> dict[tuple[str, ...], list[dict[str, str]]]:
    if missing := [key for key in (*settings, *others) if key not in lines[0]]:
        raise UserError(
            f"{path} has no column {missing[0][:80]!r}, which it needs for its study; copy the "
            "curves.csv of the same sweep"
        )
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in settings), []).append(line)
    return groups
