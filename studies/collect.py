"""Collects the numbers and completions that a study publishes from its sweep.

    python -m studies.collect runs/page docs/results/page [--initial=DIR@POLICY]

Writes page.csv (one row per finished run: its settings and numbers, as in the sweep's table.csv),
page-seeds.csv (intervals over the seeds of each setting that has several), page-curves.csv
(training metrics; each row contains the means of a twentieth of a run's steps) and
page-completions.json (up to two completions of each run under sampled exits, every token with its
depth, if eval.heat_maps kept them). With --initial, the tables also contain the gains of each
policy over that evaluation of the initial checkpoint, paired by problem (`jexit compare`). Where a
sweep varies the model over the runs of another one, their settings are those of the study.
Measurements of speed are left out, so the same runs always give the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jexit.errors import UserError, command
from jexit.evaluation.compare import Outcomes, differences
from jexit.evaluation.compare import read as read_outcomes
from jexit.io.files import write_bytes_atomic
from jexit.io.metrics import read_metrics
from jexit.report.rendering import printable
from jexit.report.runs import read_run
from jexit.results import LARGEST, Evaluation, is_number
from jexit.sweep.plan import MACHINE, Cell, begun_in
from jexit.sweep.summary import SEED, write_csv
from studies.seeds import over_seeds

POINTS = 20  # lines of a run in NAME-curves.csv
SHOWN = 2  # completions of a run in NAME-completions.json


def by_settings_of_models(cells: Sequence[Cell]) -> list[Cell]:
    """Replaces models that a sweep trained by the settings in their names.

    `model.path=runs/sums/rl.depth_coef=2,seed=1` becomes the settings `rl.depth_coef=2` and
    `seed=1`, so that the models of several seeds form a group. All cells must have models with the
    same settings, which they do not set themselves; otherwise they stay as they are.
    """
    found = []
    for cell in cells:
        others = {key: value for key, value in cell.settings.items() if key != "model.path"}
        name = Path(cell.settings.get("model.path", "")).name
        pairs = [pair.partition("=") for pair in name.split(",")]
        of_model = {key: value for key, equals, value in pairs if equals}
        if len(of_model) < len(pairs) or others.keys() & of_model.keys():
            return [*cells]
        found.append(dataclasses.replace(cell, settings=of_model | others))
    same = {tuple(cell.settings) for cell in found}
    return found if len(same) == 1 else [*cells]


def curves(cell: Cell) -> Iterator[dict[str, float]]:
    """Yields a run's training metrics, averaged over intervals of steps that end at `step`."""
    records = read_metrics(cell.workdir)
    count = min(POINTS, len(records))
    for number in range(count):
        stretch = records[number * len(records) // count : (number + 1) * len(records) // count]
        means: dict[str, float] = {"step": stretch[-1]["step"]}
        for name in dict.fromkeys(name for record in stretch for name in record):
            if name != "step" and not MACHINE.search(name):
                values = [record[name] for record in stretch if is_number(record.get(name))]
                values = [value for value in values if abs(value) <= LARGEST]
                if values:
                    means[name] = fmean(values)
        yield means


def completions(cell: Cell) -> list[dict[str, Any]]:
    """Returns up to `SHOWN` completions under sampled exits that a run's evaluation kept."""
    if cell.evaluation is None:
        return []
    run = read_run(cell.evaluation.parent)
    sampled = [shown for shown in run.completions if shown.policy == "sample"][:SHOWN]
    return [
        {
            "settings": dict(cell.settings),
            "layers": run.layers,
            "prompt": printable(shown.prompt),
            "completion": printable(shown.completion),
            "tokens": [printable(token) for token in shown.tokens],
            "depths": shown.depths,
            "verdict": shown.verdict,
            "answer": printable(shown.answer),
        }
        for shown in sampled
    ]


def over_initial(cell: Cell, initial: Outcomes) -> dict[str, float]:
    """Returns the gains of a run's policies over the initial checkpoint, with 95 % intervals."""
    found: dict[str, float] = {}
    if cell.evaluation is None:
        return found
    for run in Evaluation.read(cell.evaluation).runs:
        ours = read_outcomes(f"{cell.evaluation.parent}@{run.policy}")
        for name, (value, low, high) in differences(ours, initial).items():
            key = f"{run.policy} less initial/{name}"
            found |= {key: float(value), f"{key}_ci95/low": low, f"{key}_ci95/high": high}
    return found


def seeds(
    cells: Sequence[Cell], initial: Outcomes | None
) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
    """Yields the settings that several evaluated runs share, and their intervals over the seeds."""
    groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for cell in cells:
        if cell.evaluation is not None and SEED in cell.settings:
            shared = tuple(pair for pair in cell.settings.items() if pair[0] != SEED)
            groups.setdefault(shared, []).append(cell.evaluation.parent)
    for shared, evaluations in groups.items():
        if len(evaluations) > 1:
            numbers: dict[str, float] = {}
            for run in Evaluation.read(evaluations[0] / "eval.json").runs:
                outcomes = [read_outcomes(f"{path}@{run.policy}") for path in evaluations]
                for name, value in over_seeds(outcomes, initial).items():
                    numbers[f"{run.policy}{name}"] = value
            yield dict(shared), numbers


def collect(cells: Sequence[Cell], target: Path, initial: Outcomes | None = None) -> list[Path]:
    """Writes the files of a study beside `target` and returns their paths."""
    table, intervals, metrics, shown = (
        target.with_name(target.name + ending)
        for ending in (".csv", "-seeds.csv", "-curves.csv", "-completions.json")
    )
    gains = ({} if initial is None else over_initial(cell, initial) for cell in cells)
    lines = zip(cells, gains, strict=True)
    write_csv(table, [(cell.settings, cell.numbers() | gained) for cell, gained in lines])
    written = [table]
    if groups := [*seeds(cells, initial)]:
        write_csv(intervals, groups)
        written.append(intervals)
    if rows := [(cell.settings, means) for cell in cells for means in curves(cell)]:
        write_csv(metrics, rows)
        written.append(metrics)
    if entries := [entry for cell in cells for entry in completions(cell)]:
        write_bytes_atomic(shown, (json.dumps(entries, indent=1) + "\n").encode())
        written.append(shown)
    return written


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", type=Path, help="directory of the sweep (its --into)")
    parser.add_argument("target", type=Path, help="path of the study's files, without their ending")
    parser.add_argument("--initial", help="an evaluation of the initial checkpoint and its policy")
    arguments = parser.parse_args(argv)
    initial = read_outcomes(arguments.initial) if arguments.initial else None
    cells = [cell for cell in begun_in(arguments.sweep) if cell.finished]
    if not cells:
        raise UserError(
            f"{arguments.sweep} contains no finished run of a sweep; finish the sweep first"
        )
    for path in collect(by_settings_of_models(cells), arguments.target, initial):
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
