"""Accuracy and depth of a model on a task under halting policies; text for given prompts."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from jexit.config import Config, EvalConfig
from jexit.data.loader import check_prompt_length, require_problems
from jexit.data.tokenizer import Tokenizer
from jexit.dist import gather, host_rows, is_primary
from jexit.io.metrics import write_json_atomic
from jexit.io.progress import Progress, closing_table
from jexit.io.workdir import start_run
from jexit.loops.pictures import draw
from jexit.loops.setup import engine_size, load_model, load_task, make_policy, sampling_law
from jexit.model.policies import Sample
from jexit.model.transformer import Transformer
from jexit.rollout import EngineSize, generate, rollout
from jexit.steps.state import split_model
from jexit.tasks import Problem, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """What `eval.json` holds for one policy; depths are of the passes that produced the tokens."""

    policy: str
    accuracy: float
    accuracy_ci95: tuple[float, float]
    depth_mean: float
    depth_fraction: float
    depth_histogram: dict[str, int]  # tokens by layers run
    problems: int
    tokens: int
    completion_length: float
    truncated: float
    verdicts: dict[str, int]
    tokens_per_second: float  # without compilation
    text: dict[str, float]  # the task's own figures about the completions


def wilson_interval(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): sensible at 0, at 1 and for few problems."""
    if of == 0:
        return 0.0, 1.0
    share, square = right / of, z * z / of
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def held_out(
    task: Task, tokenizer: Tokenizer, config: Config, count: int
) -> tuple[list[Problem], list[list[int]]]:
    """The first `count` problems of the evaluation split (all, if there are fewer), tokenised."""
    split, limit = config.eval.split, config.task.max_prompt_tokens
    size = task.size(split)
    require_problems(task, split)
    problems, prompts, index = [], [], 0
    while len(problems) < count and (size is None or index < size):
        problem = task.problem(split, index)
        ids = tokenizer.encode_prompt(problem.prompt)
        index += 1
        if len(ids) > limit and config.task.skip_long:
            continue
        check_prompt_length(problem, ids, limit)
        problems.append(problem)
        prompts.append(ids)
    if not problems:
        raise ValueError(
            f"every prompt of task {task.name!r}, split {split!r}, is over the limit of {limit} "
            "tokens; raise config.task.max_prompt_tokens"
        )
    return problems, prompts


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
    parts: tuple,
    layers: int,
    tokenizer: Tokenizer,
    task: Task,
    problems: list[Problem],
    prompts: list[list[int]],
    policy: str,
    config: EvalConfig,
    *,
    seed: int,
    law: Sample = Sample(),
    size: EngineSize,
) -> tuple[PolicyResult, list[dict[str, Any]]]:
    """Decodes every prompt under a policy and judges the text.

    `parts` is the split model, `law` what the policy `sample` means. Returns the result and records
    of the first completions, with each token's depth.
    """
    here = host_rows(len(prompts))
    made = rollout(
        parts,
        [prompts[index] for index in here.index_B],
        policy=make_policy(policy, len(prompts), config.max_new_tokens, layers, law),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        key=seed,
        total=len(prompts),
        size=size,
    )
    histogram = np.zeros(layers + 1, np.int64)
    verdicts = dict.fromkeys(("strict", "lenient", "wrong", "none"), 0)
    truncated, texts = 0, []
    records: list[tuple[int, dict[str, Any]]] = []  # with the problem's number
    for row in np.flatnonzero(made.host_rows.first_B):
        number = int(made.host_rows.index_B[row])
        ids, depths = made.completion(row), made.depths_BT[row, : made.lengths_B[row]]
        text = tokenizer.decode(ids)
        texts.append(text)
        verdict = task.verify(problems[number], text)
        verdicts[verdict.kind] += 1
        truncated += bool(made.truncated_B[row])
        histogram += np.bincount(depths, minlength=layers + 1)
        if len(records) < config.heat_maps:
            record = {
                "policy": policy,
                "prompt": problems[number].prompt,
                "completion": text,
                "tokens": tokenizer.tokens(ids),
                "depths": depths.tolist(),
                "verdict": verdict.kind,
                "answer": problems[number].answer,
            }
            records.append((number, record))
    mine = {
        "verdicts": verdicts,
        "truncated": truncated,
        "histogram": histogram.tolist(),
        "speed": float(histogram.sum()) / made.seconds,
        "text": task.text_totals(texts),
        "records": records,
    }
    hosts = gather(f"evaluation under {policy}", mine)
    verdicts = {kind: sum(host["verdicts"][kind] for host in hosts) for kind in verdicts}
    histogram = np.sum([host["histogram"] for host in hosts], axis=0)
    records = sorted(
        (tuple(pair) for host in hosts for pair in host["records"]), key=lambda r: r[0]
    )
    right, count = verdicts["strict"] + verdicts["lenient"], len(prompts)
    tokens = int(histogram.sum())
    depth = float(histogram @ np.arange(layers + 1)) / tokens
    return (
        PolicyResult(
            policy=policy,
            accuracy=right / count,
            accuracy_ci95=wilson_interval(right, count),
            depth_mean=depth,
            depth_fraction=depth / layers,
            depth_histogram={str(d): int(n) for d, n in enumerate(histogram) if n},
            problems=count,
            tokens=tokens,
            completion_length=tokens / count,
            truncated=sum(host["truncated"] for host in hosts) / count,
            verdicts=verdicts,
            tokens_per_second=sum(host["speed"] for host in hosts),
            text=text_means([host["text"] for host in hosts]),
        ),
        [record for _, record in records[: config.heat_maps]],
    )


def evaluate(config: Config, workdir: pathlib.Path) -> None:
    """Runs every policy of `eval.policies`; writes `eval.json`, `completions.json`, the report."""
    task = load_task(config.task, config.eval.split)
    model, tokenizer = load_model(config, trains=False)
    problems, prompts = held_out(task, tokenizer, config, config.eval.problems)
    check_room(prompts, "eval", config.eval.max_new_tokens, model.arch.max_positions)
    parts, layers = _parts(model), model.arch.layers
    for policy in config.eval.policies:
        make_policy(policy, 1, 1, layers)  # refuse a wrong one before the first runs
    start_run(workdir, config.to_dict())
    results, records = [], []
    with Progress(len(config.eval.policies), description="eval", enabled=is_primary()) as progress:
        for number, policy in enumerate(config.eval.policies, start=1):
            result, examples = evaluate_policy(
                parts,
                layers,
                tokenizer,
                task,
                problems,
                prompts,
                policy,
                config.eval,
                seed=config.seed,
                law=sampling_law(config),
                size=engine_size(config),
            )
            results.append(dataclasses.asdict(result))
            records += examples
            progress.update(
                number,
                policy=policy,
                accuracy=result.accuracy,
                **{"depth/fraction": result.depth_fraction},
            )
    if not is_primary():
        return
    description = {"path": config.model.path, "layers": layers, "exits": model.exit_layers}
    write_json_atomic(
        workdir / "eval.json",
        {"task": dataclasses.asdict(config.task), "model": description, "runs": results},
    )
    write_json_atomic(workdir / "completions.json", records)
    print_results(results)
    print(f"Wrote {workdir / 'eval.json'}")
    print(f"Drew {draw(workdir)}")


def print_results(results: list[dict[str, Any]]) -> None:
    """One line a policy: accuracy with its interval, depth, length, speed."""
    print(
        f"{'policy':<16}{'accuracy':>10}{'95 % interval':>18}{'depth':>8}{'of L':>7}{'tokens':>8}"
    )
    for run in results:
        low, high = run["accuracy_ci95"]
        print(
            f"{run['policy']:<16}{run['accuracy']:>10.1%}{f'{low:.1%} – {high:.1%}':>18}"
            f"{run['depth_mean']:>8.2f}{run['depth_fraction']:>7.0%}"
            f"{run['completion_length']:>8.1f}"
        )


def compare(before: PolicyResult | dict, after: PolicyResult | dict, title: str) -> None:
    """The closing table of a training run."""
    old, new = (
        dataclasses.asdict(result) if isinstance(result, PolicyResult) else result
        for result in (before, after)
    )
    names = {
        "accuracy": "accuracy",
        "depth/fraction": "depth_fraction",
        "depth/mean": "depth_mean",
        "completion/length": "completion_length",
    }
    rows = [(name, old[key], new[key]) for name, key in names.items()]
    shared = old["text"].keys() & new["text"].keys()
    rows += [(name, old["text"][name], new["text"][name]) for name in sorted(shared)]
    closing_table(rows, title)


def print_generations(config: Config) -> None:
    """Completes `generate.prompts` and prints each text with its mean depth."""
    model, tokenizer = load_model(config, trains=False)
    g = config.generate
    if not g.prompts:
        raise ValueError("there are no prompts; set config.generate.prompts='(\"...\",)'")
    layers = model.arch.layers
    generation = generate(
        model,
        tokenizer,
        g.prompts,
        policy=make_policy(
            g.policy, len(g.prompts), g.max_new_tokens, layers, sampling_law(config)
        ),
        max_new_tokens=g.max_new_tokens,
        temperature=g.temperature,
        top_p=g.top_p,
        top_k=g.top_k,
        min_p=g.min_p,
        stop=g.stop,
        seed=config.seed,
        size=engine_size(config),
    )
    for prompt, text, depths in zip(g.prompts, generation.texts, generation.depths, strict=True):
        mean = sum(depths) / len(depths)
        print(f"> {prompt}\n{text}")
        print(f"  [{len(depths)} tokens, mean depth {mean:.2f} of {layers} layers]")
        print("  depths: " + " ".join(map(str, depths)) + "\n")


def _parts(model: Transformer) -> tuple:
    split = split_model(model, full=False)
    return split.decodable(split.trainable)
