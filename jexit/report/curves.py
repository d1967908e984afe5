"""Training curves for the page: one chart a measure, every run on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jexit.report import plots
from jexit.report.markup import Html, tag
from jexit.report.palette import depth_class
from jexit.report.plots import Panel, running_mean
from jexit.report.runs import Run
from jexit.report.svg import (
    SERIES,
    Chart,
    share_ticks,
    side_by_side,
    text_width,
    tick_text,
    ticks,
)

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
    charts += [_exit_shares(run, len(trained) > 1) for _, run in trained]
    charts = [chart for chart in charts if chart is not None]
    drawn = {metric for panel in panels for metric in panel.metrics}
    if any("depth/fraction" in run.curves for _, run in trained):
        drawn.update(ELSEWHERE)
    drawn.update(name for _, run in trained for name in _exits(run))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One metric of one run: what was measured, its running mean, and how it is drawn."""

    run: Run
    name: str
    classes: str
    steps: np.ndarray
    values: np.ndarray
    mean: np.ndarray

    @property
    def end(self) -> float:
        return float(self.mean[np.isfinite(self.mean)][-1])

    @property
    def few(self) -> bool:
        """Whether the points are few enough to be marked one by one, without a mean."""
        return len(self.steps) <= plots.MARKED_POINTS


def _lines(panel: Panel, runs: Sequence[tuple[int, Run]]) -> list[Line]:
    """The lines of a panel; runs differ by colour, the metrics of one run by dash."""
    lines = []
    for index, run in runs:
        for place, name in enumerate(panel.metrics):
            if name in run.curves:
                steps, values = run.curves[name]
                several = len(runs) > 1
                colour, dash = (index % SERIES, place) if several else (place, 0)
                line = Line(
                    run=run,
                    name=name,
                    classes=f"s{colour} dash{dash}",
                    steps=steps,
                    values=values,
                    mean=running_mean(values, max(3, round(plots.MEAN_SPAN * len(values)))),
                )
                lines.append(dataclasses.replace(line, mean=values) if line.few else line)
    return lines


def _panel(panel: Panel, runs: Sequence[tuple[int, Run]], *, small: bool = False) -> Chart | None:
    lines = _lines(panel, runs)
    if not lines:
        return None
    share = panel.share or panel.title in SHARES
    span, y_ticks = _y_axis(panel, share, lines)
    first = min(float(line.steps[0]) for line in lines)
    last = max(float(line.steps[-1]) for line in lines)
    if first == last:
        first, last = first - 0.5, last + 0.5
    x_values = [v for v in ticks(first, last, whole=True)[1] if first <= v <= last]
    ends = [(line.end, _end_text(line.end, share), line.classes) for line in lines]
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
        right=max(text_width(text) for _, text, _ in ends) + 8,
    )
    for line in lines:
        if line.name == "depth/fraction" and len(runs) == 1:
            _depth_band(chart, line)
        _draw(chart, line)
        label = panel.metrics[line.name]
        if len(runs) > 1:
            label = f"{line.run.label}, {label}" if len(panel.metrics) > 1 else line.run.label
        if len(lines) > 1:
            chart.legend(label, f"curve {line.classes}")
    _end_labels(chart, ends)
    return chart


def _exits(run: Run) -> list[str]:
    """The metrics `exit/LAYER` in the order of their layers; none where they make no histogram."""
    names = [name for name in run.curves.under("exit/") if _layer(name).isdecimal()]
    return sorted(names, key=lambda name: int(_layer(name))) if len(names) > 1 else []


def _layer(name: str) -> str:
    return name.removeprefix("exit/")


def _exit_shares(run: Run, several: bool) -> Chart | None:
    """Which share of the tokens ran how many layers, stacked from the shallowest up."""
    names = _exits(run)
    if not names:
        return None
    steps = np.unique(np.concatenate([run.curves[name][0] for name in names]))
    span = max(3, round(plots.MEAN_SPAN * len(steps)))
    rows = []
    for name in names:
        at, values = run.curves[name]
        known = np.isfinite(values)
        rows.append(running_mean(np.interp(steps, at[known], values[known]), span))
    shares = np.stack(rows)
    tops = np.cumsum(shares / np.maximum(shares.sum(axis=0), 1e-12), axis=0)
    first, last = (steps[0] - 0.5, steps[0] + 0.5) if len(steps) == 1 else (steps[0], steps[-1])
    if len(steps) == 1:
        steps, tops = np.array([first, last]), np.repeat(tops, 2, axis=1)
    x_values = [v for v in ticks(first, last, whole=True)[1] if first <= v <= last]
    chart = Chart(
        f"Where tokens leave, {run.label}" if several else "Where tokens leave",
        x=(first, last),
        y=(0.0, 1.0),
        x_label="training step",
        y_label="generated tokens",
        x_ticks=tick_text(x_values) if x_values else [],
        y_ticks=share_ticks()[1],
        note="From the shallowest exit up, by layers run.",
        height=260.0,
    )
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
    below = np.zeros(len(kept))
    layers = run.layers or max(int(_layer(name)) for name in names)
    for name, top in zip(names, tops[:, kept], strict=True):
        classes = f"area {depth_class(int(_layer(name)), layers)}"
        chart.band(steps[kept], below, top, classes)
        chart.legend(_layer(name), classes, shape="square-fill")
        below = top
    return chart


def _y_axis(
    panel: Panel, share: bool, lines: Sequence[Line]
) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    if panel.full_scale:
        return share_ticks()
    values = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    low, high = float(values.min()), float(values.max())
    # The first step compiles: its duration must not flatten all the others.
    usual = float(np.quantile(values, 0.95))
    if 0 < 4 * usual < high:
        high = 1.5 * usual
    if share:
        return share_ticks(0.0, max(high, 0.01))
    span, marks = ticks(low, high, 4)
    return span, tick_text(marks)


def _draw(chart: Chart, line: Line) -> None:
    """The measured values thin, their running mean thick."""
    values, mean = (np.clip(v, *chart.y_range) for v in (line.values, line.mean))
    if line.few:
        chart.curve(line.steps, values, f"curve {line.classes}")
        for step, value in zip(line.steps, values, strict=True):
            if math.isfinite(value):
                chart.dot(step, value, line.classes)
        return
    chart.curve(*thinned(line.steps, values), f"curve measured {line.classes}")
    chart.curve(*thinned(line.steps, mean), f"curve {line.classes}")


def _depth_band(chart: Chart, line: Line) -> None:
    """The middle 80 % of the depths, which are logged in layers, as shares of all layers."""
    run = line.run
    if run.layers is None or any(name not in run.curves for name in ("depth/p10", "depth/p90")):
        return
    steps, low = run.curves["depth/p10"]
    high = run.curves["depth/p90"][1]
    if len(low) != len(high):
        return
    span = max(3, round(plots.MEAN_SPAN * len(steps)))
    low, high = (running_mean(values, span) / run.layers for values in (low, high))
    kept = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
    chart.band(steps[kept], low[kept], high[kept], f"band {line.classes}")
    chart.legend("middle 80 % of tokens", f"band {line.classes}", shape="square-fill")


def _end_text(value: float, share: bool) -> str:
    if share:
        return f"{100 * value:.0f} %"
    mantissa, _, power = f"{value:.3g}".partition("e")
    return f"{mantissa}{f'e{int(power)}' if power else ''}".replace("-", "−")


def _end_labels(chart: Chart, ends: Sequence[tuple[float, str, str]]) -> None:
    """The last value of each line at its end, one above the other where they are close."""
    low, high = chart.y_range
    placed: list[tuple[float, str, str]] = []
    for value, text, classes in sorted(ends, key=lambda end: end[0]):
        at = chart.y(min(max(value, low), high)) + 4
        placed.append((min(at, placed[-1][0] - END_LABEL) if placed else at, text, classes))
    # Many that end near the top would climb over it.
    down = max(chart.top + 4 - placed[-1][0], 0.0)
    for at, text, classes in placed:
        chart.text(chart.right + 5, at + down, text, f"end {classes}")
