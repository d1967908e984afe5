"""Compares two evaluations on the same problems, with paired confidence intervals.

    jexit compare DIR[@POLICY] DIR[@POLICY]

    jexit compare runs/eval-rl@threshold:0.5 runs/eval-base@full

DIR contains the eval.json and the problems.csv of an evaluation. Without @POLICY, the policy is the
first of eval.policies. Both evaluations must have the same problems. Prints the accuracy, layers
per token and layers per problem of both, and then, with 95 % intervals, the difference in accuracy
and the fractions of layers that the first evaluation saves compared with the second.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jexit.errors import UserError, command
from jexit.evaluation.intervals import bootstrap_ratio, bootstrap_ratio_difference, paired_interval
from jexit.io.files import write_bytes_atomic
from jexit.results import Evaluation
from jexit.tasks import Attempt, Problem
from jexit.tasks.base import stable_hash
from jexit.untrusted import read_bytes

PROBLEMS = "problems.csv"
FIELDS = ("policy", "problem", "correct", "layers", "tokens")


def write_problems(
    path: Path, problems: Sequence[Problem], attempts: Mapping[str, Sequence[Attempt]]
) -> None:
    """Writes the results of all attempts to the CSV file `path`, with one row per attempt.

    A row contains the policy, a hash of the problem, whether the answer is correct (1 or 0), the
    number of layers run and the number of tokens. `attempts` contains, for each policy, an attempt
    per problem.
    """
    names = problem_names(problems)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(FIELDS)
    for policy, made in attempts.items():
        for name, attempt in zip(names, made, strict=True):
            correct = int(attempt.correct)
            lines.writerow((policy, name, correct, attempt.layers_run, len(attempt.depths)))
    write_bytes_atomic(path, text.getvalue().encode())


def problem_names(problems: Sequence[Problem]) -> list[str]:
    """Returns a hash of each problem's messages and answer, as 16 hex digits."""
    return [f"{stable_hash(problem.messages, problem.answer):016x}" for problem in problems]


class Outcomes(NamedTuple):
    """The results on N problems under one policy: correctness, layers run and number of tokens.

    `name` is the evaluation and policy, DIR[@POLICY]. `layers` is the model's number of layers, and
    `problems` contains the hashes of the problems. `correct_N` is 1 for a correct answer, else 0.
    `layers_N` contains the layers run, summed over the tokens of a completion.
    """

    name: str
    layers: int
    problems: list[str]
    correct_N: np.ndarray
    layers_N: np.ndarray
    tokens_N: np.ndarray


def check_same_problems(first: Outcomes, *others: Outcomes) -> None:
    """Raises UserError if the problems of the evaluations differ."""
    for other in others:
        if other.problems != first.problems:
            raise UserError(
                f"{first.name} and {other.name} have different problems; evaluate them on the same "
                "task, split and number of problems"
            )


def differences(ours: Outcomes, theirs: Outcomes) -> dict[str, tuple[float, float, float]]:
    """Returns the gains of `ours` over `theirs`, as {name: (gain, low end, high end)}.

    The ends are those of a 95 % interval that is paired by problem. `accuracy_difference` is a
    fraction of the problems, `saved_per_token` a fraction of the model's layers, and
    `saved_per_problem` a fraction of the layers that `theirs` runs. Raises UserError if the
    problems differ.
    """
    check_same_problems(ours, theirs)
    high, low = (1 - end for end in bootstrap_ratio(ours.layers_N, theirs.layers_N))
    fraction = [some.layers_N / some.layers for some in (ours, theirs)]
    return {
        "accuracy_difference": (
            ours.correct_N.mean() - theirs.correct_N.mean(),
            *paired_interval(ours.correct_N, theirs.correct_N),
        ),
        "saved_per_token": (
            fraction[1].sum() / theirs.tokens_N.sum() - fraction[0].sum() / ours.tokens_N.sum(),
            *bootstrap_ratio_difference(
                (fraction[1], theirs.tokens_N), (fraction[0], ours.tokens_N)
            ),
        ),
        "saved_per_problem": (1 - ours.layers_N.sum() / theirs.layers_N.sum(), low, high),
    }


def comparison(ours: Outcomes, theirs: Outcomes) -> str:
    """Returns a comparison of two evaluations as text; raises UserError if their problems differ.

    The text is the one that the command prints (see the module).
    """
    found = differences(ours, theirs)
    lines = [f"{'':34}  {'accuracy':>9}  {'layers/token':>13}  {'layers/problem':>14}"]
    for some in (ours, theirs):
        depth = some.layers_N.sum() / some.tokens_N.sum()
        share = f"{depth:.2f} ({depth / some.layers:.0%})"
        lines.append(
            f"{some.name[-34:]:34}  {some.correct_N.mean():9.1%}  {share:>13}  "
            f"{some.layers_N.mean():14.1f}"
        )
    lines += [
        "",
        "accuracy, difference in points:    {:+.1f} ({:+.1f} to {:+.1f})".format(
            *(100 * value for value in found["accuracy_difference"])
        ),
        "layers saved per token, of all:    {:.1%} ({:.1%} to {:.1%})".format(
            *found["saved_per_token"]
        ),
        "layers saved per problem:          {:.1%} ({:.1%} to {:.1%})".format(
            *found["saved_per_problem"]
        ),
        f"{len(ours.correct_N)} problems, 95 % intervals that pair them",
    ]
    return "\n".join(lines)


def read(evaluation: str) -> Outcomes:
    """Reads the results of one policy from the evaluation DIR[@POLICY].

    Without @POLICY, the policy is the first of the evaluation. Raises MissingFile if a file is
    missing, and UserError if a file is damaged or contains no results of the policy.
    """
    directory, policy = evaluation, ""
    if "@" in evaluation and not Path(evaluation).is_dir():
        directory, _, policy = evaluation.rpartition("@")
    found = Evaluation.read(Path(directory) / "eval.json")
    runs = {run.policy: run for run in found.runs}
    policy = policy or next(iter(runs), "")
    if not runs:
        raise UserError(f"{directory} has no results of any policy; give another evaluation")
    if policy not in runs:
        raise UserError(
            f"{directory} has no results of the policy {policy!r}; use one of {', '.join(runs)}"
        )
    path, again = Path(directory) / PROBLEMS, "run the evaluation again, which writes it"
    data = read_bytes(path, again)
    try:
        text = io.StringIO(data.decode(), newline="")
        rows = [row for row in csv.DictReader(text) if row["policy"] == policy]
        names = [row["problem"] for row in rows]
        columns = [np.asarray([int(row[name]) for row in rows]) for name in FIELDS[2:]]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from None
    outcomes, run = Outcomes(evaluation, found.model.layers, names, *columns), runs[policy]
    for what, ours, theirs in (
        ("problems", len(names), run.problems),
        ("tokens", int(outcomes.tokens_N.sum()), run.tokens),
        ("correct answers", int(outcomes.correct_N.sum()), round(run.accuracy * run.problems)),
    ):
        if ours != theirs:
            raise UserError(
                f"{path} has {ours} {what} under {policy!r}, but eval.json has {theirs}; {again}"
            )
    return outcomes


@command
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(__doc__.strip())
        return 0
    if len(arguments) != 2:
        raise UserError(
            f"{len(arguments)} evaluations were given, but two are compared; give exactly two, "
            "each as DIR or DIR@POLICY"
        )
    print(comparison(*map(read, arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
