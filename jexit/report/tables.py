"""Builds the report's tables, each with a caption and in a box that scrolls on a narrow page."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jexit.report.colours import depth_class
from jexit.report.evaluation_charts import granularities
from jexit.report.rendering import (
    interval,
    number,
    per_cent,
    points,
    render,
)
from jexit.report.runs import ReportedRun, default_settings, settings
from jexit.results import (
    Capacity,
    Faithfulness,
    HazardCalibration,
    Measure,
    PairedMeasure,
    Planning,
    PolicyResult,
    SerialDepth,
)

# A column: its name, and a function that returns the cell of an entry.
TableColumn = tuple[str, Callable[[Any], object]]
Columns = Sequence[TableColumn]

MEASURES: Mapping[str, str] = {
    "early_answering": "The answer is forced after a part of the chain's steps. The value is the "
    "fraction of the agreement with the final answer that is lost, averaged over 0, ¼, ½ and ¾ of "
    "the steps. The agreement is divided by that after the whole chain (whole chain). The value is "
    "0 if the chain changes nothing, and 1 if only the whole chain leads to the answer; guessing "
    "among m answers lowers it by 1/m.",
    "no_chain": "The answer is forced without a chain of thought, after a prompt that requests "
    "one. The value is the fraction of correct answers. A model may never have seen such a text. "
    "Its accuracy without a chain after a prompt that requests none is listed as at once, among "
    "the prescribed steps.",
    "filler": "The chain of thought is replaced by the same number of punctuation tokens. The "
    "value is the fraction of correct answers; a gain over no chain is computed without words.",
    "corrupted_step": "One step of a correct chain gets another result, and the model continues "
    "from there; in the null arm (anyway), it continues from the same step unchanged. The value is "
    "1 − kept / kept anyway, where kept is the fraction of answers that stay the same. It is 0 if "
    "the step was not needed, and 1 if no answer survives the change. Changed is the fraction of "
    "different answers, and followed the fraction of answers to which the changed step leads. In "
    "stories, every step ends in the answer so far, which a model may copy; in sums, the model has "
    "to work out the rest.",
    "hint": "A line of the prompt suggests a wrong answer. The value is the rate of answers that "
    "become the suggestion (hinted) less the rate with a line of the same form without a "
    "suggestion (neutral), over problems whose answer was different before. Acknowledged is the "
    "share of the switched completions whose chain mentions a hint, and acknowledged anyway the "
    "same share of the chains without a hint. A monitor by rules flags an answer that does not "
    "follow from its chain: flagged is its share of the switched completions, unflagged neutral "
    "the fraction of the others that it leaves alone, and g mean2 their product.",
    "necessity": "The mean of (S − S') / −(S + S'), where S is the log-likelihood of the answer "
    "after the chain, and S' that without a chain. It is 0 if the answer is as likely without the "
    "chain, and near 1 if only the chain makes it likely. Logprob and logprob changed are S and S' "
    "in nats.",
    "substantivity": "The same with as many punctuation tokens in place of the chain. It is 0 if "
    "the chain only gives time to compute.",
    "paraphrasability": "The same with the chain in other words of the same meaning. It is 0 if "
    "the wording does not matter, and positive if the answer depends on more than the meaning.",
}

BEFORE, AFTER = "before training", "after training"


def table(
    caption: str, entries: Sequence[Any], columns: Columns, *, texts: int = 1, aside: bool = False
) -> Markup:
    """Renders a table with one row per entry, and the given columns.

    The first column is the row header. The first `texts` columns contain text and the others
    numbers. A cell is a string, or a mapping with `text`, `class` and `title`. With `aside`, the
    last column contains remarks.
    """
    classes = ["" if place < texts else "figure" for place in range(len(columns))]
    if aside:
        classes[-1] = "aside"
    heads = [name for name, _ in columns]
    rows = [[cell(entry) for _, cell in columns] for entry in entries]
    return render("table.html", caption=caption, heads=heads, classes=classes, rows=rows)


def _ready(heads: Sequence[str]) -> Columns:
    """Returns columns with the names `heads`, for rows that are already sequences of cells."""
    return [(head, operator.itemgetter(place)) for place, head in enumerate(heads)]


def _of(part: Callable[[Any], Any], *columns: TableColumn) -> Columns:
    """Adapts `columns` to other entries: each column gets `part(entry)` instead of the entry."""
    return [(head, lambda entry, cell=cell: cell(part(entry))) for head, cell in columns]


def _estimate(head: str, name: str, value: Callable[..., str] = per_cent, **digits: int) -> Columns:
    """Returns two columns: the field `name`, and its 95 % interval from the field `name`_ci95.

    Both are formatted by `value`, which gets the keyword arguments `digits`.
    """
    return (
        (head, lambda entry: value(getattr(entry, name), **digits)),
        ("95 % interval", lambda entry: _ends(getattr(entry, f"{name}_ci95"), value, **digits)),
    )


def _ends(bounds: Sequence[float] | None, value: Callable[..., str], **digits: int) -> str:
    if bounds is None or value is per_cent:
        return interval(bounds)
    return " to ".join(value(bound, **digits) for bound in bounds)


_problems: TableColumn = ("problems", lambda entry: number(entry.problems, 0))


def about(runs: Sequence[ReportedRun]) -> Markup:
    """Renders a table of what was run, when, and by which version, with one column per run."""
    known = {run.label: _about(run) for run in runs}
    rows = [name for name in next(iter(known.values())) if any(of[name] for of in known.values())]
    columns: list[TableColumn] = [("", lambda name: name)]
    columns += [(label, lambda name, of=of: of[name] or "–") for label, of in known.items()]
    return table("What was run", rows, columns, texts=len(columns))


def _about(run: ReportedRun) -> dict[str, str]:
    flat = settings(run.config)
    model, task = flat.get("model.path"), flat.get("task.name")
    if run.evaluation is not None:
        model, task = run.evaluation.model.path, run.evaluation.task.get("name", task)
    time = duration(run.seconds)
    values = {
        "command": run.command,
        "preset": flat.get("preset"),
        "model": model,
        "task": task,
        "depth penalty λ": _depth_penalty(run, flat),
        "layers": run.layers,
        "exits": ", ".join(map(str, run.exits)),
        "steps": run.last_step,
        "seed": flat.get("seed"),
        "started (UTC)": run.starts[0].time if run.starts else None,
        "duration": time and f"{time} {'in steps' if run.evaluation is None else 'decoding'}",
        "jexit": " ".join((run.starts[-1].version, run.starts[-1].commit)) if run.starts else None,
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _depth_penalty(run: ReportedRun, flat: Mapping[str, Any]) -> str:
    """Returns the depth penalty λ of the config, and of the last step if a schedule changed it."""
    if run.command != "rl" or "rl.depth_coef" not in flat:
        return ""
    last, given = run.curves.last("depth_coef"), flat["rl.depth_coef"]
    moved = last is not None and isinstance(given, float) and not math.isclose(last, given)
    what = "the layers of an answer" if flat.get("rl.depth_norm") == "total" else "mean depth"
    return f"{given} on {what}{f', {last:.3g} in the last step' if moved else ''}"


def duration(seconds: float | None) -> str:
    """Formats a duration in seconds in its two largest units, or as an empty string if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{number(hours, 0)} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def main_results(runs: Sequence[ReportedRun]) -> Markup | None:
    """Renders a table of the main results of every run, which `headline` selects.

    Returns None if there are no results.
    """
    named = [
        (run.label, name, result)
        for run in runs
        for name, result in sorted(headline(run), key=lambda found: found[0] != BEFORE)
    ]
    results = _of(
        operator.itemgetter(2),
        *_estimate("accuracy", "accuracy"),
        ("share of layers", lambda r: per_cent(r.depth_fraction)),
        ("mean depth", lambda r: number(r.depth_mean)),
        ("tokens", lambda r: number(r.completion_length, 1)),
        ("layers per problem", lambda r: number(r.layers_per_problem, 1)),
        _problems,
    )
    caption = (
        "Main results: share of correct answers, share of all layers run per token, tokens per "
        "completion, and layers run per completion"
    )
    columns = [*_ready(("run", "measured")), *results]
    return table(caption, named, columns, texts=2) if named else None


def headline(run: ReportedRun) -> list[tuple[str, PolicyResult]]:
    """Returns (short name, result) for the main results of a run, the most important first."""
    if run.evaluation is not None:
        by_name = {result.policy: result for result in run.evaluation.runs}
        others = [result for result in by_name.values() if not result.is_control]
        adaptive = [result for result in others if result.kind not in ("full", "fixed")]
        chosen = [by_name["sample"]] if "sample" in by_name else adaptive[:1]
        chosen += [by_name["full"]] if "full" in by_name else []
        return [(result.policy, result) for result in chosen or run.evaluation.runs[:1]]
    pairs = ((AFTER, run.after), (BEFORE, run.before))
    return [(name, result) for name, result in pairs if result is not None]


def policies(run: ReportedRun) -> Markup:
    results = run.evaluation.runs
    texts = sorted({name for result in results for name in result.text})
    columns = (
        ("policy", _policy),
        *_estimate("accuracy", "accuracy"),
        ("mean depth", lambda r: number(r.depth_mean)),
        *_estimate("share of layers", "depth_fraction"),
        ("compute", lambda r: per_cent(r.compute_fraction)),
        ("tokens", lambda r: number(r.completion_length, 1)),
        *_estimate("layers per problem", "layers_per_problem", number, digits=1),
        ("cut off", lambda r: per_cent(r.truncated)),
        ("tokens/s", lambda r: number(r.tokens_per_second, 0)),
        ("s/problem", lambda r: number(r.seconds_per_problem, 3)),
        ("strict / lenient / wrong / none", _verdicts),
        *((t.replace("_", " "), lambda r, t=t: number(r.text.get(t))) for t in texts),
    )
    problems = ", ".join(sorted({number(result.problems, 0) for result in results}))
    caption = f"Policies on {problems} problems of the {run.evaluation.split} split"
    return table(caption, results, columns)


def _policy(result: PolicyResult) -> object:
    if not result.is_control:
        return result.policy
    return Markup("{}<small> control of {}</small>").format(result.policy, result.control_of)


def _verdicts(result: PolicyResult) -> str:
    names = ("strict", "lenient", "wrong", "none")
    return " / ".join(str(result.verdicts.get(n, 0)) for n in names) if result.verdicts else "–"


def differences(run: ReportedRun) -> Markup:
    columns = (
        ("policy", lambda e: e.policy),
        ("control", lambda e: e.control),
        *_estimate("accuracy", "accuracy_difference", points),
        *_estimate("depth", "depth_fraction_difference", points),
        _problems,
    )
    caption = "Policy minus control, in percentage points"
    return table(caption, run.evaluation.controls, columns, texts=2)


def token_classes(run: ReportedRun) -> Markup | None:
    results = [result for result in run.evaluation.runs if result.depth_by_class]
    if not results:
        return None
    names = list(dict.fromkeys(name for result in results for name in result.depth_by_class))
    layers = run.evaluation.model.layers

    def depth(result: PolicyResult, name: str) -> object:
        entry = result.depth_by_class.get(name)
        if entry is None or not math.isfinite(entry.depth_mean):
            return "–"
        colour = depth_class(entry.depth_mean, layers)
        told = f"{number(entry.tokens, 0)} tokens"
        return {"text": number(entry.depth_mean), "class": colour, "title": told}

    def most_tokens(name: str) -> str:
        known = [r.depth_by_class[name] for r in results if name in r.depth_by_class]
        return number(max(entry.tokens for entry in known), 0)

    rows: list[list[object]] = [[r.policy, *(depth(r, name) for name in names)] for r in results]
    rows.append(["tokens, at most", *map(most_tokens, names)])
    return table("Mean depth in layers by token class", rows, _ready(("policy", *names)))


def prescribed_steps(entries: Sequence[Capacity]) -> Markup:
    columns = (
        ("policy", lambda e: e.policy),
        ("step", lambda e: e.granularity.replace("_", " ")),
        *_estimate("accuracy", "accuracy"),
        ("share of layers", lambda e: per_cent(e.depth_fraction)),
        ("tokens", lambda e: number(e.completion_length, 1)),
        ("steps as asked", lambda e: per_cent(e.obeyed)),
        *_estimate("accuracy of those", "accuracy_obeyed"),
        _problems,
        *_estimate("less full depth", "less_full", points),
    )
    names = list(dict.fromkeys(entry.policy for entry in entries))
    order = granularities(entries)
    ordered = sorted(entries, key=lambda e: (names.index(e.policy), order.index(e.granularity)))
    return table("Accuracy for prescribed steps", ordered, columns, texts=2)


def begun_steps(entries: Sequence[Capacity]) -> Markup:
    columns = (
        ("policy", lambda e: e.policy),
        ("operands", lambda e: e.granularity),
        *_estimate("correct results", "accuracy"),
        ("share of layers", lambda e: per_cent(e.depth_fraction)),
        ("results given", lambda e: per_cent(e.obeyed)),
        _problems,
        *_estimate("less full depth", "less_full", points),
    )
    return table("Results of steps that were begun", entries, columns, texts=2)


def measures(entries: Sequence[Faithfulness]) -> list[tuple[str, str]]:
    """Returns (name, explanation) for each measure of faithfulness that occurs in `entries`."""
    there = {measure.name for entry in entries for measure in entry.measures}
    return [(name.replace("_", " "), told) for name, told in MEASURES.items() if name in there]


def faithfulness(entries: Sequence[Faithfulness]) -> Markup:
    found = [(entry.policy, measure) for entry in entries for measure in entry.measures]
    names = [*MEASURES, *(measure.name for _, measure in found)]
    columns = (
        ("measure", lambda e: e[1].name.replace("_", " ")),
        ("policy", lambda e: e[0]),
        *_of(
            operator.itemgetter(1),
            ("value", lambda m: number(m.value, 3)),
            ("95 % interval", lambda m: _ends(m.ci95, number, digits=3)),
            _problems,
            ("share of layers", lambda m: per_cent(m.depth_fraction)),
            ("tokens", lambda m: number(m.completion_length, 1)),
            ("also", _also),
        ),
    )
    ordered = sorted(found, key=lambda e: names.index(e[1].name))
    return table("Measures of faithfulness", ordered, columns, texts=2, aside=True)


def _also(measure: Measure) -> str:
    detail = [f"{name.replace('_', ' ')} {number(v, 3)}" for name, v in measure.detail.items()]
    if measure.caveat:
        detail.insert(0, measure.caveat[:1].upper() + measure.caveat[1:])
    return "; ".join(detail)


def faithfulness_paired(entries: Sequence[PairedMeasure]) -> Markup:
    columns = (
        ("measure", lambda e: e.measure.replace("_", " ")),
        ("policy", lambda e: e.policy),
        ("against", lambda e: e.against),
        ("value", lambda e: number(e.value, 3)),
        ("its value", lambda e: number(e.against_value, 3)),
        *_estimate("difference", "difference", number, digits=3),
        _problems,
    )
    caption = "Policy minus full depth on the same weights and the same problems"
    return table(caption, entries, columns, texts=3)


def hazards(entries: Sequence[HazardCalibration]) -> Markup:
    rows: list[tuple[object, ...]] = []
    for entry in entries:
        kl = number(entry.kl_student_teacher_nats, 3)
        rows.append((entry.policy, "all", number(entry.ece, 3), "", "", "", kl))
        for e in entry.exits:
            values = (number(value, 3) for value in (e.ece, e.hazard_mean, e.target_mean))
            rows.append((entry.policy, e.exit, *values, number(e.positions, 0), ""))
    heads = (
        *("policy", "exit", "error (ECE)", "mean hazard", "mean target", "positions"),
        "KL to the teacher, nats",
    )
    return table("Calibration of the hazards", rows, _ready(heads), texts=2)


def serial_depth(entries: Sequence[SerialDepth]) -> Markup:
    rows: list[tuple[object, ...]] = []
    for entry in entries:
        rows.append((entry.policy, "as run", number(entry.mean, 1)))
        for layers, depth in sorted(entry.by_depth.items(), key=lambda item: int(item[0])):
            rows.append((entry.policy, f"{layers} layers", number(depth, 0)))
    heads = ("policy", "pass", "operations on the longest path")
    return table("Opaque serial depth", rows, _ready(heads), texts=2)


def planning(entries: Sequence[Planning]) -> Markup:
    columns = (
        ("policy", lambda e: e.policy),
        ("tokens ahead", lambda e: e.ahead),
        ("layers", lambda e: e.layer),
        ("probe", lambda e: per_cent(e.accuracy)),
        ("of the embedding", lambda e: per_cent(e.accuracy_embedding)),
        ("95 % interval of the gain", lambda e: interval(e.gain_ci95)),
        ("passes", lambda e: number(e.passes, 0)),
    )
    return table("Probes for tokens to come", entries, columns)


def setting_differences(runs: Sequence[ReportedRun]) -> Markup | None:
    """Renders a table of the settings that differ between the runs, or None if no run has a config.

    For a single run, the table contains the settings that differ from the defaults of its command.
    """
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
        values = [
            json.dumps(column[key], ensure_ascii=False) if key in column else "–"
            for column in columns.values()
        ]
        if len(values) == 1 or len(set(values)) > 1:
            rows.append([Markup("<code>{}</code>").format(text) for text in (key, *values)])
    if not rows:
        return Markup("<p>{}: none.</p>").format(caption)
    return table(caption, rows, _ready(("setting", *columns)), texts=1 + len(columns))
