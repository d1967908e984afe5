"""The report: one HTML page that needs no network, no server and no scripts to be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jexit.errors import UserError
from jexit.io.files import write_bytes_atomic
from jexit.report import figures, tables
from jexit.report.curves import training_figures
from jexit.report.heatmap import heat_maps, legend
from jexit.report.markup import Html, interval, join, number, per_cent, tag
from jexit.report.palette import depth_colours
from jexit.report.runs import Run, read_runs
from jexit.results import Completion, Evaluation

REPORT_FILE = "report.html"
EVALUATE = "python -m jexit.main --config=configs/eval.py --config.model.path=WORKDIR"

# Part of a run → what would produce it, for a run that has none.
ABSENT = {
    "training curves": "python -m jexit.main --config=configs/sft.py (or rl.py, pretrain.py)",
    "accuracy and depth under policies": EVALUATE,
    "token-by-token depths": f"{EVALUATE} --config.eval.heat_maps=8",
    "depth by token class": EVALUATE,
    "differences from controls": f'{EVALUATE} --config.eval.policies=\'("full","sample",'
    '"shuffled","fixed:matched")\'',
    "head capacity": f"{EVALUATE} --config.eval.measures='(\"capacity\",)' for sums or tom",
    "faithfulness": f'{EVALUATE} --config.eval.measures=\'("early_answering","no_chain",'
    '"filler","corrupted_step","hint")\'',
    "calibration of the hazards": f"{EVALUATE} --config.eval.measures='(\"hazards\",)'",
}

# The page may load nothing from anywhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(
    workdirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report on one run, or on several side by side, and returns its path.

    Without `output` that is `report.html` in the first run's directory. The same files give the
    same bytes.

    Raises:
      ValueError: When a directory holds nothing to report or a file that no run writes, or the
        disk refuses the page; nothing is written then.
    """
    return write_page(read_runs(workdirs), output)


def write_page(runs: Sequence[Run], output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report on runs that have been read; see `write_report`."""
    path = runs[0].workdir / REPORT_FILE if output is None else Path(output)
    if path.is_dir():
        raise UserError(f"{path} is a directory; give --output a file name, such as {REPORT_FILE}")
    write_bytes_atomic(path, render(runs).encode())
    return path


def render(runs: Sequence[Run]) -> Html:
    """The whole page."""
    names = " · ".join(run.label for run in runs)
    sections = [
        section
        for section in (
            _overview(runs),
            _section("training", "Training", _training(runs)),
            _section("policies", "Accuracy and depth", _policies(runs)),
            _section("exits", "Where tokens leave", _per_run(runs, _exits)),
            _section("tokens", "Token by token", _tokens(runs)),
            _section("capacity", "Head capacity", _per_run(runs, _capacity)),
            _section("faithfulness", "Faithfulness", _per_run(runs, _faithfulness)),
            _section("hazards", "Calibration of the hazards", _per_run(runs, _hazards)),
            _section("settings", "Settings", tables.setting_differences(runs)),
            _section("absent", "Not in this report", _absent(runs)),
        )
        if section is not None
    ]
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections]
    body = join(
        tag("header", tag("p", "jexit report", class_="kind"), tag("h1", names)),
        tag("nav", tag("ul", *links), aria_label="Contents"),
        tag("main", *(section for _, _, section in sections)),
        tag("footer", tag("p", "Written by ", tag("code", _command(runs)), ".")),
        tag("script", Html(_asset("page.js"))),
    )
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{names} – jexit report"),
        tag("style", Html(_asset("page.css") + _depth_styles())),
    )
    page = tag("html", tag("head", head), "\n", tag("body", body), lang="en")
    return Html(f"<!doctype html>\n{page}\n")


Section = tuple[str, str, Html]


def _section(key: str, title: str, content: Html | None) -> Section | None:
    if content is None:
        return None
    heading = tag("h2", title, id=f"{key}-title")
    whole = tag("section", heading, content, id=key, aria_labelledby=f"{key}-title")
    return key, title, Html(f"\n{whole}")


def _per_run(runs: Sequence[Run], part: Callable[[Run], Html | None]) -> Html | None:
    """A part of every run that has it, under the run's name where there are several."""
    made = [(run, part(run)) for run in runs]
    shown = [
        join(tag("h3", run.label) if len(runs) > 1 else None, content)
        for run, content in made
        if content is not None
    ]
    return join(*shown) if shown else None


def _overview(runs: Sequence[Run]) -> Section:
    notes = [tag("p", note, class_="note") for run in runs for note in run.notes]
    parts = [
        _cards(runs[0]) if len(runs) == 1 else tables.key_figures(runs),
        tables.about(runs),
        *notes,
    ]
    return _section("overview", "Key figures", join(*parts))


def _cards(run: Run) -> Html | None:
    """The four figures that a run comes down to, and what they are measured against."""
    found = tables.headline(run)
    if not found:
        return None
    (name, first), other = found[0], found[1] if len(found) > 1 else None

    def against(text: str) -> str:
        return f"{other[0]}: {text}" if other else ""

    second = other[1] if other else first
    cards = (
        (
            "right answers",
            per_cent(first.accuracy),
            f"95 % interval {interval(first.accuracy_ci95)}",
            against(per_cent(second.accuracy)),
        ),
        (
            "of all layers run",
            per_cent(first.depth_fraction),
            f"mean depth {number(first.depth_mean)} of {run.layers}",
            against(per_cent(second.depth_fraction)),
        ),
        (
            "tokens a completion",
            number(first.completion_length, 1),
            f"{number(first.problems, 0)} problems, {number(first.tokens, 0)} tokens",
            against(number(second.completion_length, 1)),
        ),
        (
            "layers a problem",
            number(first.layers_per_problem, 1),
            "summed over the tokens of a completion",
            against(number(second.layers_per_problem, 1)),
        ),
    )
    shown = [
        tag("div", tag("dt", what), tag("dd", value, tag("small", fine), tag("small", compared)))
        for what, value, fine, compared in cards
    ]
    return join(
        tag("p", "Policy: " if run.evaluation else "Held out: ", tag("strong", name)),
        tag("dl", *shown, class_="cards"),
    )


def _training(runs: Sequence[Run]) -> Html | None:
    drawn = training_figures(runs)
    if drawn is None:
        return None
    words = "Thin lines are what was measured at each step, thick ones a running mean."
    return join(tag("p", words), drawn)


def _policies(runs: Sequence[Run]) -> Html | None:
    if all(run.evaluation is None for run in runs):
        return None
    words = (
        "Accuracy is the share of right answers, its interval the score interval; depth is the "
        "mean number of layers run for a generated token. A control aims at the mean depth of "
        "the policy it is named as a control of, and its own row says what it reached; it does not "
        "choose depths by the token: what a policy has over its controls is what choosing is "
        "worth. fixed:N stops every token after N layers, whatever others run, and is no "
        "control."
    )

    def one(run: Run) -> Html | None:
        if run.evaluation is None:
            return None
        paired = tables.differences(run) if run.evaluation.controls else None
        return join(tables.policies(run), paired)

    return join(tag("p", words), figures.plane(runs), _per_run(runs, one))


def _exits(run: Run) -> Html | None:
    if run.evaluation is None:
        return None
    drawn = figures.histograms(run)
    by_class = None
    if any(entry.depth_by_class for entry in run.evaluation.runs):
        by_class = tables.classes(run)
    return join(drawn, by_class) if drawn or by_class else None


def _tokens(runs: Sequence[Run]) -> Html | None:
    shown = _per_run(runs, _heat_maps)
    if shown is None:
        return None
    words = (
        "Each cell is a generated token; its colour and the number below it are the layers run by "
        "the pass that produced it. A hazard is the probability of leaving at an exit that was "
        "reached. Point at a cell, or move to it with Tab and the arrow keys, to read them."
    )
    return join(tag("p", words), shown)


def _heat_maps(run: Run) -> Html | None:
    found: Sequence[Completion] = run.completions
    words = None
    if not found and run.samples:
        # The first and the last that a training run wrote down show what it changed.
        steps = sorted({sample.step for sample in run.samples if sample.step is not None})
        found = [s for s in run.samples if s.step in (steps[-1], steps[0])]
        found.sort(key=lambda sample: sample.step != steps[-1])
        words = tag("p", f"Rollouts of steps {steps[-1]} and {steps[0]} of the training run.")
        words = words if len(steps) > 1 else tag("p", f"Rollouts of step {steps[0]}.")
    if not found or run.layers is None:
        return None
    depths = {depth for completion in found for depth in completion.depths}
    layers = max(run.layers, max(depths, default=0))
    key = legend([*depths, *(e for e in run.exits if e < layers), layers], layers)
    return join(words, key, heat_maps(found, layers, run.exits))


def _capacity(run: Run) -> Html | None:
    entries = run.evaluation.capacity if run.evaluation else None
    if not entries:
        return None
    words = (
        "What the model can still do between two tokens: accuracy when the prompt prescribes how "
        "much each step of the chain of thought does."
    )
    parts = [tag("p", words), figures.capacity(entries), tables.capacity(entries)]
    if begun := run.evaluation.begun_steps:
        words = (
            "The same without obedience: after a prompt that asks for no size, the beginning of a "
            "first step, which says how many operands it takes, is put into the model's mouth, and "
            "the result that it writes is judged. The share of layers is that of the pass that "
            "wrote the result's first token. A step counts problems that have the operands for it."
        )
        parts += [tag("p", words), figures.begun_steps(begun), tables.begun_steps(begun)]
    return join(*parts)


def _faithfulness(run: Run) -> Html | None:
    entries = run.evaluation.faithfulness if run.evaluation else None
    if not entries:
        return None
    words = (
        "Whether the answer depends on what the chain of thought says. A reply without an answer "
        "is neither the same nor one that followed; answered: the share of replies with one."
    )
    pairs = run.evaluation.faithfulness_paired
    return join(
        tag("p", words),
        figures.early_answering(entries),
        tables.faithfulness(entries),
        tables.faithfulness_paired(pairs) if pairs else None,
    )


def _hazards(run: Run) -> Html | None:
    entries = run.evaluation.hazards if run.evaluation else None
    if not entries:
        return None
    words = (
        "A hazard is calibrated when, over the positions where it has some value, the targets "
        "average to that value; the expected calibration error (ECE) is the mean distance, "
        "weighted by positions. The KL is of the next token at the depths that the policy gave to "
        "that of the teacher, the base model at full depth."
    )
    return join(tag("p", words), figures.reliability(entries), tables.hazards(entries))


def _absent(runs: Sequence[Run]) -> Html | None:
    items = []
    for run in runs:
        for part in missing_parts(run):
            where = f"{run.label}, {part}" if len(runs) > 1 else part
            items.append(tag("li", f"{where}: ", tag("code", ABSENT[part])))
    return tag("ul", *items, class_="absent") if items else None


def missing_parts(run: Run) -> list[str]:
    """The parts of the page for which the run has no files, in the page's order."""
    evaluation: Evaluation | None = run.evaluation
    there = {
        "training curves": bool(run.curves.names),
        "accuracy and depth under policies": evaluation is not None,
        "token-by-token depths": bool(run.completions or run.samples),
    }
    if evaluation is not None:
        there |= {
            "depth by token class": any(entry.depth_by_class for entry in evaluation.runs),
            "differences from controls": bool(evaluation.controls),
            "head capacity": bool(evaluation.capacity),
            "faithfulness": bool(evaluation.faithfulness),
            "calibration of the hazards": bool(evaluation.hazards),
        }
    return [part for part in ABSENT if not there.get(part, True)]


def _depth_styles() -> str:
    return "".join(
        f".c{step}{{--cell:{background};--on-cell:{text}}}\n"
        for step, (background, text) in enumerate(depth_colours())
    )


def _command(runs: Sequence[Run]) -> str:
    return " ".join(["python -m jexit.report", *(str(run.workdir) for run in runs)])


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
