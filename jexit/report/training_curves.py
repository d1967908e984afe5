"""Draws training curves for the report and as SVG files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jexit.io.files import write_bytes_atomic
from jexit.report.charts import Axis, Chart, as_file, text_width
from jexit.report.colours import SERIES, depth_class
from jexit.report.rendering import NO_BREAK, per_cent, short_number
from jexit.report.runs import ReportedRun

# The fraction of the curve that one point of the running mean averages over.
MEAN_SPAN = 0.05
# Up to this number, measured points are marked one by one and no running mean is drawn.
MARKED_POINTS = 25
# A line of more points than this is thinned: the page would grow with the length of the run.
POINTS = 400
# Number of intervals of steps whose values the pointer shows, on a full chart and on a small one.
TOLD, TOLD_SMALL = 60, 30
SHARES = ("accuracy", "depth/fraction", "completion/truncated", "groups/zero_std")
# Drawn as a band around the depth, in layers.
DEPTHS = ("depth/mean", "depth/p10", "depth/p90")
MEAN_DEPTH = "mean depth of a token, share of all layers"
OTHER = "other"  # the charts of metrics without a panel


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart of metrics that a training run logs; `metrics` maps their names to labels."""

    title: str
    unit: str
    metrics: Mapping[str, str]
    full_scale: bool = False  # the axis goes from 0 to 100 % whatever the values
    small: bool = False

    @property
    def shares(self) -> bool:
        """Whether the metrics are fractions from 0 to 1, which the chart shows in per cent."""
        return any(metric in SHARES for metric in self.metrics)

    def tells(self, runs: Sequence[ReportedRun]) -> bool:
        """Returns whether any run has informative values of a metric of the panel.

        The loss of reinforcement is not informative, and neither are fractions of truncated
        completions that are all 0.
        """
        curves = [run.curves for run in runs if any(name in run.curves for name in self.metrics)]
        if "loss" in self.metrics:  # the height of a policy gradient's loss means nothing
            return any("loss/policy" not in metrics for metrics in curves)
        if "completion/truncated" in self.metrics:
            return any(np.nanmax(metrics["completion/truncated"][1]) > 0 for metrics in curves)
        return bool(curves)


# Name of the file in plots/ → its panels, in the order of the page.
PANELS: Mapping[str, Sequence[Panel]] = {
    "training": (
        Panel("Accuracy", "correct answers", {"accuracy": "accuracy"}, True),
        Panel("Depth", MEAN_DEPTH, {"depth/fraction": "mean depth"}, True),
        Panel("Layers per problem", "layers run for a completion", {"layers/problem": "layers"}),
    ),
    "reward": (
        Panel(
            "Reward",
            "mean reward of a completion",
            {"reward/mean": "total", "reward/verifier": "verifier only"},
        ),
    ),
    "loss": (Panel("Loss", "loss", {"loss": "loss"}),),
    "kl": (Panel("Distance from the teacher", "KL (nats per token)", {"kl/teacher": "KL to it"}),),
    "length": (
        Panel("Completion length", "tokens", {"completion/length": "mean length"}),
        Panel("Truncated completions", "completions", {"completion/truncated": "truncated"}),
    ),
    "entropy": (
        Panel("Entropy of the next token", "nats", {"entropy/tokens": "tokens"}),
        Panel("Entropy of the depth", "nats", {"entropy/depth": "depth"}),
    ),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """The line of one metric of one run in a chart, with its legend text and style classes."""

    run: ReportedRun
    name: str
    label: str
    classes: str

    @property
    def steps(self) -> np.ndarray:
        return self.run.curves[self.name][0]

    @property
    def values(self) -> np.ndarray:
        return self.run.curves[self.name][1]

    @property
    def mean(self) -> np.ndarray:
        return self.values if self.few else running_mean(self.values)

    @property
    def few(self) -> bool:
        return len(self.steps) <= MARKED_POINTS


def training_charts(runs: Sequence[ReportedRun]) -> dict[str, list[Chart]]:
    """Returns the charts of all metrics of the runs, by the name of their SVG file without suffix.

    A thin line shows the logged values, and a thick line their running mean. Accuracy and depth
    come first. Metrics without an informative panel have a small chart under the name `other`.
    """
    trained = [run for run in runs if run.curves.names]
    charts: dict[str, list[Chart]] = {}
    drawn: set[str] = set()
    for name, panels in PANELS.items():
        telling = [panel for panel in panels if panel.tells(trained)]
        if telling:
            charts[name] = [_chart(panel, trained) for panel in telling]
            drawn.update(metric for panel in telling for metric in panel.metrics)
    if "depth/fraction" in drawn:
        drawn.update(DEPTHS)
    if leaving := [_leaving(run, len(trained) > 1) for run in trained if _exits(run)]:
        charts["exits"] = leaving
        drawn.update(name for run in trained for name in _exits(run))
    rest = sorted({name for run in trained for name in run.curves.names} - drawn)
    if rest:
        charts[OTHER] = [_chart(Panel(n, "", {n: n}, small=True), trained) for n in rest]
    return charts


def write_charts(run: ReportedRun) -> list[Path]:
    """Writes charts of every metric of a run to `WORKDIR/plots/*.svg`, and returns the paths."""
    paths = []
    for name, charts in training_charts([run]).items():
        path = run.workdir / "plots" / f"{name}.svg"
        write_bytes_atomic(path, as_file(charts, columns=3 if name == OTHER else 1).encode())
        paths.append(path)
    return paths


def running_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean of the finite values in a window around each value, or NaN without any.

    `values` and the result are [steps]. The window has about `MEAN_SPAN` (5 %) of all values, and
    at least 3.
    """
    count = len(values)
    span = max(3, round(MEAN_SPAN * count))
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(count) - span // 2, 0)
    last = np.minimum(np.arange(count) + span // 2 + 1, count)
    number = counts[last] - counts[first]
    return np.where(number > 0, (totals[last] - totals[first]) / np.maximum(number, 1), np.nan)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thins a curve to at most `POINTS` points, keeping the extremes of each interval of steps.

    The arrays are [steps]. A curve of at most `POINTS` points stays as it is.
    """
    if len(values) <= POINTS:
        return steps, values
    kept = []
    for stretch in np.array_split(np.arange(len(values)), POINTS // 2):
        known = stretch[np.isfinite(values[stretch])]
        if len(known):
            kept += sorted({known[np.argmin(values[known])], known[np.argmax(values[known])]})
        else:
            kept.append(stretch[0])  # a gap stays a gap
    return steps[kept], values[kept]


def _lines(panel: Panel, runs: Sequence[ReportedRun]) -> list[Line]:
    """Returns the lines of a chart, one line for each run and metric of the panel.

    With several runs, colours distinguish runs and dashes distinguish metrics. With a single run,
    colours distinguish metrics.
    """
    lines = []
    for run in runs:
        for order, (name, label) in enumerate(panel.metrics.items()):
            if name in run.curves:
                colour, dash = (run.place % SERIES, order) if len(runs) > 1 else (order, 0)
                if len(runs) > 1:
                    label = f"{run.label}, {label}" if len(panel.metrics) > 1 else run.label
                lines.append(Line(run, name, label, f"s{colour} dash{dash}"))
    return lines


def _chart(panel: Panel, runs: Sequence[ReportedRun]) -> Chart:
    lines = _lines(panel, runs)
    ends = [(line.mean[np.isfinite(line.mean)][-1], line.classes) for line in lines]
    labels = [
        (end, f"{100 * end:.0f}{NO_BREAK}%" if panel.shares else short_number(end), classes)
        for end, classes in ends
    ]
    chart = Chart(
        panel.title,
        Axis.of_steps(
            "training step",
            min(float(line.steps[0]) for line in lines),
            max(float(line.steps[-1]) for line in lines),
        ),
        _y_axis(panel, np.concatenate([line.values for line in lines])),
        width=300.0 if panel.small else 460.0,
        height=180.0 if panel.small else 260.0,
        right=max(text_width(text) for _, text, _ in labels) + 8,
    )
    for line in lines:
        if line.name == "depth/fraction" and len(runs) == 1:
            _depth_band(chart, line)
        _draw(chart, line)
        if len(lines) > 1 or len(runs) > 1:
            chart.explain(line.label, f"curve {line.classes}")
    chart.label_ends(labels)
    chart.told_at(_told(lines, panel))
    return chart


def _draw(chart: Chart, line: Line) -> None:
    """Draws the values as a thin line (if few, as points) and the running mean as a thick line."""
    values, mean = (np.clip(v, *chart.y_span) for v in (line.values, line.mean))
    if line.few:
        for step, value in zip(line.steps, values, strict=True):
            if math.isfinite(value):
                chart.point(step, value, "circle", line.classes, size=0.5)
    else:
        chart.curve(*thinned(line.steps, values), f"curve measured {line.classes}")
    chart.curve(*thinned(line.steps, mean), f"curve {line.classes}")


def _y_axis(panel: Panel, values: np.ndarray) -> Axis:
    if panel.full_scale:
        return Axis.of_shares(panel.unit)
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    # The first step compiles: its duration must not flatten all the others.
    usual = float(np.quantile(values, 0.95))
    if 0 < 4 * usual < high:
        high = 1.5 * usual
    if panel.shares:
        return Axis.of_shares(panel.unit, 0.0, max(high, 0.01))
    return Axis.of_numbers(panel.unit, low, high, 4)


def _told(lines: Sequence[Line], panel: Panel) -> list[tuple[float, str]]:
    """Returns tooltips (step, text) with each line's value, averaged over an interval of steps."""
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    stretches = np.array_split(steps, min(len(steps), TOLD_SMALL if panel.small else TOLD))
    columns = []
    for stretch in stretches:
        first, last = stretch[0], stretch[-1]
        told = [f"step {first:.0f}" if first == last else f"mean of steps {first:.0f}–{last:.0f}"]
        for line in lines:
            inside = line.values[(line.steps >= first) & (line.steps <= last)]
            inside = inside[np.isfinite(inside)]
            if len(inside):
                value = float(inside.mean())
                text = per_cent(value) if panel.shares else short_number(value, 4)
                told.append(f"{line.label}: {text}")
        columns.append(((first + last) / 2, "\n".join(told)))
    return columns


def _depth_band(chart: Chart, line: Line) -> None:
    """Draws the range that contains the middle 80 % of the depths, as fractions of all layers.

    Draws nothing if the run has not logged this range, or its number of layers is unknown.
    """
    curves, layers = line.run.curves, line.run.layers
    if layers is None or any(name not in curves for name in ("depth/p10", "depth/p90")):
        return
    (steps, low), (_, high) = curves["depth/p10"], curves["depth/p90"]
    if len(low) != len(high):
        return
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
    low, high = (running_mean(values)[kept] / layers for values in (low, high))
    chart.band(steps[kept], low, high, f"band {line.classes}")
    chart.explain("middle 80 % of tokens", f"band {line.classes}", shape="area")


def _exits(run: ReportedRun) -> list[str]:
    names = [n for n in run.curves.names if n.startswith("exit/") and _layer(n).isdecimal()]
    return sorted(names, key=lambda name: int(_layer(name))) if len(names) > 1 else []


def _layer(name: str) -> str:
    return name.removeprefix("exit/")


def _leaving(run: ReportedRun, several: bool) -> Chart:
    """Returns a stacked area chart of the fractions of tokens by layers run, over training steps.

    With `several` runs on the page, the title names the run.
    """
    names = _exits(run)
    steps = np.unique(np.concatenate([run.curves[name][0] for name in names]))
    rows = []
    for name in names:
        at, values = run.curves[name]
        known = np.isfinite(values)
        rows.append(running_mean(np.interp(steps, at[known], values[known])))
    shares = np.stack(rows)
    shares = shares / np.maximum(shares.sum(axis=0), 1e-12)
    chart = Chart(
        f"Where tokens leave, {run.label}" if several else "Where tokens leave",
        Axis.of_steps("training step", steps[0], steps[-1]),
        Axis.of_shares("generated tokens"),
        note="Shares of tokens by layers run, stacked from the shallowest exit up.",
        height=260.0,
    )
    if len(steps) == 1:
        steps, shares = np.array(chart.x_span), np.repeat(shares, 2, axis=1)
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
    steps, tops = steps[kept], np.cumsum(shares, axis=0)[:, kept]
    layers = run.layers or max(int(_layer(name)) for name in names)
    below = np.zeros(len(steps))
    for name, top in zip(names, tops, strict=True):
        classes = f"area {depth_class(int(_layer(name)), layers)}"
        chart.band(steps, below, top, classes)
        chart.explain(_layer(name), classes, shape="area")
        below = top
    places = np.unique(np.linspace(0, len(kept) - 1, TOLD).astype(int))
    told = [(steps[at], _told_shares(names, steps[at], shares[:, kept[at]])) for at in places]
    chart.told_at(told)
    return chart


def _told_shares(names: Sequence[str], step: float, shares: np.ndarray) -> str:
    lines = (f"{_layer(n)} layers: {per_cent(s)}" for n, s in zip(names, shares, strict=True))
    return "\n".join([f"step {step:.0f}", *lines])
