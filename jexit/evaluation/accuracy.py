"""Measures a model's accuracy and depth on a task's problems under one halting policy."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from absl import logging

from jexit.config import Config
from jexit.data.loader import check_prompt_length, require_problems
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather
from jexit.errors import SharedUserError, UserError
from jexit.evaluation.decoder import Decoder
from jexit.evaluation.depth import depth_by_class
from jexit.evaluation.intervals import bootstrap_ratio, wilson_interval
from jexit.model.policies import Policy
from jexit.results import PolicyResult
from jexit.tasks import Attempt, Problem, Task, Verdict
from jexit.tasks.base import VERDICT_KINDS
from jexit.tasks.streams import ATTEMPTS, NoMoreProblems
from jexit.tasks.user_code import guarded_judge


@dataclasses.dataclass(frozen=True)
class Examination:
    """A task's problems for an evaluation; `prompts` has the token ids of each problem's prompt."""

    task: Task
    tokenizer: Tokenizer
    problems: list[Problem]
    prompts: list[list[int]]

    @classmethod
    def of(cls, task: Task, tokenizer: Tokenizer, config: Config) -> Examination:
        return cls(task, tokenizer, *held_out(task, tokenizer, config, config.eval.problems))

    def attempts(self, decoder: Decoder, policy: Policy, name: str) -> tuple[list[Attempt], float]:
        """Decodes and judges one attempt at each problem under `policy`.

        Returns (attempts, tokens per second), with the attempts in the order of `problems`. `name`
        is the policy's name in error messages.
        """

        def judge(numbers: Sequence[int], attempts: Sequence[Attempt]) -> list[Verdict]:
            return judged(self.task, [self.problems[number] for number in numbers], attempts)

        return decoder.decode(self.prompts, policy, judge=judge, what=f"evaluation under {name}")


def judged(task: Task, problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[Verdict]:
    """Returns the task's verdict on each of this host's attempts at `problems`.

    A user-defined task fails if it raises an exception, takes too long, or returns a value that is
    not a reward. If it fails on any host, every host raises SharedUserError.
    """
    verdicts, fault = [], ""
    try:
        verdicts = guarded_judge(task, problems, attempts)
    except UserError as error:
        fault = str(error)
    if faults := [said for said in gather("the verdicts", fault) if said]:
        raise SharedUserError(faults[0])
    return verdicts


def evaluate_policy(
    decoder: Decoder, examination: Examination, name: str
) -> tuple[PolicyResult, list[Attempt]]:
    attempts, speed = examination.attempts(decoder.under(name), decoder.policy(name), name)
    result = policy_result(name, examination, attempts, decoder.layers, tokens_per_second=speed)
    return result, attempts


def policy_result(
    policy: str,
    examination: Examination,
    attempts: Sequence[Attempt],
    layers: int,
    *,
    tokens_per_second: float = math.nan,
) -> PolicyResult:
    """Computes a policy's accuracy, depth and other results from one judged attempt per problem.

    `attempts` are in the order of the examination's problems. `layers` is the model's number of
    layers. `policy`, the policy's name, and `tokens_per_second` are copied into the result.
    """
    histogram = np.bincount(
        [depth for made in attempts for depth in made.depths], minlength=layers + 1
    )
    verdicts = dict.fromkeys(VERDICT_KINDS, 0)
    for made in attempts:
        assert made.verdict is not None, "an attempt has no verdict"
        verdicts[made.verdict.kind] += 1
    correct, count = verdicts["strict"] + verdicts["lenient"], len(attempts)
    tokens = int(histogram.sum())
    depth = float(histogram @ np.arange(layers + 1)) / tokens
    run, whole = zip(*((a.layers_run, layers * len(a.depths)) for a in attempts), strict=True)
    task, tokenizer = examination.task, examination.tokenizer
    return PolicyResult(
        policy=policy,
        accuracy=correct / count,
        accuracy_ci95=wilson_interval(correct, count),
        depth_mean=depth,
        depth_fraction=depth / layers,
        depth_fraction_ci95=bootstrap_ratio(run, whole),
        layers_per_problem=sum(run) / count,
        layers_per_problem_ci95=bootstrap_ratio(run, [1] * count),
        depth_histogram={str(d): int(n) for d, n in enumerate(histogram) if n},
        depth_by_class=depth_by_class(
            attempts, tokenizer.tokens, task.answer_mark, tokenizer.eos_ids
        ),
        problems=count,
        tokens=tokens,
        completion_length=tokens / count,
        truncated=sum(made.truncated for made in attempts) / count,
        verdicts=verdicts,
        tokens_per_second=tokens_per_second,
        text=text_means([task.text_totals(examination.problems, attempts) | part_totals(attempts)]),
        control_of=None,
    )


def part_totals(attempts: Sequence[Attempt]) -> dict[str, tuple[float, int]]:
    """Sums each named part of the reward (`Verdict.parts`) over the attempts.

    Returns {`reward/NAME`: (sum, number of attempts with this part)}.
    """
    verdicts = [attempt.verdict for attempt in attempts if attempt.verdict]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    found = {name: [v.parts[name] for v in verdicts if name in v.parts] for name in names}
    return {f"reward/{name}": (sum(each), len(each)) for name, each in found.items()}


def text_means(hosts: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Returns {name: mean} of a task's own metrics over all hosts.

    Each entry of `hosts` maps the name of a metric to its (sum, count) on one host. A metric whose
    counts are all 0 is left out.
    """
    means = {}
    for name in sorted({name for totals in hosts for name in totals}):
        pairs = [totals[name] for totals in hosts if name in totals]
        if count := sum(count for _, count in pairs):
            means[name] = sum(total for total, _ in pairs) / count
    return means


def held_out(
    task: Task, tokenizer: Tokenizer, config: Config, count: int
) -> tuple[list[Problem], list[list[int]]]:
    """Returns the first `count` problems of the evaluation split, and their prompts as token ids.

    With `config.task.skip_long`, problems with more than `config.task.max_prompt_tokens` tokens in
    the prompt are skipped; otherwise such a problem raises UserError. A generated split ends if
    `ATTEMPTS` problems in a row are skipped. If fewer than `count` problems are left, all of them
    are returned and a warning is logged. Raises UserError if none is left.
    """
    split, limit = config.eval.split, config.task.max_prompt_tokens
    size = task.size(split)
    require_problems(task, split)
    problems, prompts, index, skipped = [], [], 0, 0
    while len(problems) < count and (size is None or index < size):
        if skipped == ATTEMPTS and size is None:  # generated problems would not end
            size = index
            break
        try:
            problem = task.problem(split, index)
        except NoMoreProblems:
            size = index
            break
        ids = tokenizer.encode_prompt(problem.messages)
        index += 1
        if len(ids) > limit and config.task.skip_long:
            skipped += 1
            continue
        skipped = 0
        check_prompt_length(problem, ids, limit)
        problems.append(problem)
        prompts.append(ids)
    if size is not None and len(problems) < count:
        _warn_of_fewer(task.name, split, count, len(problems))
    if not problems:
        raise UserError(
            f"every prompt in the {split!r} split of task {task.name!r} is longer than the limit "
            f"of {limit} tokens; raise config.task.max_prompt_tokens"
        )
    return problems, prompts


@functools.cache
def _warn_of_fewer(name: str, split: str, asked: int, found: int) -> None:
    logging.warning(
        "Task %r has only %d problems in its %s split with these settings, but "
        "config.eval.problems is %d; all %d problems are measured.",
        name, found, split, asked, found,
    )  # fmt: skip


def check_room(prompts: list[list[int]], section: str, max_new_tokens: int, positions: int) -> None:
    """Raises UserError if the longest prompt plus `max_new_tokens` exceeds the model's positions.

    `prompts` are token ids, and `positions` is the model's number of positions. The message names
    the setting `config.{section}.max_new_tokens`.
    """
    longest = max(map(len, prompts))
    if longest + max_new_tokens > positions:
        raise UserError(
            f"config.{section}.max_new_tokens is {max_new_tokens} and the longest prompt has "
            f"{longest} tokens, which together exceed the model's {positions} positions; lower "
            f"config.{section}.max_new_tokens to at most {positions - longest}"
        )
