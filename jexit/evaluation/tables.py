"""An evaluation as tables on the terminal: a line a policy, a control, a measure."""

from __future__ import annotations

from collections.abc import Sequence

from jexit.io.progress import closing_table
from jexit.results import Evaluation, Interval, PolicyResult


def print_evaluation(evaluation: Evaluation) -> None:
    _print_table(
        "policy | accuracy | 95 % interval | depth | of L | compute | tokens | layers/problem",
        [
            (r.policy, f"{r.accuracy:.1%}", _percent(r.accuracy_ci95), f"{r.depth_mean:.2f}",
             f"{r.depth_fraction:.0%}", f"{r.compute_fraction:.0%}", f"{r.completion_length:.1f}",
             f"{r.layers_per_problem:.1f}")
            for r in evaluation.runs
        ],
    )  # fmt: skip
    for pair in evaluation.controls or ():
        print(
            f"{pair.policy} less {pair.control}: accuracy {pair.accuracy_difference:+.1%} "
            f"({_percent(pair.accuracy_difference_ci95)}), layers "
            f"{pair.depth_fraction_difference:+.1%} of L"
        )
    for quality in evaluation.exits or ():
        _print_table(
            "exit | KL, nats | same token | under 0.05",
            [
                (str(e.exit), f"{e.kl_nats:.2f}", f"{e.same_token:.1%}", f"{e.close:.1%}")
                for e in quality.exits
            ],
        )
        _print_table(
            "leaving under | KL, nats | same token | at L | of L",
            [
                (f"{e.threshold_nats:g}", f"{e.kl_nats:.2f}", f"{e.same_token:.1%}",
                 _share(e.same_token_full_depth), f"{e.depth_fraction:.0%}")
                for e in quality.leaving
            ],
        )  # fmt: skip
    for entry in evaluation.hazards or ():
        print(f"hazards under {entry.policy}: expected calibration error {entry.ece:.3f}")
    measures = [(f.policy, m) for f in evaluation.faithfulness or () for m in f.measures]
    _print_table(
        "measure | policy | value | 95 % interval | of L | n",
        [
            (m.name, policy, f"{m.value:.2f}", _percent(m.ci95), f"{m.depth_fraction:.0%}",
             str(m.problems))
            for policy, m in measures
        ],
    )  # fmt: skip
    for policy, measure in measures:
        if measure.caveat:
            print(f"{measure.name} under {policy}: {measure.caveat}")
    _print_table(
        "same problems | policy | value | full | less full | 95 % interval | n",
        [
            (p.measure, p.policy, f"{p.value:.2f}", f"{p.against_value:.2f}",
             f"{p.difference:+.2f}", _percent(p.difference_ci95), str(p.problems))
            for p in evaluation.faithfulness_paired or ()
        ],
    )  # fmt: skip
    for title, entries in (
        ("a step does", evaluation.capacity),
        ("a step begun of", evaluation.begun_steps),
    ):
        _print_table(
            f"{title} | policy | accuracy | 95 % interval | of L | as asked",
            [
                (c.granularity, c.policy, f"{c.accuracy:.1%}", _percent(c.accuracy_ci95),
                 f"{c.depth_fraction:.0%}", f"{c.obeyed:.0%}")
                for c in entries or ()
            ],
        )  # fmt: skip


def print_change(before: PolicyResult, after: PolicyResult, title: str) -> None:
    """The closing table of a training run."""
    names = {
        "accuracy": "accuracy",
        "depth/fraction": "depth_fraction",
        "compute/fraction": "compute_fraction",
        "depth/mean": "depth_mean",
        "completion/length": "completion_length",
        "layers/problem": "layers_per_problem",
    }
    rows = [(name, getattr(before, key), getattr(after, key)) for name, key in names.items()]
    shared = sorted(before.text.keys() & after.text.keys())
    closing_table([*rows, *((name, before.text[name], after.text[name]) for name in shared)], title)


def _print_table(head: str, rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be, texts to the left and numbers to the right."""
    if not rows:
        return
    heads = head.split(" | ")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    texts = 2 if heads[1] == "policy" else 1
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if number < texts else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells))


def _percent(interval: Interval | None) -> str:
    return "" if interval is None else "{:.1%} – {:.1%}".format(*interval)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
