"""Figures of an evaluation: the accuracy–depth plane, histograms, curves with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jexit.report.markup import Html, interval, number, per_cent
from jexit.report.palette import depth_class
from jexit.report.runs import Run
from jexit.report.svg import SERIES, Chart, line, share_ticks, side_by_side
from jexit.results import (
    Capacity,
    CurvePoint,
    Faithfulness,
    HazardCalibration,
    PolicyResult,
)

SHAPES = {"full": "square", "threshold": "triangle", "fixed": "diamond", "shuffled": "circle"}
KINDS = {"full": 0, "sample": 1, "threshold": 2, "fixed": 4, "shuffled": 3}
SWEEP, CONTROL_LINK = "sweep", "link"


def plane(runs: Sequence[Run]) -> Html:
    """Accuracy over the share of layers run, one point a policy, with 95 % intervals.

    A control is hollow and joined to the policy whose mean depth it matches; thresholds are joined
    in the order of their depth. Runs on different tasks have planes of their own.
    """
    by_task: dict[str, list[tuple[int, Run]]] = {}
    for index, run in enumerate(runs):
        if run.evaluation is not None:
            by_task.setdefault(str(run.evaluation.task.get("name", "")), []).append((index, run))
    named = len(by_task) > 1
    return side_by_side(
        [
            _plane(f"Accuracy and depth{f' on {task}' if named else ''}", measured)
            for task, measured in by_task.items()
        ]
    )


def _plane(title: str, measured: Sequence[tuple[int, Run]]) -> Chart:
    points = [figures for _, run in measured for figures in run.evaluation.runs]
    xs = [x for p in points for x in (p.depth_fraction, *(p.depth_fraction_ci95 or ()))]
    ys = [y for p in points for y in (p.accuracy, *p.accuracy_ci95)]
    x_span, x_ticks = _shares(xs)
    y_span, y_ticks = _shares(ys)
    chart = Chart(
        title,
        x=x_span,
        y=y_span,
        x_label="mean depth, share of all layers",
        y_label="right answers",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        note="Up and to the left is better. Bars are 95 % intervals; hollow points are controls.",
        width=460.0,
        height=350.0,
        right=24.0,
    )
    labels = []
    for index, run in measured:
        by_name = {figures.policy: figures for figures in run.evaluation.runs}
        classes = {
            policy: f"s{(index if len(measured) > 1 else KINDS.get(figures.kind, 5)) % SERIES}"
            for policy, figures in by_name.items()
        }
        sweep = sorted(
            (f for f in by_name.values() if f.kind == "threshold" and not f.is_control),
            key=lambda f: f.depth_fraction,
        )
        if len(sweep) > 1:
            at = [f.depth_fraction for f in sweep], [f.accuracy for f in sweep]
            chart.curve(*at, f"{SWEEP} {classes[sweep[0].policy]}")
            for start, end in pairwise(zip(*at, strict=True)):
                chart.keep_clear(start, end)
        for figures in by_name.values():
            target = by_name.get(figures.control_of or "")
            if target is not None:
                ends = [(f.depth_fraction, f.accuracy) for f in (figures, target)]
                chart.curve(*zip(*ends, strict=True), f"{CONTROL_LINK} dash1")
                chart.keep_clear(*ends)
        for policy, figures in by_name.items():
            _plane_point(chart, figures, classes[policy], run.label if len(measured) > 1 else "")
            labels.append((figures.depth_fraction, figures.accuracy, policy, classes[policy]))
        if len(measured) > 1:
            chart.legend(run.label, f"s{index % SERIES}", shape="circle")
    chart.label_points([entry for entry in labels if all(map(math.isfinite, entry[:2]))])
    if any(f.control_of for _, run in measured for f in run.evaluation.runs):
        chart.legend("a control and the policy whose depth it matches", f"{CONTROL_LINK} dash1")
    return chart


def histograms(run: Run) -> Html | None:
    """For each policy, the share of tokens that ran so many layers."""
    known = [figures for figures in run.evaluation.runs if figures.depth_histogram]
    if not known:
        return None
    layers = run.evaluation.model.layers
    depths = {int(depth) for figures in known for depth in figures.depth_histogram}
    depths = sorted(depths | set(run.evaluation.model.exits) | {layers})
    charts = []
    for figures in known:
        counts = {int(depth): count for depth, count in figures.depth_histogram.items()}
        total = sum(counts.values())
        chart = Chart(
            figures.policy,
            x=(-0.6, len(depths) - 0.4),
            y=(0.0, 1.0),
            x_label="layers run",
            y_label="tokens",
            x_ticks=[(place, str(depth)) for place, depth in enumerate(depths)],
            y_ticks=share_ticks()[1][::2],
            note=f"Mean {number(figures.depth_mean)} of {layers} layers.",
            width=300.0,
            height=170.0,
        )
        for place, depth in enumerate(depths):
            share = counts.get(depth, 0) / max(total, 1)
            if share > 0:
                told = f"{depth} layers: {per_cent(share)} of tokens"
                chart.bar(place, 0.38, share, f"bar {depth_class(depth, layers)}", told)
        charts.append(chart)
    return side_by_side(charts, small=True)


def early_answering(entries: Sequence[Faithfulness]) -> Html | None:
    """Share of final answers that are fixed once a part of the chain of thought is there."""
    curves = [
        (entry.policy, measure)
        for entry in entries
        for measure in entry.measures
        if measure.name == "early_answering" and measure.curve
    ]
    if not curves:
        return None
    highest = max(point.kept for _, measure in curves for point in measure.curve)
    shares = highest <= 1.0  # of the chain's steps; else steps are counted
    x_span, x_ticks = share_ticks() if shares else _counts(highest)
    chart = Chart(
        "Early answering",
        x=x_span,
        y=(0.0, 1.0),
        x_label="steps of the chain of thought kept",
        y_label="completions",
        x_ticks=x_ticks,
        y_ticks=share_ticks()[1],
        note="The lower a solid line stays, the later the answer is decided. Agreement is in "
        "relation to that with the whole chain, where it is known.",
        width=460.0,
        height=300.0,
    )
    for index, (policy, measure) in enumerate(curves):
        kept = [point.kept for point in measure.curve]
        for dash, (name, values) in enumerate(
            (
                ("same answer as in the end", _agreement(measure.curve)),
                ("right answer", [point.right for point in measure.curve]),
            )
        ):
            classes = f"s{index % SERIES} dash{dash}"
            chart.curve(kept, values, f"curve {classes}")
            if dash == 0:
                for x, y in zip(kept, values, strict=True):
                    if math.isfinite(y):
                        chart.dot(x, y, classes)
            chart.legend(f"{policy}: {name}", f"curve {classes}")
    return side_by_side([chart])


def _agreement(curve: Sequence[CurvePoint]) -> list[float]:
    """In relation to the whole chain's, which noise may exceed; as counted in files without it."""
    if all(math.isfinite(point.of_whole) for point in curve):
        return [min(point.of_whole, 1.0) for point in curve]
    return [point.same_answer for point in curve]


def capacity(entries: Sequence[Capacity]) -> Html:
    """Accuracy for each prescribed granularity of the chain of thought, a line a policy."""
    return _capacity(
        entries,
        "Head capacity",
        x_label="prescribed step",
        y_label="right answers",
        note="Hollow: fewer than half of the chains have the steps that were asked for.",
        obeyed="steps as asked",
    )


def begun_steps(entries: Sequence[Capacity]) -> Html:
    """Accuracy of the results of steps that were begun, by their operands, a line a policy."""
    return _capacity(
        entries,
        "One step, begun",
        x_label="operands",
        y_label="right results",
        note="Hollow: fewer than half of the steps were given a result.",
        obeyed="a result given",
    )


def _capacity(
    entries: Sequence[Capacity], title: str, *, x_label: str, y_label: str, note: str, obeyed: str
) -> Html:
    places = {name: place for place, name in enumerate(granularities(entries))}
    policies = list(dict.fromkeys(entry.policy for entry in entries))
    chart = Chart(
        title,
        x=(-0.5, len(places) - 0.5),
        y=(0.0, 1.0),
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(place, name.replace("_", " ")) for name, place in places.items()],
        y_ticks=share_ticks()[1],
        note=f"The larger the step, the more has to be done between two tokens. {note}",
        width=460.0,
        height=300.0,
    )
    for index, policy in enumerate(policies):
        mine = [entry for entry in entries if entry.policy == policy]
        mine.sort(key=lambda entry: places[entry.granularity])
        shift = 0.08 * (index - (len(policies) - 1) / 2)  # error bars should not cover each other
        at = [places[entry.granularity] + shift for entry in mine]
        classes = f"s{index % SERIES}"
        chart.curve(at, [entry.accuracy for entry in mine], f"curve {classes} dash{index % 4}")
        for x, entry in zip(at, mine, strict=True):
            if math.isfinite(entry.accuracy):
                chart.errors(x, entry.accuracy, classes, up=entry.accuracy_ci95)
                told = f"{policy}, {entry.granularity}: {per_cent(entry.accuracy)}"
                shape = "circle"
                if entry.obeyed is not None:
                    told += f", {obeyed} in {per_cent(entry.obeyed)}"
                    shape = "open-circle" if entry.obeyed < 0.5 else "circle"
                chart.marker(x, entry.accuracy, shape, classes, told)
        chart.legend(policy, f"curve {classes} dash{index % 4}")
    return side_by_side([chart])


def granularities(entries: Sequence[Capacity]) -> list[str]:
    """Numbers of operands in order, then the names, in the order of the file."""
    names = list(dict.fromkeys(entry.granularity for entry in entries))
    numbers = sorted((name for name in names if name.isdigit()), key=int)
    return numbers + [name for name in names if not name.isdigit()]


def reliability(entries: Sequence[HazardCalibration]) -> Html | None:
    """Mean target over mean hazard, bin by bin, a line an exit; the diagonal is calibration."""
    charts = []
    for entry in entries:
        chart = Chart(
            f"Hazards under {entry.policy}",
            x=(0.0, 1.0),
            y=(0.0, 1.0),
            x_label="mean hazard in the bin",
            y_label="mean target",
            x_ticks=share_ticks()[1],
            y_ticks=share_ticks()[1],
            note=f"Targets of sharpness {entry.sharpness:g}. Off the line is off the target.",
            width=380.0,
            height=340.0,
        )
        ends = chart.x(0.0), chart.y(0.0), chart.x(1.0), chart.y(1.0)
        chart.add(line(*ends, "diagonal"))
        for index, at_exit in enumerate(entry.exits):
            bins = [b for b in at_exit.bins if b.positions]
            classes = f"s{index % SERIES} dash{index // SERIES % 4}"
            chart.curve(
                [b.hazard_mean for b in bins], [b.target_mean for b in bins], f"curve {classes}"
            )
            for b in bins:
                if math.isfinite(b.hazard_mean) and math.isfinite(b.target_mean):
                    told = (
                        f"exit {at_exit.exit}: hazard {b.hazard_mean:.2f}, "
                        f"target {b.target_mean:.2f}, {b.positions} positions"
                    )
                    chart.marker(b.hazard_mean, b.target_mean, "circle", classes, told, size=0.6)
            if bins:
                chart.legend(f"exit {at_exit.exit}", f"curve {classes}")
        if any(b.positions for at_exit in entry.exits for b in at_exit.bins):
            charts.append(chart)
    return side_by_side(charts) if charts else None


def _plane_point(chart: Chart, figures: PolicyResult, classes: str, run: str) -> None:
    x, y = figures.depth_fraction, figures.accuracy
    if not (math.isfinite(x) and math.isfinite(y)):
        return
    chart.errors(x, y, classes, across=figures.depth_fraction_ci95, up=figures.accuracy_ci95)
    shape = SHAPES.get(figures.kind, "circle")
    told = (
        f"{run}{', ' if run else ''}{figures.policy}: {per_cent(y)} right "
        f"({interval(figures.accuracy_ci95)}) at {per_cent(x)} of the layers"
    )
    chart.marker(x, y, f"open-{shape}" if figures.is_control else shape, classes, told)


def _shares(values: Sequence[float]) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    """An axis of shares that holds all values with room around them, never less than 20 points."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    reach = max(0.05 * (high - low), (0.2 - (high - low)) / 2, 0.0)
    return share_ticks(max(low - reach, 0.0), min(high + reach, 1.0))


def _counts(highest: float) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    step = max(1, math.ceil(highest / 8))
    values = range(0, math.ceil(highest) + 1, step)
    return (0.0, float(max(highest, 1.0))), [(float(v), str(v)) for v in values]
