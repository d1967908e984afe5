"""Draws the charts of a study as SVG files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

import numpy as np

from jexit.config import control_of
from jexit.report.charts import Axis, Chart, as_file
from jexit.report.colours import SERIES, level_class
from jexit.report.evaluation_charts import policy_marker
from jexit.report.rendering import per_cent, short_number
from jexit.report.training_curves import MEAN_DEPTH
from studies import token_strips
from studies.study import COLUMNS, Group, OverSeeds, Study

# Of NAME-curves.csv. A penalty is drawn where it is not what the study sets.
CURVES: Mapping[str, tuple[str, bool]] = {
    "accuracy": ("accuracy", True),
    "depth/fraction": ("depth", True),
    "completion/length": ("tokens per completion", False),
    "task/step_size": ("operands per step", False),
    "task/written_out": ("additions written out", True),
    "task/chain_lines": ("lines of the chain", False),
    "depth_coef": ("depth penalty", False),
}
# Each becomes a chart of NAME-measures.svg, over the study's settings.
MEASURED: Mapping[str, tuple[str, ...]] = {
    "accuracy, by the steps that are prescribed": (
        *(f"by {n}" for n in range(2, 6)),
        "fine",
        "coarse",
        "at once",
    ),
    "completions with the prescribed steps": tuple(f"by {n} as asked" for n in range(2, 6)),
    "accuracy of a forced step": tuple(f"step of {n}" for n in range(2, 6)),
    "dependence on the chain of thought": ("early answering", "corrupted step"),
    "accuracy without a chain": ("no chain", "filler"),
}
POLICIES: Mapping[str, str] = {  # and what the legend calls them
    "sample": "sampled exits",
    "full": "all layers",
    "fixed:matched": "one exit per completion",
    "shuffled": "depths shuffled",
}


def plane(study: Study) -> list[Chart]:
    """Returns a chart of accuracy over depth: each run, its controls and full depth."""
    if not _known(study.over_seeds(group, "sample/depth_fraction") for group in study.groups):
        return []
    chart = Chart(
        "Accuracy and depth, one mark a seed, 95 % intervals",
        Axis.of_shares(MEAN_DEPTH),
        Axis.of_shares("accuracy"),
        width=560.0,
        height=400.0,
    )
    for policy, told in POLICIES.items():
        shape = policy_marker(policy, control_of(policy) is not None)
        for group, colour in _colours(study).items():
            columns = ("depth_fraction", "accuracy", "accuracy_ci95/low", "accuracy_ci95/high")
            for depth, accuracy, *ends in zip(
                *(study.values(group, f"{policy}/{column}") for column in columns), strict=True
            ):
                if math.isfinite(depth) and math.isfinite(accuracy):
                    chart.upright(depth, (ends[0], ends[1]), colour)
                    at = f"{per_cent(accuracy)} correct at {per_cent(depth)} of the layers"
                    chart.point(
                        depth, accuracy, shape, colour, f"{study.label(group)}, {told}: {at}"
                    )
        chart.explain(told, "s5", shape)
    for group, colour in _colours(study).items():
        chart.explain(study.label(group), colour, "circle")
    return [chart]


def cost(studies: Sequence[Study]) -> list[Chart]:
    """Returns a chart of accuracy over the compute of a problem, one colour per study.

    A study of several settings is drawn under sampled exits, or at full depth if its models have no
    exits. A study of one setting is drawn under each of its policies that is not a control.
    """
    marks = []
    for index, study in enumerate(studies):
        shown = study.policies
        if len(study.groups) > 1:
            shown = ["sample"] if "sample" in shown else ["full"]
        for policy, group in itertools.product(shown, study.groups):
            text = policy if len(study.groups) == 1 else PurePath(", ".join(group)).name
            columns = ("compute_per_problem", "accuracy")
            xs, ys = (study.values(group, f"{policy}/{column}") for column in columns)
            points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x + y)]
            if points:
                marks.append((f"s{index % SERIES}", policy_marker(policy, False), text, points))
    if not marks:
        return []
    xs, ys = zip(*(point for *_, points in marks for point in points), strict=True)
    chart = Chart(
        "Accuracy and compute, one mark a seed",
        Axis.of_numbers("compute of a problem, in layers that run for one token", 0.0, max(xs)),
        Axis.around_shares("accuracy", ys),
        width=640.0,
        height=420.0,
    )
    labels = []
    for colour, shape, text, points in marks:
        for x, y in points:
            chart.point(x, y, shape, colour, f"{text}: {per_cent(y)} correct for {x:.1f} layers")
            chart.keep_clear((x, y), (x, y))
        labels.append((*np.mean(points, axis=0).tolist(), text, colour))
    chart.label_points(labels)
    for index, study in enumerate(studies):
        chart.explain(study.name, f"s{index % SERIES}", "circle")
    return [chart]


def curves(study: Study) -> list[Chart]:
    """Returns charts of the training metrics: means over seeds, with their range shaded."""
    charts = []
    for name, (title, shares) in CURVES.items():
        by_group = {group: study.curve(group, name) for group in study.groups}
        points = [point for curve in by_group.values() for point in curve.values()]
        if f"rl.{name}" in study.settings or not any(mean or high for mean, _, high in points):
            continue
        steps = [step for curve in by_group.values() for step in curve]
        low, high = min(point.low for point in points), max(point.high for point in points)
        y = Axis.of_shares("") if shares else Axis.of_numbers("", low, high, 4)
        chart = Chart(title, Axis.of_steps("update", min(steps), max(steps)), y, width=400.0)
        for group, colour in _colours(study).items():
            if by_group[group]:
                at = list(by_group[group])
                means, lows, highs = zip(*by_group[group].values(), strict=True)
                chart.band(at, lows, highs, f"band {'faint ' * (len(by_group) > 3)}{colour}")
                chart.curve(at, means, f"curve {colour}")
        chart.told_at(_told(study, by_group, shares))
        charts.append(chart)
    if charts:
        for group, colour in _colours(study).items():
            charts[0].explain(study.label(group), f"curve {colour}")
    return charts


def _told(
    study: Study, by_group: Mapping[Group, Mapping[int, OverSeeds]], shares: bool
) -> list[tuple[float, str]]:
    columns = []
    for step in sorted({step for curve in by_group.values() for step in curve}):
        lines = [f"update {step}"]
        for group, curve in by_group.items():
            if step in curve:
                mean = curve[step].mean
                text = per_cent(mean) if shares else short_number(mean, 4)
                lines.append(f"{study.label(group)}: {text}")
        columns.append((float(step), "\n".join(lines)))
    return columns


def measures(study: Study) -> list[Chart]:
    """Returns charts of capacity and faithfulness per setting, as means and ranges over seeds."""
    charts = []
    for title, labels in MEASURED.items():
        lines = {label: _over_settings(study, label) for label in labels}
        lines = {label: line for label, line in lines.items() if _known(line)}
        if len(study.groups) < 2 or not lines:
            continue
        full = {label: _over_settings(study, f"{label}, full depth") for label in lines}
        lowest = min(0.0, *(p.low for of in (lines, full) for line in of.values() for p in line
                            if math.isfinite(p.low)))  # fmt: skip
        names = [", ".join(group) for group in study.groups]
        chart = Chart(
            title,
            Axis.of_names(", ".join(study.settings), names),
            Axis.of_shares("", lowest, 1.0),
            width=400.0,
        )
        for index, label in enumerate(lines):
            colour = f"s{index % SERIES}"
            _line(chart, names, lines[label], label, colour)
            _line(chart, names, full[label], f"{label}, all layers run", f"{colour} dash1")
            chart.explain(label, f"curve {colour}")
        if any(map(_known, full.values())):
            chart.explain("all layers run", "curve s5 dash1")
        charts.append(chart)
    return charts


def _line(
    chart: Chart, names: Sequence[str], line: Sequence[OverSeeds], label: str, classes: str
) -> None:
    chart.curve(range(len(line)), [point.mean for point in line], f"curve {classes}")
    colour, _, dashed = classes.partition(" ")
    for at, (mean, low, high) in enumerate(line):
        if math.isfinite(mean):
            chart.upright(at, (low, high), colour)
            told = f"{names[at]}, {label}: {per_cent(mean)}"
            chart.point(at, mean, "open-circle" if dashed else "circle", colour, told, 0.6)


def classes(study: Study) -> list[Chart]:
    """Returns a chart of the layers run per token for each token class, as means over seeds."""
    names = study.token_classes
    if not names:
        return []
    depths = {
        group: [study.over_seeds(group, f"sample/depth_by_class/{n}/depth_mean") for n in names]
        for group in study.groups
    }
    highest = max((p.mean for line in depths.values() for p in line if p.mean > 0), default=1.0)
    chart = Chart(
        "Layers run for a token, by what the token is; each completion's first left out",
        Axis.of_names("", names),
        Axis.of_numbers("layers run", 0.0, highest),
        width=640.0,
        height=300.0,
    )
    for group, colour in _colours(study).items():
        for at, point in enumerate(depths[group]):
            if math.isfinite(point.mean):
                told = f"{study.label(group)}, {names[at]}: {point.mean:.2f} layers"
                chart.point(at, point.mean, "circle", colour, told)
        chart.explain(study.label(group), colour, "circle")
    return [chart]


def tokens(study: Study) -> str:
    """Draws the first completion of each setting as an SVG file; returns "" if there is none."""
    first: dict[str, token_strips.Strip] = {}
    for strip in study.strips:
        group = tuple(strip.settings[key] for key in study.settings)
        first.setdefault(study.label(group), strip)
    if not first:
        return ""
    title = "Layers run for each token of the answer"
    prompts = {strip.prompt for strip in first.values()}
    if len(prompts) == 1:
        title += f" to: {' '.join(prompts.pop().split())}"
    return token_strips.draw(title, list(first.items()))


def _over_settings(study: Study, label: str) -> list[OverSeeds]:
    if label not in COLUMNS:
        return [OverSeeds(math.nan, math.nan, math.nan)] * len(study.groups)
    return [study.over_seeds(group, COLUMNS[label].source) for group in study.groups]


def _known(points: Iterable[OverSeeds]) -> bool:
    return any(math.isfinite(point.mean) for point in points)


def _colours(study: Study) -> dict[Group, str]:
    """Returns the style class of each group.

    If only one setting varies, or for many groups, the classes are levels of one colour scale.
    Otherwise they are the unrelated colours of series.
    """
    groups = study.groups
    varying = [values for values in zip(*groups, strict=True) if len(set(values)) > 1]
    if len(varying) == 1 or len(groups) > SERIES:
        return {group: level_class(index, len(groups)) for index, group in enumerate(groups)}
    return {group: f"s{index}" for index, group in enumerate(groups)}


def _file(charts: Sequence[Chart], columns: int) -> str:
    return as_file(charts, columns) if charts else ""


# What NAME-CHART.svg contains, "" for a study without the numbers.
CHARTS = {
    "plane": lambda study: _file(plane(study), 1),
    "cost": lambda *studies: _file(cost(studies), 1),
    "curves": lambda study: _file(curves(study), 2),
    "measures": lambda study: _file(measures(study), 2),
    "classes": lambda study: _file(classes(study), 1),
    "tokens": tokens,
}
JOINT = "cost"  # the chart that can show several studies
