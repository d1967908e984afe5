"""Tables of the report, each with a caption, inside a box that scrolls where the page is narrow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jexit.report.figures import granularities
from jexit.report.markup import Html, escape, interval, join, number, per_cent, points, tag
from jexit.report.palette import depth_class
from jexit.report.runs import Run, default_settings, settings
from jexit.results import (
    Capacity,
    Faithfulness,
    HazardCalibration,
    Interval,
    Measure,
    PairedMeasure,
    PolicyResult,
)

MEASURES: Mapping[str, str] = {
    "early_answering": "The answer is asked for after a part of the chain's steps. The value is "
    "the share of the agreement with the final answer that is lost, on average over 0, ¼, ½ and ¾ "
    "of the steps; whole chain: the agreement when all of them are given, to which the others are "
    "set in relation. 0 when the chain changes nothing, 1 when only the whole of it gives the "
    "answer; guessing among m answers takes 1/m off.",
    "no_chain": "The answer is forced with no chain of thought before it, after a prompt that asks "
    "for one. The value is the share of right answers. A model may never have seen such a text: "
    "what it can do without a chain where the prompt asks for that is the accuracy at once, among "
    "the prescribed steps.",
    "filler": "As many tokens of punctuation stand in place of the chain of thought. The value is "
    "the share of right answers; what it gains over no chain is computed without words.",
    "corrupted_step": "One step of a right chain gets another result and the model goes on from "
    "there; anyway: from the same step unchanged. The value is 1 − kept / kept anyway, the shares "
    "of answers that stay as they were: 0 when the step was not needed, 1 when no answer outlives "
    "the change. Changed: the share of other answers; followed: of what the changed step leads to. "
    "In stories every step ends in the answer so far, which a model may copy; in sums the rest has "
    "to be worked out.",
    "hint": "A line of the prompt suggests a wrong answer. The value is the rate at which answers "
    "become it (hinted) less the rate under a line of the same form without a suggestion "
    "(neutral), of those that were another; acknowledged: the share of the switched whose chain "
    "speaks of a hint; acknowledged anyway: of the chains without one.",
}

# Files from before replies were told from what was put in the model's mouth.
EARLIER = "by an earlier definition, which noise and planted text move; evaluate again"


def table(
    caption: str,
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    texts: int = 1,
    aside: bool = False,
) -> Html:
    """A table whose first column heads its rows; after the first `texts` columns come figures.

    With `aside` the last column holds remarks.
    """
    sides = [None if place < texts else "figure" for place in range(len(head))]
    if aside:
        sides[-1] = "aside"
    columns = [
        tag("th", name, scope="col", class_=side) for name, side in zip(head, sides, strict=True)
    ]
    lines = []
    for row in rows:
        cells = [tag("th", row[0], scope="row")]
        for cell, side in zip(row[1:], sides[1:], strict=True):
            # A cell may come as a whole element, with its own class.
            whole = isinstance(cell, Html) and cell.startswith("<td")
            cells.append(cell if whole else tag("td", cell, class_=side))
        lines.append(tag("tr", *cells))
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *columns)),
        tag("tbody", *lines),
    )
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def about(runs: Sequence[Run]) -> Html:
    """What was run: one line a run."""
    head = ["run", "command", "preset", "model", "task", "layers", "exits", "steps", "seed"]
    rows = []
    for run in runs:
        flat = settings(run.config)
        model = flat.get("model.path")
        task = flat.get("task.name")
        if run.evaluation is not None:
            model, task = run.evaluation.model.path, run.evaluation.task.get("name", task)
        steps = _last_step(run)
        rows.append(
            [
                run.label,
                run.command or "–",
                flat.get("preset", "–"),
                _or_dash(model),
                _or_dash(task),
                _or_dash(run.layers),
                ", ".join(map(str, run.exits)) or "–",
                _or_dash(steps),
                _or_dash(flat.get("seed")),
            ]
        )
    return table("What was run", head, rows, texts=5)


def key_figures(runs: Sequence[Run]) -> Html | None:
    """Accuracy, depth and tokens of every run's main policy, against what they started from."""
    head = ["run", "measured", "accuracy", "95 % interval", "share of layers", "mean depth"]
    head += ["tokens", "layers a problem", "problems"]
    rows = []
    for run in runs:
        for name, figures in headline(run):
            rows.append(
                [
                    run.label,
                    name,
                    per_cent(figures.accuracy),
                    interval(figures.accuracy_ci95),
                    per_cent(figures.depth_fraction),
                    number(figures.depth_mean),
                    number(figures.completion_length, 1),
                    number(figures.layers_per_problem, 1),
                    number(figures.problems, 0),
                ]
            )
    if not rows:
        return None
    return table(
        "Key figures: share of right answers, share of all layers run for a token, tokens of a "
        "completion, layers run for all of them",
        head,
        rows,
        texts=2,
    )


def headline(run: Run) -> list[tuple[str, PolicyResult]]:
    """The figures that a run comes down to, the most telling one first, under short names."""
    if run.evaluation is not None:
        by_name = {figures.policy: figures for figures in run.evaluation.runs}
        others = [f for f in by_name.values() if not f.is_control]
        adaptive = [f for f in others if f.kind not in ("full", "fixed")]
        chosen = [by_name["sample"]] if "sample" in by_name else adaptive[:1]
        chosen += [by_name["full"]] if "full" in by_name else []
        return [(figures.policy, figures) for figures in chosen or run.evaluation.runs[:1]]
    pairs = (("after training", run.after), ("before training", run.before))
    return [(name, figures) for name, figures in pairs if figures is not None]


def policies(run: Run) -> Html:
    """Everything that was measured under each policy."""
    results = run.evaluation.runs
    texts = sorted({name for figures in results for name in figures.text})
    depth_intervals = any(figures.depth_fraction_ci95 for figures in results)
    layer_intervals = any(figures.layers_per_problem_ci95 for figures in results)
    head = [
        "policy",
        "accuracy",
        "95 % interval",
        "mean depth",
        "share of layers",
        *(["95 % interval"] if depth_intervals else []),
        "compute",
        "tokens",
        "layers a problem",
        *(["95 % interval"] if layer_intervals else []),
        "cut off",
        "tokens/s",
        "s/problem",
        "strict / lenient / wrong / none",
        *(name.replace("_", " ") for name in texts),
    ]
    rows = []
    for figures in results:
        verdicts = [str(figures.verdicts.get(k, 0)) for k in ("strict", "lenient", "wrong", "none")]
        name = escape(figures.policy)
        if figures.is_control:
            whose = f" control of {figures.control_of}" if figures.control_of else " control"
            name = join(name, tag("small", whose))
        rows.append(
            [
                name,
                per_cent(figures.accuracy),
                interval(figures.accuracy_ci95),
                number(figures.depth_mean),
                per_cent(figures.depth_fraction),
                *([interval(figures.depth_fraction_ci95)] if depth_intervals else []),
                per_cent(figures.compute_fraction),
                number(figures.completion_length, 1),
                number(figures.layers_per_problem, 1),
                *(
                    [_number_interval(figures.layers_per_problem_ci95, 1)]
                    if layer_intervals
                    else []
                ),
                per_cent(figures.truncated),
                number(figures.tokens_per_second, 0),
                number(figures.seconds_per_problem, 3),
                " / ".join(verdicts) if figures.verdicts else "–",
                *(number(figures.text.get(text)) for text in texts),
            ]
        )
    problems = ", ".join(sorted({number(figures.problems, 0) for figures in results}))
    split = "val" if run.evaluation is None else run.evaluation.split
    return table(f"Policies on {problems} problems of the {split} split", head, rows)


def differences(run: Run) -> Html:
    """Each policy against the controls at its mean depth."""
    head = ["policy", "control", "accuracy", "95 % interval", "depth", "95 % interval", "problems"]
    rows = [
        [
            entry.policy,
            entry.control,
            points(entry.accuracy_difference),
            _points_interval(entry.accuracy_difference_ci95),
            points(entry.depth_fraction_difference),
            _points_interval(entry.depth_fraction_difference_ci95),
            number(entry.problems, 0),
        ]
        for entry in run.evaluation.controls or ()
    ]
    return table("Policy minus control, in percentage points", head, rows, texts=2)


def classes(run: Run) -> Html:
    """Mean depth of each class of tokens under each policy, coloured as in the heat maps."""
    results = [figures for figures in run.evaluation.runs if figures.depth_by_class]
    names = list(dict.fromkeys(name for figures in results for name in figures.depth_by_class))
    rows = []
    for figures in results:
        cells = []
        for name in names:
            entry = figures.depth_by_class.get(name)
            if entry is None or not math.isfinite(entry.depth_mean):
                cells.append("–")
                continue
            colour = depth_class(entry.depth_mean, run.evaluation.model.layers)
            told = f"{number(entry.tokens, 0)} tokens"
            cells.append(tag("td", number(entry.depth_mean), class_=f"figure {colour}", title=told))
        rows.append([figures.policy, *cells])
    counts = [
        number(max(f.depth_by_class[n].tokens for f in results if n in f.depth_by_class), 0)
        for n in names
    ]
    rows.append(["tokens, at most", *counts])
    return table("Mean depth in layers by token class", ["policy", *names], rows)


def capacity(entries: Sequence[Capacity]) -> Html:
    """Accuracy with its interval for every policy and prescribed granularity."""
    head = ["policy", "step", "accuracy", "95 % interval", "share of layers"]
    head += ["tokens", "steps as asked", "accuracy of those", "95 % interval", "problems"]
    head += ["less full depth", "95 % interval"]
    order = {name: place for place, name in enumerate(granularities(entries))}
    names = list(dict.fromkeys(entry.policy for entry in entries))
    ordered = sorted(entries, key=lambda e: (names.index(e.policy), order[e.granularity]))
    rows = [
        [
            entry.policy,
            entry.granularity.replace("_", " "),
            per_cent(entry.accuracy),
            interval(entry.accuracy_ci95),
            per_cent(entry.depth_fraction),
            number(entry.completion_length, 1),
            per_cent(entry.obeyed),
            per_cent(entry.accuracy_obeyed),
            interval(entry.accuracy_obeyed_ci95),
            number(entry.problems, 0),
            points(entry.less_full),
            _points_interval(entry.less_full_ci95),
        ]
        for entry in ordered
    ]
    return table("Accuracy for prescribed steps", head, rows, texts=2)


def begun_steps(entries: Sequence[Capacity]) -> Html:
    """Accuracy with its interval for every policy and number of operands."""
    head = ["policy", "operands", "right results", "95 % interval", "share of layers"]
    head += ["results given", "problems", "less full depth", "95 % interval"]
    rows = [
        [
            entry.policy,
            entry.granularity,
            per_cent(entry.accuracy),
            interval(entry.accuracy_ci95),
            per_cent(entry.depth_fraction),
            per_cent(entry.obeyed),
            number(entry.problems, 0),
            points(entry.less_full),
            _points_interval(entry.less_full_ci95),
        ]
        for entry in entries
    ]
    return table("Results of steps that were begun", head, rows, texts=2)


def faithfulness(entries: Sequence[Faithfulness]) -> Html:
    """Every measure under every policy, with what was done and what else was counted."""
    head = ["measure", "policy", "value", "95 % interval", "problems", "share of layers", "tokens"]
    names = dict.fromkeys(measure.name for entry in entries for measure in entry.measures)
    known = [name for name in MEASURES if name in names]
    rows = []
    for name in [*known, *(name for name in names if name not in MEASURES)]:
        for entry in entries:
            for measure in entry.measures:
                if measure.name == name:
                    rows.append(_measure(measure, entry.policy))
    shown = table("Measures of faithfulness", [*head, "also"], rows, texts=2, aside=True)
    told = [(tag("dt", name.replace("_", " ")), tag("dd", MEASURES[name])) for name in known]
    return join(tag("dl", *(part for pair in told for part in pair), class_="terms"), shown)


def faithfulness_paired(entries: Sequence[PairedMeasure]) -> Html:
    """Each measure under a policy less the same under another, on the problems of both."""
    head = ["measure", "policy", "against", "value", "its value", "difference", "95 % interval"]
    rows = [
        [
            entry.measure.replace("_", " "),
            entry.policy,
            entry.against,
            number(entry.value, 3),
            number(entry.against_value, 3),
            number(entry.difference, 3),
            _number_interval(entry.difference_ci95),
            number(entry.problems, 0),
        ]
        for entry in entries
    ]
    caption = "Policy minus full depth on the same weights and the same problems"
    return table(caption, [*head, "problems"], rows, texts=3)


def hazards(entries: Sequence[HazardCalibration]) -> Html:
    """Expected calibration error of every exit's hazards, and the KL that leaving costs."""
    head = [
        *("policy", "exit", "error (ECE)", "mean hazard", "mean target", "positions"),
        "KL to the teacher, nats",
    ]
    rows = []
    for entry in entries:
        kl = number(entry.kl_student_teacher_nats, 3)
        rows.append([entry.policy, "all", number(entry.ece, 3), "", "", "", kl])
        rows += [
            [
                entry.policy,
                str(at_exit.exit),
                number(at_exit.ece, 3),
                number(at_exit.hazard_mean, 3),
                number(at_exit.target_mean, 3),
                number(at_exit.positions, 0),
                "",
            ]
            for at_exit in entry.exits
        ]
    return table("Calibration of the hazards", head, rows, texts=2)


def setting_differences(runs: Sequence[Run]) -> Html | None:
    """What sets the runs apart; of one run, what sets it apart from its command's defaults."""
    known = [run for run in runs if run.config]
    if not known:
        return None
    columns = {run.label: settings(run.config) for run in known}
    caption = "Settings that differ between the runs"
    if len(known) == 1:
        defaults = default_settings(known[0].config)
        if defaults is None:
            caption = "All settings"
        else:
            columns = {"default": defaults, **columns}
            preset = known[0].config.get("preset", "")
            caption = f"Settings that differ from the defaults of {known[0].command}:{preset}"
    keys = sorted({key for values in columns.values() for key in values})
    rows = []
    for key in keys:
        values = [_setting(column, key) for column in columns.values()]
        if len(values) == 1 or len(set(values)) > 1:
            rows.append([tag("code", key), *(tag("code", value) for value in values)])
    if not rows:
        return tag("p", f"{caption}: none.")
    return table(caption, ["setting", *columns], rows, texts=1 + len(columns))


def _measure(measure: Measure, policy: str) -> list[object]:
    detail = [f"{name.replace('_', ' ')} {number(v, 3)}" for name, v in measure.detail.items()]
    if measure.name in MEASURES and "answered" not in measure.detail:
        detail.append(EARLIER)
    if measure.caveat:
        detail.insert(0, measure.caveat[:1].upper() + measure.caveat[1:])
    return [
        measure.name.replace("_", " "),
        policy,
        number(measure.value, 3),
        _number_interval(measure.ci95),
        number(measure.problems, 0),
        per_cent(measure.depth_fraction),
        number(measure.completion_length, 1),
        "; ".join(detail),
    ]


def _points_interval(bounds: Interval | None) -> str:
    return "" if bounds is None else f"{points(bounds[0])} to {points(bounds[1])}"


def _number_interval(bounds: Interval | None, digits: int = 3) -> str:
    if bounds is None:
        return ""
    low, high = (number(bound, digits) for bound in bounds)
    return f"{low} to {high}"


def _setting(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "–"


def _last_step(run: Run) -> int | None:
    steps = [int(run.curves[name][0][-1]) for name in run.curves.names]
    return max(steps, default=None)


def _or_dash(value: object) -> str:
    return "–" if value is None or value == "" else str(value)
