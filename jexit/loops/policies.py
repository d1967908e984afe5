"""Accuracy and depth of a model on a task's problems under one halting policy."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from absl import logging
from flax import nnx

from jexit.config import Config, control_of
from jexit.data.loader import check_prompt_length, require_problems
from jexit.data.tokenizer import Tokenizer
from jexit.eval.depth import Completion, depth_by_class, mean_depth, mixed, shuffled_depths
from jexit.eval.intervals import bootstrap_ratio, wilson_interval
from jexit.loops.decoder import Decoder
from jexit.model.policies import Policy, Prescribed
from jexit.results import PolicyResult
from jexit.tasks import Problem, Task
from jexit.tasks.streams import NoMoreProblems


def policy_result(
    policy: str,
    examination: Examination,
    made: list[Completion],
    layers: int,
    *,
    tokens_per_second: float = math.nan,
    control_of: str | None = None,
) -> PolicyResult:
    """What a policy's completions of every problem come to."""
    histogram = np.bincount(
        [depth for completion in made for depth in completion.depths], minlength=layers + 1
    )
    verdicts = dict.fromkeys(("strict", "lenient", "wrong", "none"), 0)
    for completion in made:
        verdicts[completion.verdict] += 1
    correct, count = verdicts["strict"] + verdicts["lenient"], len(made)
    tokens = int(histogram.sum())
    depth = float(histogram @ np.arange(layers + 1)) / tokens
    run, whole = zip(*((c.layers_run, layers * len(c.depths)) for c in made), strict=True)
    tokenizer = examination.tokenizer
    texts = [completion.text for completion in made]
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
            made, tokenizer.tokens, examination.task.answer_mark, tokenizer.eos_ids
        ),
        problems=count,
        tokens=tokens,
        completion_length=tokens / count,
        truncated=sum(completion.truncated for completion in made) / count,
        verdicts=verdicts,
        tokens_per_second=tokens_per_second,
        text=text_means([examination.task.text_totals(examination.problems, texts)]),
        control_of=control_of,
    )


@dataclasses.dataclass(frozen=True)
class Examination:
    """The problems of an evaluation, with their prompts' tokens."""

    task: Task
    tokenizer: Tokenizer
    problems: list[Problem]
    prompts: list[list[int]]

    @classmethod
    def of(cls, task: Task, tokenizer: Tokenizer, config: Config) -> Examination:
        return cls(task, tokenizer, *held_out(task, tokenizer, config, config.eval.problems))

    def decoded(
        self, decoder: Decoder, policy: Policy, name: str
    ) -> tuple[list[Completion], float]:
        """A completion for each problem, and tokens a second; each host judges what it decodes."""

        def judge(number: int, ids: list[int], cut: bool) -> str:
            text = self.task.answerable(self.tokenizer.completion_text(ids), cut=cut)
            return self.task.verify(self.problems[number], text).kind

        made = decoder.decode(self.prompts, policy, judge=judge, what=f"evaluation under {name}")
        rows = zip(made.ids, made.depths, made.truncated, made.verdicts, strict=True)
        completions = [
            Completion(
                ids=ids,
                text=self.tokenizer.completion_text(ids),
                depths=depths,
                verdict=verdict,
                truncated=truncated,
            )
            for ids, depths, truncated, verdict in rows
        ]
        return completions, made.tokens_per_second


def held_out(
    task: Task, tokenizer: Tokenizer, config: Config, count: int
) -> tuple[list[Problem], list[list[int]]]:
    """The first `count` problems of the evaluation split (all, with a warning, if there are fewer),
    tokenised."""
    split, limit = config.eval.split, config.task.max_prompt_tokens
    size = task.size(split)
    require_problems(task, split)
    problems, prompts, index = [], [], 0
    while len(problems) < count and (size is None or index < size):
        try:
            problem = task.problem(split, index)
        except NoMoreProblems:
            size = index
            break
        ids = tokenizer.encode_prompt(problem.prompt, problem.shots)
        index += 1
        if len(ids) > limit and config.task.skip_long:
            continue
        check_prompt_length(problem, ids, limit)
        problems.append(problem)
        prompts.append(ids)
    if size is not None and len(problems) < count:
        _warn_of_fewer(task.name, split, count, len(problems))
    if not problems:
        raise ValueError(
            f"every prompt of task {task.name!r}, split {split!r}, is over the limit of {limit} "
            "tokens; raise config.task.max_prompt_tokens"
        )
    return problems, prompts


@functools.cache
def _warn_of_fewer(name: str, split: str, asked: int, found: int) -> None:
    logging.warning(
        "Task %r has %d problems in its %s split with these settings, and config.eval.problems "
        "asks for %d: all of them are measured.",
        name,
        found,
        split,
        asked,
    )


def check_room(prompts: list[list[int]], section: str, max_new_tokens: int, positions: int) -> None:
    """Raises ValueError when prompt and completion together can exceed the model's positions."""
    longest = max(map(len, prompts))
    if longest + max_new_tokens > positions:
        raise ValueError(
            f"config.{section}.max_new_tokens is {max_new_tokens} and the longest prompt has "
            f"{longest} tokens, together over the model's {positions} positions; lower it to at "
            f"most {positions - longest}"
        )


def text_means(hosts: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """The task's figures about texts, from every host's sums and counts."""
    means = {}
    for name in sorted({name for totals in hosts for name in totals}):
        pairs = [totals[name] for totals in hosts if name in totals]
        if count := sum(count for _, count in pairs):
            means[name] = sum(total for total, _ in pairs) / count
    return means


def evaluate_policy(
    decoder: Decoder, examination: Examination, name: str
) -> tuple[PolicyResult, list[Completion]]:
    """Decodes every prompt under a named policy and judges the text."""
    policy = decoder.policy(name, len(examination.prompts), decoder.max_new_tokens)
    made, speed = examination.decoded(decoder, policy, name)
    result = policy_result(name, examination, made, decoder.layers, tokens_per_second=speed)
    return result, made


def evaluate_control(
    decoder: Decoder, examination: Examination, name: str, of: list[Completion]
) -> tuple[PolicyResult, list[Completion]]:
    """The same under a control, which has its depths from the completions of another policy."""
    columns, layers, seed = decoder.max_new_tokens, decoder.layers, decoder.seed
    if name.startswith("shuffled"):
        depth_BT = shuffled_depths(of, layers, columns=columns, seed=seed)
        made, speed = examination.decoded(decoder, Prescribed(depth_BT), name)
    else:
        made, speed = _matched(decoder, examination, name, mean_depth(of))
    result = policy_result(
        name, examination, made, layers, tokens_per_second=speed, control_of=control_of(name)
    )
    return result, made


def _matched(
    decoder: Decoder, examination: Examination, name: str, mean: float
) -> tuple[list[Completion], float]:
    """Every prompt at the two neighbouring exits whose mean depths enclose `mean`, and their mix.

    Completions of another exit have other lengths, so that what it comes to is seen only when it
    has been decoded. Where nothing is shallow enough, all are stopped at the first exit.
    """
    stops = [*nnx.merge(*decoder.parts).exit_layers, decoder.layers]
    rows = len(examination.prompts)
    decoded: dict[int, list[Completion]] = {}
    seconds = 0.0

    def at(place: int) -> list[Completion]:
        nonlocal seconds
        if place not in decoded:
            policy = decoder.policy(f"fixed:{stops[place]}", rows, decoder.max_new_tokens)
            decoded[place], speed = examination.decoded(decoder, policy, name)
            seconds += sum(len(c.depths) for c in decoded[place]) / speed
        return decoded[place]

    last = len(stops) - 1
    upper = min(max(int(np.searchsorted(stops, mean)), 1), last)
    while upper > 1 and mean_depth(at(upper - 1)) > mean:
        upper -= 1
    while upper < last and mean_depth(at(upper)) < mean:
        upper += 1
    made = mixed(at(max(upper - 1, 0)), at(upper), mean, seed=decoder.seed)
    tokens = sum(len(c.depths) for completions in decoded.values() for c in completions)
    return made, tokens / seconds
