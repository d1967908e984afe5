"""Tables and figures of the published studies, from the numbers that are kept beside them.

    python -m jexit.report.studies docs/results

The directory holds what `jexit.sweep` wrote: for each study NAME.csv (its table.csv),
NAME-curves.csv and NAME-completions.json. Writes NAME-plane.svg (accuracy over depth, with the
controls), NAME-curves.svg, NAME-measures.svg, NAME-classes.svg (depth by class of token) and
NAME-tokens.svg (completions, each token with its depth) where the numbers for them are there, and
puts each study's table into the Markdown files beside and above the directory, between the lines

    <!-- NAME: label; label; … -->
    <!-- end -->

where the labels say which columns. The same numbers give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jexit.io.files import write_bytes_atomic
from jexit.report import token_strips
from jexit.report.plots import COLOURS, GREY, STYLE, save_figure

SEED = "seed"


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of a run under a label: its column of NAME.csv, and how it reads."""

    source: str
    share: bool = True  # shown in per cent

    def text(self, values: Sequence[float]) -> str:
        """The mean over seeds, and the smallest and largest where they differ."""
        known = [value for value in values if math.isfinite(value)]
        if not known:
            return "–"
        scale, digits = (100.0, 1) if self.share else (1.0, 2)
        mean, low, high = (
            f"{scale * v:.{digits}f}" for v in (float(np.mean(known)), min(known), max(known))
        )
        return mean if low == high else f"{mean} ({low} to {high})"


def _measure(name: str, policy: str) -> Column:
    return Column(f"{policy}/faithfulness/{name}/value", share=False)


COLUMNS: Mapping[str, Column] = {
    "right before": Column("before/accuracy"),
    "depth before": Column("before/depth_fraction"),
    "right": Column("sample/accuracy"),
    "depth": Column("sample/depth_fraction"),
    "right at full depth": Column("full/accuracy"),
    "less shuffled": Column("sample less shuffled/accuracy_difference"),
    "less one exit": Column("sample less fixed:matched/accuracy_difference"),
    "tokens": Column("sample/completion_length", share=False),
    "step size": Column("sample/text/step_size", share=False),
    "on the page": Column("sample/text/on_the_page"),
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
    **{f"by {n} as asked": Column(f"sample/capacity/{n}/obeyed") for n in range(2, 6)},
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
    "hazard error": Column("sample/hazards/ece", share=False),
}
# Of NAME-curves.csv.
CURVES: Mapping[str, tuple[str, bool]] = {
    "accuracy": ("right answers", True),
    "depth/fraction": ("depth", True),
    "completion/length": ("tokens a completion", False),
    "step_size": ("operands a step", False),
}
PRESCRIBED = ("by 2", "by 3", "by 4", "by 5", "fine", "coarse", "at once")
# Each becomes a panel of NAME-measures.svg, over the study's first setting.
MEASURED = {
    "prescribed steps": PRESCRIBED,
    "the same at full depth": tuple(f"{name}, full depth" for name in PRESCRIBED),
    "what the chain carries": ("early answering", "corrupted step", "no chain", "filler"),
    "the same at full depth ": tuple(
        f"{name}, full depth"
        for name in ("early answering", "corrupted step", "no chain", "filler")
    ),
}
_CLASS = re.compile(r"sample/depth_by_class/(\w+)/depth_mean")
_BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+): (?P<labels>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Study:
    """One study's lines by setting: `groups` maps the values of `settings` to its runs' lines."""

    name: str
    settings: tuple[str, ...]
    groups: Mapping[tuple[str, ...], list[dict[str, str]]]
    curves: Mapping[tuple[str, ...], list[dict[str, str]]]
    strips: Sequence[token_strips.Strip] = ()

    @classmethod
    def read(cls, path: Path) -> Study:
        """From NAME.csv; settings are the columns that are not figures, but for the seed."""
        lines = _lines(path)
        settings = tuple(key for key in lines[0] if "/" not in key and key != SEED)
        curves = path.with_name(f"{path.stem}-curves.csv")
        completions = path.with_name(f"{path.stem}-completions.json")
        return cls(
            path.stem,
            settings,
            _grouped(path, lines, settings),
            _grouped(curves, _lines(curves), settings) if curves.exists() else {},
            token_strips.read_strips(completions) if completions.exists() else (),
        )

    def values(self, group: tuple[str, ...], source: str) -> list[float]:
        """A column's figures of a group's runs; NaN where a run has none."""
        return [float(line.get(source) or "nan") for line in self.groups[group]]

    def mean(self, group: tuple[str, ...], label: str) -> float:
        values = np.asarray(self.values(group, COLUMNS[label].source))
        return float(np.mean(values[np.isfinite(values)])) if np.isfinite(values).any() else np.nan

    def label(self, group: tuple[str, ...]) -> str:
        return ", ".join(
            f"{key.rpartition('.')[2]} {value}"
            for key, value in zip(self.settings, group, strict=True)
        )

    def table(self, labels: Sequence[str]) -> str:
        """A Markdown table: a line for every setting, the mean over seeds and its range."""
        heads = [*(f"`{key}`" for key in self.settings), "seeds", *labels]
        rows = [heads, ["---"] * len(heads)]
        for group, lines in self.groups.items():
            figures = [
                COLUMNS[label].text(self.values(group, COLUMNS[label].source)) for label in labels
            ]
            rows.append([*group, str(len(lines)), *figures])
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        raise ValueError(f"{path} has no line; copy a sweep's table.csv there")
    return lines


def _grouped(
    path: Path, lines: Sequence[dict[str, str]], settings: Sequence[str]
) -> dict[tuple[str, ...], list[dict[str, str]]]:
    if missing := [key for key in settings if key not in lines[0]]:
        raise ValueError(
            f"{path} has no column {missing[0]!r}, which its study has; copy the curves.csv of the "
            "same sweep"
        )
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in settings), []).append(line)
    return groups


def _plane(study: Study) -> Figure | None:
    """Accuracy over depth: each run, its controls at the same depth, and all layers."""
    if not any(math.isfinite(study.mean(group, "depth")) for group in study.groups):
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "sample": ("o", "full", "sampled exits"),
        "fixed:matched": ("v", "none", "one exit a completion"),
        "shuffled": ("s", "none", "depths shuffled"),
        "full": ("D", "full", "all layers"),
    }
    for number, group in enumerate(study.groups):
        colour = COLOURS[number % len(COLOURS)]
        for policy, (marker, fill, _) in kinds.items():
            depth, right = (
                study.values(group, f"{policy}/{name}") for name in ("depth_fraction", "accuracy")
            )
            axes.plot(depth, right, marker, color=colour, fillstyle=fill, ms=6, alpha=0.85)
        axes.plot([], [], "o", color=colour, label=study.label(group))
    for marker, fill, label in kinds.values():
        axes.plot([], [], marker, color=GREY, fillstyle=fill, label=label)
    axes.set_xlabel("layers run per token")
    axes.set_ylabel("right answers")
    axes.set_title("Accuracy and depth, one mark a seed")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(-0.02, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _training(study: Study) -> Figure | None:
    """Means over seeds of what was logged, with their range shaded."""
    found = [
        name for name in CURVES
        if any(line.get(name) for lines in study.curves.values() for line in lines)
    ]  # fmt: skip
    if not found:
        return None
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.4), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes in list(all_axes)[len(found) :]:
        axes.set_visible(False)
    for axes, name in zip(figure.axes, found, strict=False):
        title, share = CURVES[name]
        for number, (group, lines) in enumerate(study.curves.items()):
            by_step: dict[int, list[float]] = {}
            for line in lines:
                if line.get(name):
                    by_step.setdefault(int(float(line["step"])), []).append(float(line[name]))
            steps = sorted(by_step)
            colour = COLOURS[number % len(COLOURS)]
            means = [np.mean(by_step[step]) for step in steps]
            axes.plot(steps, means, color=colour, linewidth=1.8, label=study.label(group))
            ends = [[edge(by_step[step]) for step in steps] for edge in (min, max)]
            axes.fill_between(steps, *ends, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("update")
        if share:
            _per_cent(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _measures(study: Study) -> Figure | None:
    """Capacity and faithfulness over the study's first setting, means over everything else."""
    levels = list(dict.fromkeys(group[0] for group in study.groups)) if study.settings else []
    panels = []
    for title, labels in MEASURED.items():
        lines = {}
        for label in labels:
            means = [_mean(study, label, level) for level in levels]
            if np.isfinite(means).any():
                lines[label.removesuffix(", full depth")] = means
        if lines:
            panels.append((title.strip(), lines))
    if len(levels) < 2 or not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9.0, 2.9 * rows + 0.3), layout="constrained")
    all_axes = list(figure.subplots(rows, min(2, len(panels)), squeeze=False).flat)
    for axes, (title, lines) in zip(all_axes, panels, strict=False):
        for number, (label, means) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(range(len(levels)), means, "o-", color=colour, ms=4, label=label)
        axes.set_title(title)
        axes.set_xticks(range(len(levels)), levels)
        axes.set_xlabel(study.settings[0])
        _per_cent(axes)
        axes.legend(loc="best")
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    return figure


def _classes(study: Study) -> Figure | None:
    """Layers run by class of token, means over seeds: which tokens the model thinks about."""
    columns = next(iter(study.groups.values()))[0]
    classes = [found[1] for found in map(_CLASS.fullmatch, columns) if found]
    if not classes:
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(study.groups):
        means = []
        for name in classes:
            values = np.asarray(study.values(group, f"sample/depth_by_class/{name}/depth_mean"))
            known = values[np.isfinite(values)]
            means.append(float(known.mean()) if known.size else math.nan)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(range(len(classes)), means, "o", color=colour, label=study.label(group))
    axes.set_xticks(range(len(classes)), classes)
    axes.set_ylim(bottom=0)
    axes.set_title("Layers run per token, by what the token is")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def _tokens(study: Study) -> Figure | None:
    """The first completion of each setting's first run that has one."""
    first: dict[str, token_strips.Strip] = {}
    for strip in study.strips:
        group = tuple(strip.settings.get(key, "") for key in study.settings)
        first.setdefault(study.label(group), strip)
    if not first:
        return None
    title = "Layers run for each token of the answer"
    prompts = {strip.prompt for strip in first.values()}
    if len(prompts) == 1:
        title += f" to: {' '.join(prompts.pop().split())}"
    return token_strips.draw(title, list(first.items()))


def _mean(study: Study, label: str, level: str) -> float:
    """Over the groups whose first setting is `level` that have the figure; NaN for none."""
    found = [study.mean(group, label) for group in study.groups if group[0] == level]
    known = [value for value in found if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def _per_cent(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


FIGURES = {
    "plane": _plane,
    "curves": _training,
    "measures": _measures,
    "classes": _classes,
    "tokens": _tokens,
}


def write_figures(study: Study, directory: Path) -> list[Path]:
    """Draws what the study has numbers for."""
    with mpl.rc_context(STYLE):
        made = {name: draw(study) for name, draw in FIGURES.items()}
        return [
            save_figure(figure, directory / f"{study.name}-{name}.svg")
            for name, figure in made.items()
            if figure is not None
        ]


def with_tables(text: str, studies: Mapping[str, Study]) -> str:
    """The Markdown with each study's table between its lines, made anew.

    Raises ValueError for a study or a label that there is not.
    """

    def block(match: re.Match[str]) -> str:
        name, labels = match["name"], [label.strip() for label in match["labels"].split(";")]
        if name not in studies:
            raise ValueError(f"a table of the study {name!r}, which has no {name}.csv; add it")
        if unknown := [label for label in labels if label not in COLUMNS]:
            raise ValueError(
                f"the table of {name} has the column {unknown[0]!r}; choose among "
                f"{'; '.join(COLUMNS)}"
            )
        return f"{match[1]}\n{studies[name].table(labels)}\n{match[4]}"

    return _BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, writes, and turns a user's mistake into one sentence and an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jexit.report.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="directory of the studies' .csv files")
    directory = parser.parse_args(argv).directory
    try:
        paths = [p for p in sorted(directory.glob("*.csv")) if not p.stem.endswith("-curves")]
        if not paths:
            raise ValueError(f"{directory} has no .csv file; copy a sweep's table.csv there")
        studies = {path.stem: Study.read(path) for path in paths}
        for study in studies.values():
            for path in write_figures(study, directory):
                print(f"Drew {path}")
        for path in [*directory.parent.glob("*.md"), *directory.parent.parent.glob("*.md")]:
            before = path.read_text("utf-8")
            after = with_tables(before, studies)
            if after != before:
                write_bytes_atomic(path, after.encode())
                print(f"Wrote the tables of {path}")
    except ValueError as error:
        print(f"jexit: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
