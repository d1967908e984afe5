"""Draws the charts of an evaluation, such as accuracy over depth and histograms of depths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jexit.report.charts import Axis, Chart
from jexit.report.colours import SERIES, depth_class
from jexit.report.rendering import interval, number, per_cent
from jexit.report.runs import ReportedRun
from jexit.report.training_curves import MEAN_DEPTH
from jexit.results import (
    Capacity,
    CurvePoint,
    Faithfulness,
    HazardCalibration,
    PolicyResult,
)

SHAPES = {"full": "square", "threshold": "triangle", "fixed": "diamond", "shuffled": "circle"}
KINDS = {"full": 0, "sample": 1, "threshold": 2, "fixed": 4, "shuffled": 3}
CONTROL = "link dash1"


def accuracy_over_depth(runs: Sequence[ReportedRun]) -> list[Chart]:
    """Returns charts of accuracy over the fraction of layers run, one chart per task.

    Each policy is a point with 95 % intervals. A control is a hollow point, joined by a line to the
    policy whose mean depth it matches. Another line joins a run's threshold policies, by depth.
    """
    by_task: dict[str, list[ReportedRun]] = {}
    for run in runs:
        if run.evaluation is not None:
            by_task.setdefault(str(run.evaluation.task.get("name", "")), []).append(run)
    return [
        _accuracy_over_depth(
            f"Accuracy and depth{f' on {task}' if len(by_task) > 1 else ''}", measured
        )
        for task, measured in by_task.items()
    ]


def _accuracy_over_depth(title: str, measured: Sequence[ReportedRun]) -> Chart:
    points = [result for run in measured for result in run.evaluation.runs]
    depths = [x for p in points for x in (p.depth_fraction, *(p.depth_fraction_ci95 or ()))]
    accuracies = [y for p in points for y in (p.accuracy, *p.accuracy_ci95)]
    chart = Chart(
        title,
        Axis.around_shares(MEAN_DEPTH, depths),
        Axis.around_shares("correct answers", accuracies),
        note="Up and to the left is better. Bars are 95 % intervals; hollow points are controls.",
        height=350.0,
        right=24.0,
    )
    several = len(measured) > 1
    labels = []
    for run in measured:
        results = {result.policy: result for result in run.evaluation.runs}
        classes = {
            policy: f"s{(run.place if several else KINDS.get(result.kind, 5)) % SERIES}"
            for policy, result in results.items()
        }
        sweep = [r for r in results.values() if r.kind == "threshold" and not r.is_control]
        if len(sweep) > 1:
            ordered = sorted(sweep, key=lambda result: result.depth_fraction)
            _join(chart, ordered, f"sweep {classes[sweep[0].policy]}")
        for result in results.values():
            if target := results.get(result.control_of or ""):
                _join(chart, (result, target), CONTROL)
        for policy, result in results.items():
            _point(chart, result, classes[policy], run.label if several else "")
            # The label of a threshold is its number alone, so that it stays near its point.
            name = policy.removeprefix("threshold:")
            labels.append((result.depth_fraction, result.accuracy, name, classes[policy]))
        if several:
            chart.explain(run.label, f"s{run.place % SERIES}", shape="circle")
    chart.label_points(labels)
    if any(result.kind == "threshold" for result in points):
        colour = "s5" if several else f"s{KINDS['threshold']}"
        chart.explain("leaves at a hazard above this number", colour, shape="triangle")
    if any(result.control_of for result in points):
        chart.explain("a control and the policy whose depth it matches", CONTROL)
    return chart


def _join(chart: Chart, results: Sequence[PolicyResult], classes: str) -> None:
    """Draws a line through the points of the results; labels that are placed later avoid it."""
    places = [(result.depth_fraction, result.accuracy) for result in results]
    chart.curve(*zip(*places, strict=True), classes)
    for start, end in pairwise(places):
        chart.keep_clear(start, end)


def _point(chart: Chart, result: PolicyResult, classes: str, run: str) -> None:
    x, y = result.depth_fraction, result.accuracy
    if result.depth_fraction_ci95 is not None:
        chart.across(result.depth_fraction_ci95, y, classes)
    chart.upright(x, result.accuracy_ci95, classes)
    told = (
        f"{run}{', ' if run else ''}{result.policy}: {per_cent(y)} correct "
        f"({interval(result.accuracy_ci95)}) at {per_cent(x)} of the layers"
    )
    chart.point(x, y, policy_marker(result.policy, result.is_control), classes, told)


def policy_marker(policy: str, is_control: bool) -> str:
    """Returns the shape of a policy's marker, which is hollow for a control."""
    shape = SHAPES.get(policy.partition(":")[0], "circle")
    return f"open-{shape}" if is_control else shape


def histograms(run: ReportedRun) -> list[Chart]:
    """Returns a histogram for each policy: the fraction of tokens over the number of layers run."""
    known = [result for result in run.evaluation.runs if result.depth_histogram]
    layers = run.evaluation.model.layers
    depths = {int(depth) for result in known for depth in result.depth_histogram}
    depths = sorted(depths | set(run.evaluation.model.exits) | {layers})
    charts = []
    for result in known:
        counts = {int(depth): count for depth, count in result.depth_histogram.items()}
        total = sum(counts.values())
        chart = Chart(
            result.policy,
            Axis("layers run", (-0.6, len(depths) - 0.4), [*enumerate(map(str, depths))]),
            Axis("tokens", (0.0, 1.0), Axis.of_shares("").ticks[::2]),
            note=f"Mean {number(result.depth_mean)} of {layers} layers.",
            width=300.0,
            height=170.0,
        )
        for place, depth in enumerate(depths):
            share = counts.get(depth, 0) / max(total, 1)
            if share > 0:
                told = f"{depth} layers: {per_cent(share)} of tokens"
                chart.bar(place, 0.38, share, f"bar {depth_class(depth, layers)}", told)
        charts.append(chart)
    return charts


def early_answering(entries: Sequence[Faithfulness]) -> Chart | None:
    """Returns a chart of the answers forced after part of the chain of thought.

    Over the fraction of steps kept, lines show the fraction of answers that equal the final answer,
    and the fraction of correct answers. Returns None if no entry contains the measure
    `early_answering`.
    """
    curves = [
        (entry.policy, measure.curve)
        for entry in entries
        for measure in entry.measures
        if measure.name == "early_answering" and measure.curve
    ]
    if not curves:
        return None
    chart = Chart(
        "Early answering",
        Axis.of_shares("steps of the chain of thought kept"),
        Axis.of_shares("completions"),
        note="The lower a solid line stays, the later the answer is decided. Agreement is divided "
        "by the agreement with the whole chain, if this is known.",
        height=300.0,
    )
    for index, (policy, curve) in enumerate(curves):
        for dash, (name, values) in enumerate(
            (
                ("same answer as in the end", _agreement(curve)),
                ("correct answer", [point.right for point in curve]),
            )
        ):
            classes = f"s{index % SERIES} dash{dash}"
            chart.curve([point.kept for point in curve], values, f"curve {classes}")
            chart.explain(f"{policy}: {name}", f"curve {classes}")
            for point, value in zip(curve, values, strict=True):
                if math.isfinite(value):
                    kept = f"{policy}, {per_cent(point.kept, 0)} of the steps kept"
                    told = f"{kept}: {name} in {per_cent(value)}"
                    chart.point(point.kept, value, "circle", f"s{index % SERIES}", told, 0.6)
    return chart


def _agreement(curve: Sequence[CurvePoint]) -> list[float]:
    """Returns at each point the fraction of answers that equal the whole completion's answer.

    It is divided by the fraction after the whole chain, if this quotient is known at all points,
    and is at most 1.
    """
    if all(math.isfinite(point.of_whole) for point in curve):
        return [min(point.of_whole, 1.0) for point in curve]
    return [point.same_answer for point in curve]


def prescribed_steps(entries: Sequence[Capacity]) -> Chart:
    """Returns a chart of accuracy over the step size that the prompt prescribes."""
    return _over_steps(
        entries,
        "Head capacity",
        "prescribed step",
        "correct answers",
        note="Hollow: fewer than half of the chains have the prescribed steps.",
        obeyed="steps as asked",
    )


def begun_steps(entries: Sequence[Capacity]) -> Chart:
    """Returns a chart of accuracy over the size of the first step, which a forced prefix fixes."""
    return _over_steps(
        entries,
        "One step, begun",
        "operands",
        "correct results",
        note="Hollow: the model wrote a result for fewer than half of the steps.",
        obeyed="a result given",
    )


def _over_steps(
    entries: Sequence[Capacity], title: str, x_label: str, y_label: str, *, note: str, obeyed: str
) -> Chart:
    places = {name: place for place, name in enumerate(granularities(entries))}
    policies = list(dict.fromkeys(entry.policy for entry in entries))
    chart = Chart(
        title,
        Axis.of_names(x_label, [name.replace("_", " ") for name in places]),
        Axis.of_shares(y_label),
        note=f"A larger step needs more computation between two tokens. {note}",
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
            if entry.accuracy_ci95 is not None:
                chart.upright(x, entry.accuracy_ci95, classes)
            told = f"{policy}, {entry.granularity}: {per_cent(entry.accuracy)}"
            hollow = entry.obeyed is not None and entry.obeyed < 0.5
            if entry.obeyed is not None:
                told += f", {obeyed} in {per_cent(entry.obeyed)}"
            chart.point(x, entry.accuracy, "open-circle" if hollow else "circle", classes, told)
        chart.explain(policy, f"curve {classes} dash{index % 4}")
    return chart


def granularities(entries: Sequence[Capacity]) -> list[str]:
    """Returns the distinct step sizes of the entries: numbers in ascending order, then names."""
    names = list(dict.fromkeys(entry.granularity for entry in entries))
    numbers = sorted((name for name in names if name.isdigit()), key=lambda n: (len(n), n))
    return numbers + [name for name in names if not name.isdigit()]


def reliability(entries: Sequence[HazardCalibration]) -> list[Chart]:
    """Returns reliability diagrams of hazards, one for each entry (policy).

    A line per exit shows the mean target hazard over the mean hazard of each bin.
    """
    charts = []
    for entry in entries:
        chart = Chart(
            f"Hazards under {entry.policy}",
            Axis.of_shares("mean hazard in the bin"),
            Axis.of_shares("mean target"),
            note=f"Targets have sharpness {entry.sharpness:g}. On the diagonal, the mean hazard "
            "equals the mean target, unless the heads were trained by what leaving costs.",
            width=380.0,
            height=340.0,
        )
        chart.curve((0.0, 1.0), (0.0, 1.0), "diagonal")
        for index, at_exit in enumerate(entry.exits):
            bins, classes = at_exit.bins, f"s{index % SERIES} dash{index // SERIES % 4}"
            means = [b.hazard_mean for b in bins], [b.target_mean for b in bins]
            chart.curve(*means, f"curve {classes}")
            for b in bins:
                told = (
                    f"exit {at_exit.exit}: hazard {b.hazard_mean:.2f}, "
                    f"target {b.target_mean:.2f}, {b.positions} positions"
                )
                chart.point(b.hazard_mean, b.target_mean, "circle", classes, told, 0.6)
            chart.explain(f"exit {at_exit.exit}", f"curve {classes}")
        charts.append(chart)
    return charts
