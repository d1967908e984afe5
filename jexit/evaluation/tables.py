"""Prints an evaluation on the terminal, with one line per policy, control and measure."""

from __future__ import annotations

from collections.abc import Sequence

from jexit.io.progress import closing_table
from jexit.results import Evaluation, Interval, PolicyResult, Record

_CI95 = "{0.accuracy_ci95[0]:.1%} – {0.accuracy_ci95[1]:.1%}"


def print_evaluation(evaluation: Evaluation) -> None:
    _print_table(
        "policy | accuracy | 95 % interval | depth | of L | compute | tokens | layers/problem",
        "{0.policy} | {0.accuracy:.1%} | " + _CI95 + " | {0.depth_mean:.2f} | "
        "{0.depth_fraction:.0%} | {0.compute_fraction:.0%} | {0.completion_length:.1f} | "
        "{0.layers_per_problem:.1f}",
        evaluation.runs,
    )
    for pair in evaluation.controls:
        print(
            f"{pair.policy} less {pair.control}: accuracy {pair.accuracy_difference:+.1%} "
            f"({_percent(pair.accuracy_difference_ci95)}), layers "
            f"{pair.depth_fraction_difference:+.1%} of L"
        )
    for quality in evaluation.exits:
        _print_table(
            "exit | KL, nats | same token | KL under 0.05",
            "{0.exit} | {0.kl_nats:.2f} | {0.same_token:.1%} | {0.close:.1%}",
            quality.exits,
        )
        _print_table(
            "threshold, nats | KL, nats | same token | same at L | of L",
            "{0.threshold_nats:g} | {0.kl_nats:.2f} | {0.same_token:.1%} | "
            "{0.same_token_full_depth:.1%} | {0.depth_fraction:.0%}",
            quality.leaving,
        )
    for hazards in evaluation.hazards:
        print(f"hazards under {hazards.policy}: expected calibration error {hazards.ece:.3f}")
    for entry in evaluation.serial_depth:
        print(
            f"opaque serial depth under {entry.policy}: {entry.mean:.0f} operations per token on "
            f"average, {entry.full} at full depth"
        )
    _print_table(
        "tokens ahead | policy | layers | probe | of the embedding | n",
        "{0.ahead} | {0.policy} | {0.layer} | {0.accuracy:.1%} | {0.accuracy_embedding:.1%} | "
        "{0.passes}",
        evaluation.planning,
    )
    for entry in evaluation.faithfulness:
        _print_table(
            f"under {entry.policy} | value | 95 % interval | n",
            "{0.name} | {0.value:.2f} | {0.ci95[0]:.2f} – {0.ci95[1]:.2f} | {0.problems}",
            entry.measures,
        )
        for measure in entry.measures:
            if measure.caveat:
                print(f"{measure.name} under {entry.policy}: {measure.caveat}")
    _print_table(
        "same problems | policy | value | full | less full | 95 % interval | n",
        "{0.measure} | {0.policy} | {0.value:.2f} | {0.against_value:.2f} | {0.difference:+.2f} | "
        "{0.difference_ci95[0]:+.2f} – {0.difference_ci95[1]:+.2f} | {0.problems}",
        evaluation.faithfulness_paired,
    )
    for head, entries in (
        ("prescribed step", evaluation.capacity),
        ("begun step", evaluation.begun_steps),
    ):
        _print_table(
            f"{head} | policy | accuracy | 95 % interval | of L | as asked",
            "{0.granularity} | {0.policy} | {0.accuracy:.1%} | " + _CI95 + " | "
            "{0.depth_fraction:.0%} | {0.obeyed:.0%}",
            entries,
        )


def print_change(before: PolicyResult, after: PolicyResult, title: str) -> None:
    """Prints a table of the results before and after training, at the end of a training run."""
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


def _print_table(head: str, row: str, records: Sequence[Record]) -> None:
    """Prints a table with one line per record: the template `row`, formatted with the record.

    In `head` and `row`, ` | ` separates the columns. Text is aligned left and numbers right.
    """
    if not records:
        return
    lines = [text.split(" | ") for text in (head, *(row.format(record) for record in records))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = 2 if lines[0][1] == "policy" else 1
    for cells in lines:
        sized = [
            cell.ljust(width) if number < texts else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print("  ".join(sized))


def _percent(interval: Interval | None) -> str:
    return "" if interval is None else "{:.1%} – {:.1%}".format(*interval)
