"""Runs the tasks of lm-evaluation-harness on a model under a halting policy.

    python -m jexit.evaluation.harness --model=DIR --tasks=TASK[,TASK ...] [--policy=POLICY]
                                       [--include_path=DIR] [--limit=N] [--output=FILE]

POLICY says when a token leaves: full (after all layers), sample (at exits drawn from the hazards),
threshold:X (at the first exit whose hazard is above X, such as threshold:0.5) or fixed:N (after N
layers, such as fixed:6). Install lm-eval with the extra `eval` of this package. --include_path
names a folder that contains your own task files. The task files in configs/harness run tasks of
lm-eval on local data files. In Python, importing this module registers the model `jexit`:

    lm_eval.simple_evaluate("jexit", {"pretrained": "DIR", "policy": "sample"}, tasks=["gsm8k"])
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

try:
    from jexit.evaluation.harness_model import BATCH_SIZE, JexitLM
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        sys.exit(f"jexit: {error}")
    raise

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, simple_parse_args_string

from jexit.errors import UserError, command
from jexit.io.files import disk_errors, write_json_atomic


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    results = evaluate(options)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    info = results["config"]
    if info["tokens"]:
        print(
            f"policy {info['policy']}: {info['tokens']} tokens, mean depth "
            f"{info['depth_mean']:.2f} of {info['layers']} layers"
        )
    if options.output:
        print(f"Wrote {options.output}")
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the tasks that the command line requests and returns lm-eval's results.

    `options` is the parsed command line. If `options.output` is set, the results are also written
    to this JSON file. Raises UserError if the model or a task does not exist, if a
    setting is not valid, or if the file cannot be written.
    """
    target = pathlib.Path(options.output) if options.output else None
    if target:  # hours of work must not end at a path that cannot be written
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise UserError(f"--output is the folder {target}, but it must be a file; give a file")
        if not os.access(target.parent, os.W_OK):
            raise UserError(
                f"--output={target} cannot be written, because you lack write permission for its "
                "folder; give a file in another folder"
            )
    manager = TaskManager(include_path=options.include_path)
    tasks = options.tasks.split(",")
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"lm-eval has no task {unknown[0]!r}; list its tasks with `lm-eval ls tasks`, or give "
            "the folder of your task file with --include_path"
        )
    model = JexitLM(
        options.model,
        policy=options.policy,
        seed=options.seed,
        batch_size=options.batch_size,
        max_length=options.max_length,
        max_gen_toks=options.max_gen_toks,
        thinking=options.thinking,
        think_end_token=options.think_end_token,
    )
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            gen_kwargs=simple_parse_args_string(options.gen_kwargs) or None,
            log_samples=options.log_samples,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    except ValueError as error:
        raise UserError(
            f"lm-eval stopped with the error {str(error)!r}; check "
            f"--num_fewshot={options.num_fewshot}, --limit={options.limit} and "
            f"--gen_kwargs={options.gen_kwargs!r}"
        ) from error
    results = json.loads(json.dumps(found, default=handle_non_serializable))
    results["config"]["model_args"] = {"pretrained": str(options.model)}
    if target:
        write_json_atomic(target, results)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jexit.evaluation.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="model directory")
    add("--tasks", required=True, help="names of tasks or groups, separated by commas")
    add("--policy", default="full", help="full, threshold:X, fixed:N or sample")
    add("--include_path", help="folder with task files, in addition to lm-eval's own")
    add("--num_fewshot", type=_whole, help="number of worked examples before each question")
    add("--limit", type=_count, help="number of questions per task; below 1: a fraction of them")
    add("--output", help="JSON file for the results")
    add("--log_samples", action="store_true", help="keep every question and answer in the output")
    add("--apply_chat_template", action="store_true", help="use the model's chat format")
    add(
        "--thinking",
        default="auto",
        choices=["auto", "on", "off"],
        help="thinking switch of the chat template",
    )
    add("--think_end_token", help="text that ends the thought before an answer, such as </think>")
    add("--gen_kwargs", default="", help="generation settings: temperature=0.7,do_sample=true")
    add("--max_gen_toks", type=int, default=256, help="new tokens, unless the task sets a limit")
    add("--max_length", type=int, help="number of positions; default: the model's")
    add("--batch_size", type=int, default=BATCH_SIZE, help="rows per log-likelihood batch")
    add("--seed", type=int, default=0, help="seed of sampled depths and tokens")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"its value is {text!r}, but it must be a whole number of at least 0"
        )
    return int(text)


def _count(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"its value is {text!r}, but it must be above 0: a number of questions, or a fraction "
            "below 1 of them"
        )
    return int(value) if value >= 1 else value


if __name__ == "__main__":
    sys.exit(main())
