"""Training curves of a run as SVG files, from its `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from jexit.io.files import write_bytes_atomic
from jexit.io.metrics import read_metrics
from jexit.results import LARGEST

BLUE, ORANGE, GREEN = "#1f6fb2", "#d2660a", "#2e8b57"
RED, PURPLE, GREY = "#b8384c", "#7a5ba6", "#5f6b76"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)

# The share of the curve that one point of the running mean averages over.
MEAN_SPAN = 0.05
# Up to here the measured points are few enough to be marked one by one.
MARKED_POINTS = 25

STYLE = {
    "svg.hashsalt": "jexit",  # the same curves give the same file, byte for byte
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#3a444d",
    "axes.edgecolor": "#9aa4ad",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": "#e4e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#3a444d",
    "ytick.color": "#3a444d",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: the metrics on it, each under its label, and how its values read."""

    title: str
    unit: str
    metrics: Mapping[str, str]
    share: bool = False  # values are shares of 1, shown in per cent
    full_scale: bool = False  # the axis goes from 0 to 100 % whatever the values
    colours: Sequence[str] = COLOURS


ACCURACY = Panel(
    title="Accuracy",
    unit="right answers",
    metrics={"accuracy": "accuracy"},
    share=True,
    full_scale=True,
)
DEPTH = Panel(
    title="Depth",
    unit="layers run per token",
    metrics={"depth/fraction": "mean depth"},
    share=True,
    full_scale=True,
    colours=(ORANGE,),
)

LAYERS = Panel(
    title="Layers a problem",
    unit="layers run per completion",
    metrics={"layers/problem": "layers"},
    colours=(ORANGE,),
)

# File name → panels, in the order in which the files are listed.
FIGURES: Mapping[str, Sequence[Panel]] = {
    "training": (ACCURACY, DEPTH, LAYERS),
    "reward": (
        Panel(
            title="Reward",
            unit="reward per completion",
            metrics={"reward/mean": "total", "reward/verifier": "verifier only"},
        ),
    ),
    "loss": (Panel(title="Loss", unit="loss", metrics={"loss": "loss"}, colours=(GREY,)),),
    "kl": (
        Panel(
            title="Distance from the teacher",
            unit="KL (nats per token)",
            metrics={"kl/teacher": "KL to the teacher"},
            colours=(PURPLE,),
        ),
    ),
    "length": (
        Panel(
            title="Completion length",
            unit="tokens",
            metrics={"completion/length": "mean length"},
            colours=(GREEN,),
        ),
        Panel(
            title="Truncated completions",
            unit="completions",
            metrics={"completion/truncated": "truncated"},
            share=True,
            colours=(RED,),
        ),
    ),
    "entropy": (
        Panel(
            title="Entropy of the next token",
            unit="nats",
            metrics={"entropy/tokens": "tokens"},
        ),
        Panel(
            title="Entropy of the depth",
            unit="nats",
            metrics={"entropy/depth": "depth"},
            colours=(ORANGE,),
        ),
    ),
}


def plot_training(workdir: str | os.PathLike[str]) -> list[Path]:
    """Draws every metric of a run to `WORKDIR/plots/*.svg` and returns the files, main one first.

    `training.svg` has accuracy, depth and layers a problem over the steps. Other files group what
    belongs together; metrics that no group knows go to `other.svg`, so nothing that was logged is
    left out. A thin line is what was measured, the thick one a running mean. No metrics, no files.
    """
    workdir = Path(workdir)
    curves = Curves(read_metrics(workdir))
    figures = {}
    with mpl.rc_context(STYLE):
        drawn = {"depth/mean", "depth/p10", "depth/p90"} if "depth/fraction" in curves else set()
        for name, panels in FIGURES.items():
            present = [panel for panel in panels if any(m in curves for m in panel.metrics)]
            if present:
                figures[name] = _stacked(present, curves)
                drawn.update(metric for panel in present for metric in panel.metrics)
        exits = sorted(curves.under("exit/"), key=_layer)
        if len(exits) > 1:
            figures["exits"] = _exit_shares(exits, curves)
            drawn.update(exits)
        parts = [name for name in curves.under("loss/") if name not in drawn]
        if parts:
            figures["loss_parts"] = _grid(parts, curves)
            drawn.update(parts)
        rest = [name for name in curves.names if name not in drawn]
        if rest:
            figures["other"] = _grid(rest, curves)
        return [
            save_figure(figure, workdir / "plots" / f"{name}.svg")
            for name, figure in figures.items()
        ]


class Curves:
    """Steps and values of every metric that has a finite value somewhere, `LARGEST` at most."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        points: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for name, value in record.items():
                entries = enumerate(value) if isinstance(value, list) else [(None, value)]
                for index, entry in entries:
                    key = name if index is None else f"{name}/{index:02}"
                    if name != "step" and isinstance(entry, (int, float)):
                        points.setdefault(key, []).append((record["step"], float(entry)))
        self._points = {
            name: np.array(values)
            for name, values in points.items()
            if any(abs(value) <= LARGEST for _, value in values)
        }
        self.names = sorted(self._points)

    def __contains__(self, name: str) -> bool:
        return name in self._points

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values; one that is not finite, or too large to draw, leaves a gap."""
        steps, values = self._points[name].T
        return steps, np.where(np.abs(values) <= LARGEST, values, np.nan)

    def under(self, prefix: str) -> list[str]:
        return [name for name in self.names if name.startswith(prefix)]


def running_mean(values: np.ndarray, span: int) -> np.ndarray:
    """Mean over a window of `span` points around each point, cut off at the two ends.

    Gaps (NaN) are left out of the mean and stay gaps where nothing is near.
    """
    count = len(values)
    known = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.maximum(np.arange(count) - span // 2, 0)
    last = np.minimum(np.arange(count) + span // 2 + 1, count)
    number = counts[last] - counts[first]
    total = totals[last] - totals[first]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _stacked(panels: Sequence[Panel], curves: Curves) -> Figure:
    figure = Figure(figsize=(7.2, 2.7 * len(panels) + 0.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    all_axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for panel, axes in zip(panels, all_axes, strict=True):
        present = [name for name in panel.metrics if name in curves]
        ends = []
        for name, colour in zip(present, panel.colours, strict=False):
            if name == "depth/fraction":
                _depth_spread(axes, curves, colour)
            ends.append((*_line(axes, *curves[name], colour, panel.metrics[name]), colour))
        _label(axes, panel.title, panel.unit)
        if panel.share:
            _per_cent(axes, panel.full_scale)
        _end_labels(axes, ends, panel.share)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="best")
    all_axes[-1].set_xlabel("training step")
    return figure


def _grid(names: Sequence[str], curves: Curves) -> Figure:
    """Small panels, one a metric, under the metric's own name."""
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(3.3 * columns, 4.2), 1.9 * rows + 0.5), layout="constrained")
    all_axes = np.atleast_2d(figure.subplots(rows, columns, squeeze=False))
    for index, axes in enumerate(all_axes.flat):
        if index >= len(names):
            axes.set_visible(False)
            continue
        name = names[index]
        _line(axes, *curves[name], GREY, name)
        _label(axes, name, "", size=9)
        axes.tick_params(labelsize=8)
        # The first step compiles: its duration must not flatten all the others.
        usual, highest = np.nanquantile(curves[name][1], (0.95, 1.0))
        if 0 < 4 * usual < highest:
            axes.set_ylim(top=1.5 * usual)
        if index + columns >= len(names):
            axes.set_xlabel("training step", fontsize=8)
    return figure


def _exit_shares(names: Sequence[str], curves: Curves) -> Figure:
    """Which share of the tokens ran how many layers, stacked from the shallowest up."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = np.unique(np.concatenate([curves[name][0] for name in names]))
    shares = np.stack([np.interp(steps, *_known(*curves[name])) for name in names])
    shares /= np.maximum(shares.sum(axis=0), 1e-12)
    smooth = np.stack([running_mean(row, _span(len(steps))) for row in shares])
    # Light for shallow, dark for deep: one hue, so that the order can be read off.
    colours = mpl.colormaps["Blues"](np.linspace(0.25, 0.95, len(names)))
    layers = [str(_layer(name)) for name in names]
    bands = axes.stackplot(steps, smooth, colors=colours, linewidth=0)
    _label(axes, "Where tokens leave", "generated tokens")
    _per_cent(axes, full_scale=True)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.set_xlabel("training step")
    axes.legend(
        bands[::-1],
        layers[::-1],
        title="layers run",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title_fontsize=9,
    )
    return figure


def _layer(name: str) -> int:
    """The layer number in `exit/LAYER`."""
    return int(name.removeprefix("exit/"))


def _line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str
) -> tuple[float, float]:
    """The measured values thin and pale, their running mean thick; returns where that one ends."""
    if len(steps) <= MARKED_POINTS:
        mean = values
        axes.plot(steps, values, color=colour, label=label, linewidth=1.8, marker="o", ms=3.5)
    else:
        mean = running_mean(values, _span(len(values)))
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(steps, mean, color=colour, label=label, linewidth=2.0)
    known_steps, known = _known(steps, mean)
    if np.ptp(known) <= 1e-6 * abs(known).max():  # flat: ticks should not magnify rounding
        reach = 0.5 * abs(known[0]) or 1.0
        axes.set_ylim(known[0] - reach, known[0] + reach)
    return known_steps[-1], known[-1]


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str]], share: bool) -> None:
    """Writes the last value of each line at its end, one above the other where they are close."""
    low, high = axes.get_ylim()
    before = -math.inf
    for step, value, colour in sorted(ends, key=lambda end: end[1]):
        height = max(value, before + 0.08 * (high - low))
        axes.annotate(
            f"{100 * value:.0f} %" if share else f"{value:.3g}",
            (step, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            fontsize=9,
            annotation_clip=False,
        )
        before = height


def _depth_spread(axes: Axes, curves: Curves, colour: str) -> None:
    """Shades the middle 80 % of the depths, which are logged in layers, as shares of all layers."""
    if any(name not in curves for name in ("depth/mean", "depth/p10", "depth/p90")):
        return
    steps, fraction = curves["depth/fraction"]
    _, mean = curves["depth/mean"]
    (_, low), (_, high) = curves["depth/p10"], curves["depth/p90"]
    if not len(fraction) == len(mean) == len(low) == len(high):
        return
    layers = np.nanmedian(mean / fraction)
    span = _span(len(steps))
    axes.fill_between(
        steps,
        running_mean(low, span) / layers,
        running_mean(high, span) / layers,
        color=colour,
        alpha=0.14,
        linewidth=0,
        label="middle 80 % of tokens",
    )


def _label(axes: Axes, title: str, unit: str, size: float = 11) -> None:
    axes.set_title(title, fontsize=size)
    axes.set_ylabel(unit)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _per_cent(axes: Axes, full_scale: bool) -> None:
    if full_scale:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


def _span(count: int) -> int:
    return max(3, round(MEAN_SPAN * count))


def _known(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(values)
    return steps[known], values[known]


def save_figure(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": "jexit"})
    write_bytes_atomic(path, buffer.getvalue())
    return path
