"""Compares two evaluations on the same problems, with intervals that pair the problems.

    jexit compare DIR[@POLICY] DIR[@POLICY]

    jexit compare runs/eval-rl@threshold:0.5 runs/eval-base@full

DIR contains the eval.json and the problems.csv of an evaluation. Without @POLICY, the policy is the
first of eval.policies. Prints the accuracy, the layers per token and the layers per problem of both
and, with 95 % intervals over problems, the difference in accuracy and the layers that the first
saves against the second.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jexit.errors import MissingFile, UserError
from jexit.evaluation.intervals import bootstrap_ratio, bootstrap_ratio_difference, paired_interval
from jexit.io.files import write_bytes_atomic
from jexit.results import Evaluation
from jexit.tasks import Attempt

FILE = "problems.csv"
FIELDS = ("policy", "problem", "correct", "layers", "tokens")


def write_problems(path: Path, attempts: dict[str, Sequence[Attempt]]) -> None:
    """Writes a line per attempt: the problem's number, the verdict, and the layers and tokens."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(FIELDS)
    for policy, made in attempts.items():
        for number, attempt in enumerate(made):
            correct = int(attempt.correct)
            lines.writerow((policy, number, correct, attempt.layers_run, len(attempt.depths)))
    write_bytes_atomic(path, text.getvalue().encode())


class Outcomes(NamedTuple):
    """One policy's attempts: whether each is correct, and its layers and tokens."""

    name: str
    correct_N: np.ndarray
    layers_N: np.ndarray
    tokens_N: np.ndarray


def compared(ours: Outcomes, theirs: Outcomes, layers: Sequence[int]) -> str:
    """Returns the comparison as text. `layers` contains the numbers of layers of the two models."""
    lines = [f"{'':34}  {'accuracy':>9}  {'layers/token':>13}  {'layers/problem':>14}"]
    for some, most in zip((ours, theirs), layers, strict=True):
        depth = some.layers_N.sum() / some.tokens_N.sum()
        share = f"{depth:.2f} ({depth / most:.0%})"
        lines.append(
            f"{some.name[-34:]:34}  {some.correct_N.mean():9.1%}  {share:>13}  "
            f"{some.layers_N.mean():14.1f}"
        )
    accuracy = (
        ours.correct_N.mean() - theirs.correct_N.mean(),
        *paired_interval(ours.correct_N, theirs.correct_N),
    )
    high, low = (1 - end for end in bootstrap_ratio(ours.layers_N, theirs.layers_N))
    problem = (1 - ours.layers_N.sum() / theirs.layers_N.sum(), low, high)
    fraction = [some.layers_N / most for some, most in zip((ours, theirs), layers, strict=True)]
    token = (
        fraction[1].sum() / theirs.tokens_N.sum() - fraction[0].sum() / ours.tokens_N.sum(),
        *bootstrap_ratio_difference((fraction[1], theirs.tokens_N), (fraction[0], ours.tokens_N)),
    )
    lines += [
        "",
        "accuracy, difference in points:    {:+.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * value for value in accuracy)
        ),
        "layers saved per token, of all:    {:.1%} ({:.1%} to {:.1%})".format(*token),
        "layers saved per problem:          {:.1%} ({:.1%} to {:.1%})".format(*problem),
        f"{len(ours.correct_N)} problems, 95 % intervals that pair them",
    ]
    return "\n".join(lines)


def read(place: str) -> tuple[Outcomes, Evaluation]:
    """Returns the outcomes and the evaluation that `place`, DIR[@POLICY], names.

    Raises MissingFile or UserError if the files do not exist or are not valid, or if the policy was
    not evaluated.
    """
    directory, _, policy = place.partition("@")
    evaluation = Evaluation.read(Path(directory) / "eval.json")
    policy = policy or evaluation.runs[0].policy
    known = [run.policy for run in evaluation.runs]
    if policy not in known:
        raise UserError(
            f"{directory} has no results of the policy {policy!r}; use one of {', '.join(known)}"
        )
    path = Path(directory) / FILE
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["policy"] == policy]
            columns = [[int(row[name]) for row in rows] for name in FIELDS[1:]]
    except FileNotFoundError:
        raise MissingFile(
            f"{path} does not exist; run the evaluation again, which writes it"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); run the evaluation again") from None
    number_N, *parts = map(np.asarray, columns)
    count = next(run.problems for run in evaluation.runs if run.policy == policy)
    if number_N.tolist() != list(range(count)):
        raise UserError(
            f"{path} does not have the {count} problems of eval.json under {policy!r}; run the "
            "evaluation again"
        )
    return Outcomes(place, *parts), evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison of the two places in `arguments`, and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__.strip())
        return 0
    try:
        if len(arguments) != 2:
            raise UserError(f"{len(arguments)} places were given, but two are compared; give two")
        (ours, first), (theirs, second) = map(read, arguments)
        for what, one, other in (
            ("tasks", first.task, second.task),
            ("splits", first.split, second.split),
            ("numbers of problems", len(ours.correct_N), len(theirs.correct_N)),
        ):
            if one != other:
                raise UserError(
                    f"the evaluations have different {what}, {one} and {other}, so their problems "
                    "are not the same; evaluate both on the same problems"
                )
        print(compared(ours, theirs, [first.model.layers, second.model.layers]))
    except (ValueError, OSError) as error:
        print(f"jexit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
