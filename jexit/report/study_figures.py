"""Figures of a study, as SVG files."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jexit.errors import UserError
from jexit.report import token_strips
from jexit.report.plots import COLOURS, GREY, STYLE, save_figure
from jexit.report.study import COLUMNS, Study

# Of NAME-curves.csv. A price is drawn where it is not what the study sets.
CURVES: Mapping[str, tuple[str, bool]] = {
    "accuracy": ("right answers", True),
    "depth/fraction": ("depth", True),
    "completion/length": ("tokens a completion", False),
    "task/step_size": ("operands a step", False),
    "task/on_the_page": ("additions on the page", True),
    "task/chain_lines": ("lines of the chain", False),
    "depth_coef": ("price of depth", False),
}
# Each becomes a panel of NAME-measures.svg, over the study's settings.
MEASURED: Mapping[str, tuple[str, ...]] = {
    "right, by the steps that are prescribed": (
        *(f"by {n}" for n in range(2, 6)),
        "fine",
        "coarse",
        "at once",
    ),
    "completions that take them": tuple(f"by {n} as asked" for n in range(2, 6)),
    "right result of a begun step": tuple(f"step of {n}" for n in range(2, 6)),
    "what hangs on the chain": ("early answering", "corrupted step"),
    "right without a chain": ("no chain", "filler"),
}
HUES = ("Blues", "Oranges", "Greens", "Purples")
_CLASS = re.compile(r"sample/depth_by_class/(\w+)/depth_mean")


def _plane(study: Study) -> Figure | None:
    """Accuracy over depth with its 95 % intervals: each run, its controls, and all layers."""
    if not any(math.isfinite(study.mean(group, "depth")) for group in study.groups):
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "sample": ("o", "full", 6, "sampled exits"),
        "full": ("D", "full", 6, "all layers"),
        # Larger and on top: a control that does as well lies around the policy's mark.
        "fixed:matched": ("v", "none", 9, "one exit a completion"),
        "shuffled": ("s", "none", 6, "depths shuffled"),
    }
    for order, (policy, (marker, fill, size, label)) in enumerate(kinds.items(), 3):
        for group, colour in _colours(study).items():
            depth, right, low, high = (
                study.values(group, f"{policy}/{name}")
                for name in (
                    "depth_fraction",
                    "accuracy",
                    "accuracy_ci95/low",
                    "accuracy_ci95/high",
                )
            )
            axes.vlines(depth, low, high, color=colour, linewidth=0.9, alpha=0.45)
            style = {"fillstyle": fill, "ms": size, "zorder": order}
            axes.plot(depth, right, marker, color=colour, alpha=0.85, **style)
        axes.plot([], [], marker, color=GREY, fillstyle=fill, ms=size, label=label)
    for group, colour in _colours(study).items():
        axes.plot([], [], "o", color=colour, label=study.label(group))
    axes.set_xlabel("layers run per token")
    axes.set_ylabel("right answers")
    axes.set_title("Accuracy and depth, one mark a seed, 95 % intervals")
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
        if f"rl.{name}" not in study.settings
        and any(any(of) for group in study.groups for of in study.curve(group, name).values())
    ]  # fmt: skip
    if not found:
        return None
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.4), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes in list(all_axes)[len(found) :]:
        axes.set_visible(False)
    shade = min(0.15, 0.5 / len(study.groups))  # of many bands that lie on each other
    for axes, name in zip(figure.axes, found, strict=False):
        title, share = CURVES[name]
        for group, colour in _colours(study).items():
            by_step = study.curve(group, name)
            steps = list(by_step)
            means = [np.mean(by_step[step]) for step in steps]
            axes.plot(steps, means, color=colour, linewidth=1.8, label=study.label(group))
            ends = [[edge(by_step[step]) for step in steps] for edge in (min, max)]
            axes.fill_between(steps, *ends, color=colour, alpha=shade, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("update")
        if share:
            _per_cent(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def _measures(study: Study) -> Figure | None:
    """Capacity and faithfulness over the study's settings: means over seeds, bars their range."""
    groups = list(study.groups)
    panels = {}
    for title, labels in MEASURED.items():
        values = {label: _over_seeds(study, groups, label) for label in labels}
        if known := {label: v for label, v in values.items() if np.isfinite(v).any()}:
            panels[title] = known
    if len(groups) < 2 or not panels:
        return None
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(4.4 * columns, 3.7 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        lowest, some_full = 0.0, False
        for number, (label, values) in enumerate(lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            full = (
                _over_seeds(study, groups, f"{label}, full depth")
                if f"{label}, full depth" in COLUMNS
                else np.full_like(values, math.nan)
            )
            for (means, low, high), style in ((values, "o-"), (full, "o--")):
                fill = "full" if style == "o-" else "none"
                axes.vlines(range(len(groups)), low, high, color=colour, linewidth=1.2, alpha=0.5)
                axes.plot(range(len(groups)), means, style, color=colour, ms=4, fillstyle=fill)
                lowest = min([lowest, *low[np.isfinite(low)]])
            axes.plot([], [], "o-", color=colour, ms=4, label=label)
            some_full |= bool(np.isfinite(full).any())
        if some_full:
            axes.plot([], [], "o--", color=GREY, ms=4, fillstyle="none", label="all layers run")
        axes.set_title(title)
        axes.set_xticks(range(len(groups)), [", ".join(group) for group in groups])
        axes.set_xlabel(", ".join(study.settings))
        _per_cent(axes, lowest)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def _classes(study: Study) -> Figure | None:
    """Layers run by class of token, means over seeds: which tokens the model thinks about."""
    columns = next(iter(study.groups.values()))[0]
    classes = [found[1] for found in map(_CLASS.fullmatch, columns) if found]
    if not classes:
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for group, colour in _colours(study).items():
        sources = [f"sample/depth_by_class/{name}/depth_mean" for name in classes]
        means = [study.mean_of(group, source) for source in sources]
        label = study.label(group)
        axes.plot(range(len(classes)), means, "o", color=colour, label=label, clip_on=False)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("layers run")
    axes.set_title("Layers run per token, by what the token is; each completion's first left out")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def _tokens(study: Study) -> Figure | None:
    """The first completion of each setting's first run that has one."""
    first: dict[str, token_strips.Strip] = {}
    for strip in study.strips:
        group = tuple(strip.settings[key] for key in study.settings)
        first.setdefault(study.label(group), strip)
    if not first:
        return None
    title = "Layers run for each token of the answer"
    prompts = {strip.prompt for strip in first.values()}
    if len(prompts) == 1:
        title += f" to: {' '.join(prompts.pop().split())}"
    return token_strips.draw(title, list(first.items()))


def _over_seeds(study: Study, groups: Sequence[tuple[str, ...]], label: str) -> np.ndarray:
    """[3, groups]: a figure's mean over seeds, and its smallest and largest; NaN without any."""
    values = [study.values(group, COLUMNS[label].source) for group in groups]
    known = [[value for value in of if math.isfinite(value)] or [math.nan] for of in values]
    return np.array([[np.mean(of), min(of), max(of)] for of in known]).T


def _colours(study: Study) -> dict[tuple[str, ...], Any]:
    """From dark to light by the first setting, mostly a level of something; a hue for each other.

    One hue, where there are no other settings or more of their values than hues.
    """
    others = list(dict.fromkeys(group[1:] for group in study.groups))
    levels = list(dict.fromkeys(group[:1] for group in study.groups))
    if len(others) == 1 or len(others) > len(HUES):
        shades = np.linspace(0.0, 0.88, len(study.groups))
        return dict(zip(study.groups, mpl.colormaps["viridis"](shades), strict=True))
    shades = dict(zip(levels, np.linspace(0.95, 0.45, len(levels)), strict=True))
    hues = dict(zip(others, HUES, strict=False))
    return {g: mpl.colormaps[hues[g[1:]]](shades[g[:1]]) for g in study.groups}


def _per_cent(axes: Axes, lowest: float = 0.0) -> None:
    axes.set_ylim(min(lowest, 0.0) - 0.02, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


FIGURES = {
    "plane": _plane,
    "curves": _training,
    "measures": _measures,
    "classes": _classes,
    "tokens": _tokens,
}


def write_figures(
    study: Study, directory: Path, wanted: Collection[str] | None = None
) -> list[Path]:
    """Draws NAME-FIGURE.svg for those of `FIGURES` that are wanted, or that there are numbers for.

    Raises UserError for one that is wanted and has no numbers.
    """
    paths = []
    with mpl.rc_context({**STYLE, "text.parse_math": False}):  # a dollar sign begins no formula
        for name in FIGURES if wanted is None else wanted:
            figure = FIGURES[name](study)
            path = directory / f"{study.name}-{name}.svg"
            if figure is not None:
                paths.append(save_figure(figure, path))
            elif wanted is not None:
                raise UserError(
                    f"{path.name} is in a page, and {study.name} has no numbers for it; take it out"
                )
    return paths
