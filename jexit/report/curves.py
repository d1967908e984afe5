"""Training curves for the page: one chart a measure, every run on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jexit.report import plots
from jexit.report.markup import Html, tag
from jexit.report.plots import Panel, running_mean
from jexit.report.runs import Run
from jexit.report.svg import Chart, share_ticks, side_by_side, tick_text, ticks

# A line of more points than this is thinned: the page would grow with the length of the run.
POINTS = 400
SHARES = ("accuracy", "depth/fraction", "completion/truncated", "groups/zero_std")
END_LABEL = 13.0  # the height that the label of a line's last value takes
# Drawn as a band around the depth or as a histogram, in layers, and told elsewhere.
ELSEWHERE = ("depth/mean", "depth/p10", "depth/p90")


def training_figures(runs: Sequence[Run]) -> Html | None:
    """Accuracy and depth first, then what belongs to them; every other metric folded away."""
    trained = [(index, run) for index, run in enumerate(runs) if run.curves.names]
    if not trained:
        return None
    panels = [panel for group in plots.FIGURES.values() for panel in group]
    charts = [_panel(panel, trained) for panel in panels]
    charts = [chart for chart in charts if chart is not None]
    drawn = {metric for panel in panels for metric in panel.metrics}
    if any("depth/fraction" in run.curves for _, run in trained):
        drawn.update(ELSEWHERE)
    names = sorted({name for _, run in trained for name in run.curves.names} - drawn)
    rest = [_panel(Panel(title=n, unit="", metrics={n: n}), trained, small=True) for n in names]
    rest = [chart for chart in rest if chart is not None]
    folded = None
    if rest:
        summary = tag("summary", f"All other metrics ({len(rest)})")
        folded = tag("details", summary, side_by_side(rest, small=True))
    return tag("div", side_by_side(charts) if charts else None, folded)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `POINTS` points that keep the highest and the lowest value of every stretch."""
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


def _panel(panel: Panel, runs: Sequence[tuple[int, Run]], *, small: bool = False) -> Chart | None:
    """One chart; runs differ by colour, the metrics of one panel by dash."""
    lines = [
        (index, run, dash, name)
        for index, run in runs
        for dash, name in enumerate(panel.metrics)
        if name in run.curves
    ]
    if not lines:
        return None
    share = panel.share or panel.title in SHARES
    span, y_ticks = _y_axis(panel, share, [run.curves[name] for _, run, _, name in lines])
    last = max(float(run.curves[name][0][-1]) for _, run, _, name in lines)
    first = min(float(run.curves[name][0][0]) for _, run, _, name in lines)
    if first == last:
        first, last = first - 0.5, last + 0.5
    x_values = [v for v in ticks(first, last, whole=True)[1] if first <= v <= last]
    chart = Chart(
        panel.title,
        x=(first, last),
        y=span,
        x_label="training step",
        y_label=panel.unit,
        x_ticks=tick_text(x_values) if x_values else [],
        y_ticks=y_ticks,
        width=300.0 if small else 460.0,
        height=180.0 if small else 260.0,
        right=48.0,
    )
    ends = []
    for index, run, dash, name in lines:
        colour = index if len(runs) > 1 else dash
        classes = f"s{colour % 8} dash{dash if len(runs) > 1 else 0}"
        if name == "depth/fraction" and len(runs) == 1:
            _depth_band(chart, run, classes)
        ends.append((*_line(chart, *run.curves[name], classes), classes))
        label = panel.metrics[name]
        if len(runs) > 1:
            label = f"{run.label}, {label}" if len(panel.metrics) > 1 else run.label
        if len(lines) > 1:
            chart.legend(label, f"curve {classes}")
    _end_labels(chart, ends, share)
    return chart


def _y_axis(
    panel: Panel, share: bool, curves: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    if panel.full_scale:
        return share_ticks()
    values = np.concatenate([values[np.isfinite(values)] for _, values in curves])
    low, high = float(values.min()), float(values.max())
    # The first step compiles: its duration must not flatten all the others.
    usual = float(np.quantile(values, 0.95))
    if 0 < 4 * usual < high:
        high = 1.5 * usual
    if share:
        return share_ticks(0.0, max(high, 0.01))
    span, marks = ticks(low, high, 4)
    return span, tick_text(marks)


def _line(chart: Chart, steps: np.ndarray, values: np.ndarray, classes: str) -> tuple[float, float]:
    """The measured values thin, their running mean thick; returns where that one ends."""
    low, high = chart.y_range
    if len(steps) <= plots.MARKED_POINTS:
        mean = values
        chart.curve(steps, np.clip(mean, low, high), f"curve {classes}")
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                chart.dot(step, min(max(value, low), high), classes)
    else:
        mean = running_mean(values, max(3, round(plots.MEAN_SPAN * len(values))))
        for shown, class_ in ((values, "curve measured"), (mean, "curve")):
            at, kept = thinned(steps, np.clip(shown, low, high))
            chart.curve(at, kept, f"{class_} {classes}")
    known = np.isfinite(mean)
    return float(steps[known][-1]), float(mean[known][-1])


def _depth_band(chart: Chart, run: Run, classes: str) -> None:
    """The middle 80 % of the depths, which are logged in layers, as shares of all layers."""
    if run.layers is None or any(name not in run.curves for name in ("depth/p10", "depth/p90")):
        return
    steps, low = run.curves["depth/p10"]
    high = run.curves["depth/p90"][1]
    if len(low) != len(high):
        return
    span = max(3, round(plots.MEAN_SPAN * len(steps)))
    low, high = (running_mean(values, span) / run.layers for values in (low, high))
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
    chart.band(steps[kept], low[kept], high[kept], f"band {classes}")
    chart.legend("middle 80 % of tokens", f"band {classes}", shape="square-fill")


def _end_labels(chart: Chart, ends: Sequence[tuple[float, float, str]], share: bool) -> None:
    """The last value of each line at its end, one above the other where they are close."""
    low, high = chart.y_range
    placed: list[tuple[float, str, str]] = []
    for _, value, classes in sorted(ends, key=lambda end: end[1]):
        at = chart.y(min(max(value, low), high)) + 4
        at = min(at, placed[-1][0] - END_LABEL) if placed else at
        text = f"{100 * value:.0f} %" if share else f"{value:.3g}".replace("-", "−")
        placed.append((at, text, classes))
    # Many that end near the top would climb over it.
    down = max(chart.top + 4 - placed[-1][0], 0.0)
    for at, text, classes in placed:
        chart.text(chart.right + 5, at + down, text, f"end {classes}")
